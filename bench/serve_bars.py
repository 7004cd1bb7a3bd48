"""What bench.serve found, as a table, and against what was promised. Pure."""

from collections.abc import Sequence

import msgspec

from bench.peers import PEERS

Row = dict[str, object]

OURS = "skerry"
FASTAPI = ("fastapi", "fastapi-threads")
MODEL_SERVERS = tuple(way for peer in PEERS.values() if peer.is_model_server for way in peer.ways)
TINY_P50_MS, TINY_P99_MS, IMAGE_P50_MS = 0.27, 1.0, 0.75
IMAGE = "shufflenet"
HALF, THIRD = 0.5, 1 / 3
SHARE_OF_BARE = 0.95
BELIEVABLE_SHARE = 1.1
"""No server is faster than what it runs: beyond this, other work on the machine was what differed, and nothing is said."""
PER_CORE_SECOND = 8000


class Bar(msgspec.Struct, frozen=True):
    """One promise: what was found, what it had to be at most (or at least), and whether it is."""

    what: str
    found: float | None
    bar: float | None
    at_most: bool = True
    most_believable: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether it is kept; None where that can't be said."""
        if self.found is None or self.bar is None:
            return None
        if self.most_believable is not None and self.found > self.most_believable:
            return None
        return self.found <= self.bar if self.at_most else self.found >= self.bar


def value(rows: Sequence[Row], server: str, model: str, key: str, *, is_latency: bool = True) -> float | None:
    """One figure; of several concurrencies the best throughput's row counts."""
    found = [row for row in rows if row.get("server") == server and row.get("model") == model and (row["concurrency"] == 1) == is_latency]
    found = [row for row in found if isinstance(row.get(key), int | float)]
    if not found:
        return None
    best = max(found, key=lambda row: float(str(row.get("per_second", 0))))
    return float(str(best[key]))


def least(rows: Sequence[Row], servers: Sequence[str], model: str, key: str) -> float | None:
    """The least figure of several servers'."""
    return min((one for server in servers if (one := value(rows, server, model, key)) is not None), default=None)


def times(factor: float, number: float | None) -> float | None:
    """None stays None."""
    return None if number is None else factor * number


def bars(rows: Sequence[Row]) -> list[Bar]:
    """All that this bench can judge."""
    found = [
        Bar("tiny: added p50, ms", value(rows, OURS, "tiny", "added_p50_ms"), TINY_P50_MS),
        Bar("tiny: added p99, ms", value(rows, OURS, "tiny", "added_p99_ms"), TINY_P99_MS),
        Bar("602 KB: added p50, ms", value(rows, OURS, IMAGE, "added_p50_ms"), IMAGE_P50_MS),
    ]
    for model in ("tiny", IMAGE):
        added = value(rows, OURS, model, "added_p50_ms")
        found += [
            Bar(f"{model}: added p50 at half of {peer}'s, ms", added, times(HALF, value(rows, peer, model, "added_p50_ms")))
            for peer in FASTAPI
        ]
        best = least(rows, MODEL_SERVERS, model, "added_p50_ms")
        found.append(Bar(f"{model}: added p50 at a third of the best model server's, ms", added, times(THIRD, best)))
    throughput = value(rows, OURS, IMAGE, "per_second", is_latency=False)
    theirs = [one for peer in FASTAPI if (one := value(rows, peer, IMAGE, "per_second", is_latency=False)) is not None]
    core = value(rows, OURS, "tiny", "per_front_core_second", is_latency=False)
    return [
        *found,
        *(
            Bar(what, value(rows, OURS, IMAGE, key, is_latency=False), SHARE_OF_BARE, at_most=False, most_believable=BELIEVABLE_SHARE)
            for what, key in (
                (f"{IMAGE}: share of bare", "share_of_bare"),
                (f"{IMAGE}: share of bare, less what the client took of the cores", "share_less_client"),
            )
        ),
        Bar(f"{IMAGE}: requests/s above FastAPI's", throughput, max(theirs, default=None), at_most=False),
        Bar("tiny: requests by second of the gateway's core", core, PER_CORE_SECOND, at_most=False),
    ]


def _cell(row: Row, key: str, digits: int) -> str:
    number = row.get(key)
    return f"{number:.{digits}f}" if isinstance(number, int | float) else "-"


def table(rows: Sequence[Row], absent: dict[str, str]) -> str:
    """Everything, for people."""
    lines = []
    for model, concurrency in dict.fromkeys((str(row["model"]), int(str(row["concurrency"]))) for row in rows):
        mine = [row for row in rows if row["model"] == model and row["concurrency"] == concurrency]
        if concurrency == 1:
            lines.append(f"\n{f'{model}, one caller':<24}    p50 ms    p99 ms  added p50  added p99  idle cores")
            columns = (("p50_ms", 3, 10), ("p99_ms", 3, 10), ("added_p50_ms", 3, 11), ("added_p99_ms", 3, 11), ("idle_cores", 3, 12))
        else:
            lines.append(
                f"\n{f'{model}, {concurrency} connections':<24}     req/s  of bare     p50 ms     p99 ms  failed  req/s a front core"
            )
            columns = (
                ("per_second", 1, 10), ("share_of_bare", 3, 9), ("p50_ms", 3, 11), ("p99_ms", 3, 11), ("failed", 0, 8),
                ("per_front_core_second", 0, 20),
            )  # fmt: skip
        lines += [f"  {row['server']:<22}" + "".join(f"{_cell(row, key, d):>{w}}" for key, d, w in columns) for row in mine]
    lines += [f"\nnot measured: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines) + "\n"


def bars_table(found: Sequence[Bar]) -> str:
    """Each promise in a line."""
    words = {True: "reached", False: "NOT REACHED", None: "can't be said"}
    lines = [
        f"  {bar.what:<66} {'-' if bar.found is None else f'{bar.found:.3f}':>10}"
        f" {'<=' if bar.at_most else '>='} {'-' if bar.bar is None else f'{bar.bar:.3f}':<10} {words[bar.reached]}"
        for bar in found
    ]
    return "\n".join(["\nbars", *lines]) + "\n"

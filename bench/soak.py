"""A long run at full speed: whether memory and descriptors of gateway and workers stay what they are.

``python -m bench.soak [--seconds 3600] [--connections 8] [--replicas 2] [--sample-s 10]``

Small and large requests in one mix, with some that are refused: no JSON, a model that nobody serves. Every ``--sample-s`` the connections
are made anew, over TCP, the box's own socket and gRPC in turn, where the gateway has them, and in between, when nobody is connected,
memory and open descriptors are read. What was there in the first tenth of the time does not count. ``mb_per_hour`` is the slope of a line
through the rest; ``flat`` says that the last quarter's median is within 2 % and a megabyte of the second's, and is null where five minutes
or less are left.
"""

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from bench import boxes, calls, load, models
from bench.added_latency import driver_called
from bench.boxes import Box
from bench.models import Model
from bench.replica_memory import of
from bench.report import report

WEIGHTS = {"tiny": 0.6, "speech": 0.25, "shufflenet": 0.13}
REFUSED_WEIGHT = 0.01
SKIP_SHARE = 0.1
FLAT_SHARE, FLAT_MB = 0.02, 1.0
MORE_DESCRIPTORS = 2
SETTLE_S = 0.5
FEWEST_SAMPLES = 8
LEAST_JUDGED_S = 300.0
"""A gateway's memory rises for its first minutes and then goes up and down with the way of asking: less than this tells nothing."""
PROGRESS_EVERY = 30


class Sample(msgspec.Struct, frozen=True):
    """One look at a program's processes."""

    at_s: float
    pss_mb: float
    rss_mb: float
    descriptors: int


def descriptors(pids: list[int]) -> int:
    """Open in all of these that can be looked at."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return total


def sample(pids: list[int], at_s: float) -> Sample:
    """Look now."""
    held = of(pids)
    return Sample(at_s, held.pss * 1024 / 1e6, held.rss * 1024 / 1e6, descriptors(pids))


def programs(box: Box, gateways: dict[str, boxes.Gateway]) -> dict[str, list[int]]:
    """The pids of each gateway and each worker."""
    found = {name: [process.pid for process in boxes.tree(gateway.pid)] for name, gateway in gateways.items()}
    for replicas in box.replicas.values():
        for replica in replicas:
            found[replica.name] = [boxes.worker_pid(box.folder / "drivers", replica.name)]
    return found


def plans(gateway: boxes.Gateway, wanted: list[Model], arguments: argparse.Namespace) -> Iterator[load.Plan]:
    """One chunk after the other, each in the next way of asking."""
    ways = []
    for address in (gateway.address, f"{load.UNIX}{gateway.local}"):
        good = [calls.binary(address, model).call for model in wanted]
        bad = [
            load.Call("http", address, calls.http_request(address, path, b"{no JSON", {"Content-Type": "application/json"}))
            for path in (f"/v2/models/{wanted[0].name}/infer", "/v2/models/nobody-serves-this/infer")
        ]
        ways.append(([*good, *bad], [*(WEIGHTS[model.name] for model in wanted), REFUSED_WEIGHT, REFUSED_WEIGHT]))
    if gateway.grpc:
        ways += [([calls.grpc(gateway.grpc, model).call], [1.0]) for model in wanted]
    number = 0
    while True:
        kinds, weights = ways[number % len(ways)]
        yield load.Plan(kinds, arguments.connections, arguments.sample_s, weights=weights, seed=number, cores=arguments.client_cores)
        number += 1


def figures(samples: list[Sample]) -> dict[str, object]:
    """How one program's memory and descriptors went."""
    kept = samples[int(len(samples) * SKIP_SHARE) :]
    if len(kept) < FEWEST_SAMPLES:
        return {"samples": len(kept), "flat": None, "descriptors_flat": None}
    quarter = len(kept) // 4
    early, late = kept[quarter : 2 * quarter], kept[-quarter:]
    found: dict[str, object] = {"samples": len(kept)}
    is_flat = True
    for name in ("pss_mb", "rss_mb"):
        values = [getattr(one, name) for one in kept]
        slope = float(np.polyfit([one.at_s for one in kept], values, 1)[0]) * 3600
        before, after = (statistics.median(getattr(one, name) for one in part) for part in (early, late))
        is_flat &= after <= before * (1 + FLAT_SHARE) + FLAT_MB
        found[name] = {"first": round(values[0], 2), "last": round(values[-1], 2), "most": round(max(values), 2)}
        found[f"{name}_per_hour"] = round(slope, 2)
    most = [max(one.descriptors for one in part) for part in (early, late)]
    found["descriptors"] = {"first": kept[0].descriptors, "last": kept[-1].descriptors, "most": max(one.descriptors for one in kept)}
    is_long = kept[-1].at_s - kept[0].at_s >= LEAST_JUDGED_S
    return found | {"flat": is_flat if is_long else None, "descriptors_flat": most[1] <= most[0] + MORE_DESCRIPTORS}


def verdict(found: list[object]) -> bool | None:
    """No where one is no, yes where all are yes; None where that can't be said."""
    return False if False in found else None if None in found else True


def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The whole run."""
    wanted = models.models(folder, WEIGHTS)
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(boxes.box(folder, driver_called("bubblewrap", folder), wanted, replicas=arguments.replicas))
        settings = boxes.in_all_ways(folder, processes=arguments.processes)
        gateway = stack.enter_context(boxes.further_gateway(folder, "asked", boxes.usual_routes(box), **settings))
        boxes.wait_until_right(calls.binary(gateway.address, wanted[0]))
        gateways = {"gateway": gateway}
        pids = programs(box, gateways)
        seen: dict[str, list[Sample]] = {name: [] for name in pids}
        statuses: Counter[int] = Counter()
        began_s = time.monotonic()
        for number, plan in enumerate(plans(gateway, wanted, arguments)):
            statuses.update(load.driven(plan, folder).status.tolist())
            time.sleep(SETTLE_S)
            at_s = time.monotonic() - began_s
            for name, mine in pids.items():
                seen[name].append(sample(mine, at_s))
            if number % PROGRESS_EVERY == PROGRESS_EVERY - 1:
                report("soak", so_far_s=round(at_s), requests=statuses.total(), gateway=msgspec.to_builtins(seen["gateway"][-1]))
            if at_s >= arguments.seconds:
                break
        for model in wanted:
            boxes.wait_until_right(calls.binary(gateway.address, model))
        found = {name: figures(samples) for name, samples in seen.items()}
        return {
            "requests": statuses.total(), "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "per_second": round(statuses.total() / (time.monotonic() - began_s), 1), "programs": found,
            "is_same_process": programs(box, gateways) == pids,
            "flat": verdict([one[name] for one in found.values() for name in ("flat", "descriptors_flat")]),
        }  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--sample-s", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="of the gateway, where it can have several")
    parser.add_argument("--client-cores", type=lambda text: [int(part) for part in text.split(",") if part], default=[])
    arguments = parser.parse_args()
    boxes.end_orderly()
    ort.disable_telemetry_events()
    folder = Path(tempfile.mkdtemp(prefix="sk-"))
    folder.chmod(0o755)
    try:
        report("soak", seconds=arguments.seconds, **soak(arguments, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

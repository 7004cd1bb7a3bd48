"""Whether a deadline is a promise: on a busy box, when a replica is killed, under five times the load, over a link that comes and goes.

``python -m bench.deadline [--parts steady kill overload link] [--model shufflenet] [--seconds S] [--trace FILE.csv.gz]``

Requests arrive as a Poisson process that waits for nobody; a latency counts from when its request should have been sent. What the box can
do is measured before, with as many callers as keep it busy. A line of JSON for each part.

``steady``: 60 % load, two replicas. ``kill``: 80 % load on a box with a real warden, one of two replicas is killed in the middle.
``overload``: five times the capacity, every request with a deadline, a part of them with the highest priority. ``link``: a box with more
to do than it can, whose cloud lies behind ``bench.link``; the same arrivals are sent to the box alone before and after, and a request
that both of these runs made in time must not be late with the cloud.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from bench import boxes, calls, link, load, models, sandboxes
from bench.added_latency import driver_called
from bench.models import Model
from bench.report import report
from skerry.wire.box import Route
from skerry.wire.messages import Upstream

STEADY_LOAD, STEADY_P99_MS = 0.6, 10.0
KILL_LOAD = 0.8
OVERLOAD, GOODPUT_SHARE = 5.0, 0.9
HIGH, LOW = 1, 3
LONG_DEADLINE_MS = 5000
OUTLASTS_S = 30.0
CAPACITY_S = 4.0
CAPACITY_CALLERS = 2
SECOND = 1.0
TURNED_DOWN = 503


class Part(msgspec.Struct, frozen=True):
    """What every part needs."""

    arguments: argparse.Namespace
    folder: Path

    def fresh(self, name: str) -> Path:
        """A folder of its own."""
        place = self.folder / name
        place.mkdir(mode=0o755)
        return place

    def model(self, name: str) -> Model:
        """The model, its file where all parts find it."""
        return models.model(self.folder, name)


def capacity_of(part: Part, target: calls.Target, replicas: int) -> float:
    """Requests by second with callers enough to keep every replica busy: the median of three measurements."""
    plan = load.Plan([target.call], CAPACITY_CALLERS * replicas, CAPACITY_S)
    return statistics.median(load.driven(plan, part.folder).per_second for _ in range(3))


def quantiles(latency_ms: np.ndarray) -> dict[str, float]:
    """As far as there are any."""
    if not len(latency_ms):
        return {}
    found = np.percentile(latency_ms, [50, 99, 99.9])
    return {name: round(float(value), 2) for name, value in zip(("p50_ms", "p99_ms", "p999_ms"), found, strict=True)}


def counts(told: load.Told, deadline_ms: float, which: np.ndarray | None = None) -> dict[str, object]:
    """What became of requests: answered in time, late (counted from when they were sent), turned down, failed in any other way.

    ``client_lag_p99_ms`` is how much later than intended the client itself sent them: what it is to blame for.
    """
    chosen = np.ones(len(told.status), bool) if which is None else which
    took_ms = (told.done_s - told.sent_s) * 1000
    good = told.good & chosen
    in_time = good & (took_ms <= deadline_ms)
    return {
        "requests": int(chosen.sum()), "in_time": int(in_time.sum()), "late": int((good & ~in_time).sum()),
        "turned_down": int((chosen & (told.status == TURNED_DOWN)).sum()),
        "failed": int((chosen & ~told.good & (told.status != TURNED_DOWN)).sum()), **quantiles(told.latency_ms[good]),
        "client_lag_p99_ms": round(float(np.percentile(told.sent_s - told.intended_s, 99)) * 1000, 2),
    }  # fmt: skip


def steady(part: Part) -> None:
    """The time from arrival to answer at 60 % load."""
    for name in (part.arguments.model, models.STEPS):
        model, folder = part.model(name), part.fresh(f"steady-{name}")
        alone_ms = statistics.median(load.timed(models.bare(model), 100))
        driver = driver_called("bubblewrap", folder)
        with boxes.box(folder, driver, [model], replicas=part.arguments.replicas) as box:
            target = calls.binary(box.gateway.address, model)
            capacity = capacity_of(part, target, part.arguments.replicas)
            plan = load.Plan([target.call], 64, part.arguments.seconds, rate_per_s=STEADY_LOAD * capacity)
            told = load.driven(plan, part.folder)
        found = counts(told, LONG_DEADLINE_MS)
        report(
            "deadline", part="steady", model=name, replicas=part.arguments.replicas, bare_p50_ms=round(alone_ms, 2),
            capacity_per_s=round(capacity, 1), load=STEADY_LOAD, **found, client_cpu_s=round(told.cpu_s, 2), bar_p99_ms=STEADY_P99_MS,
            reached=found["failed"] == found["turned_down"] == 0 and float(str(found.get("p99_ms", np.inf))) <= STEADY_P99_MS,
        )  # fmt: skip


def kill(part: Part) -> None:
    """A replica is killed under load; its warden starts another."""
    model, folder = part.model(part.arguments.model), part.fresh("kill")
    template = part.fresh("template")
    tiny = part.model("tiny")
    with boxes.box(template, driver_called("bubblewrap", template), [tiny], replicas=1):
        sandboxes.run(lambda: _kill(part, model, folder, template))


async def _kill(part: Part, model: Model, folder: Path, template: Path) -> None:
    arguments = part.arguments
    warden = sandboxes.Box(folder / "box", "bubblewrap", model=sandboxes.reference(model.name, model.file), file=model.file)
    async with sandboxes.running(warden):
        warden.want(arguments.replicas)
        await warden.sockets(arguments.replicas)
        with boxes.further_gateway(template, "kill", warden.config.routes_file) as gateway:
            target = calls.binary(gateway.address, model)
            await asyncio.to_thread(boxes.wait_until_right, target)
            capacity = await asyncio.to_thread(capacity_of, part, target, arguments.replicas)
            plan = load.Plan([target.call], 128, arguments.seconds, rate_per_s=KILL_LOAD * capacity)
            with load.Driven(plan, part.folder) as client:
                await asyncio.sleep(arguments.seconds / 2)
                victim = sorted(warden.slots.all())[0]
                os.kill(boxes.worker_pid(warden.config.state_dir / "bubblewrap", victim), signal.SIGKILL)
                killed_s = time.monotonic()
                await warden.sockets(arguments.replicas - 1)
                await warden.sockets(arguments.replicas)
                back_s = time.monotonic() - killed_s
                told = await asyncio.to_thread(client.told)
    after = (told.intended_s >= killed_s) & (told.intended_s < killed_s + SECOND)
    before = told.intended_s < killed_s
    lost = int(np.count_nonzero(~told.good))
    report(
        "deadline", part="kill", model=model.name, replicas=arguments.replicas, capacity_per_s=round(capacity, 1), load=KILL_LOAD,
        restarted_after_s=round(back_s, 2), all=counts(told, LONG_DEADLINE_MS), before=quantiles(told.latency_ms[before & told.good]),
        following_second=counts(told, LONG_DEADLINE_MS, after), not_answered=lost, bar_not_answered=0, reached=lost == 0,
    )  # fmt: skip


def overload(part: Part) -> None:
    """Five times as much as can be done, with a deadline on each and two priorities."""
    model, folder = part.model(part.arguments.overload_model), part.fresh("overload")
    deadline_ms, share = part.arguments.deadline_ms, part.arguments.high_share
    with boxes.box(folder, driver_called("bubblewrap", folder), [model], replicas=part.arguments.replicas) as box:
        address = box.gateway.address
        capacity = capacity_of(part, calls.binary(address, model), part.arguments.replicas)
        high, low = (calls.binary(address, model, timeout_us=int(deadline_ms * 1000), priority=p).call for p in (HIGH, LOW))
        weights = [share * capacity, (OVERLOAD - share) * capacity]
        plan = load.Plan([high, low], 400, part.arguments.seconds, weights=weights, rate_per_s=OVERLOAD * capacity)
        before_s = boxes.cpu_s(box.gateway.pid)
        told = load.driven(plan, part.folder)
        front_s = boxes.cpu_s(box.gateway.pid) - before_s
        late_by_gateway = sum(one.late for one in boxes.totals(box.gateway).deployments)
    all_of, highs = counts(told, deadline_ms), counts(told, deadline_ms, told.kind == 0)
    goodput = int(str(all_of["in_time"])) / part.arguments.seconds
    bars = {
        "goodput": goodput >= GOODPUT_SHARE * capacity,
        "none_late": all_of["late"] == 0,
        "high_untouched": highs["in_time"] == highs["requests"],
    }
    report(
        "deadline", part="overload", model=model.name, replicas=part.arguments.replicas, capacity_per_s=round(capacity, 1), load=OVERLOAD,
        deadline_ms=deadline_ms, high_share_of_capacity=share, goodput_per_s=round(goodput, 1), goodput_share=round(goodput / capacity, 3),
        bar_goodput_share=GOODPUT_SHARE, all=all_of, high=highs, low=counts(told, deadline_ms, told.kind == 1),
        late_by_gateway=late_by_gateway, client_cpu_s=round(told.cpu_s, 2), gateway_cpu_s=round(front_s, 2), bars=bars,
        reached=all(bars.values()),
    )  # fmt: skip


def link_of(arguments: argparse.Namespace) -> tuple[str, link.Link]:
    """The trace that was asked for, else a generated one, and a name for it."""
    seconds = int(arguments.link_seconds) + 5
    if arguments.trace is None:
        return f"generated, seed {arguments.seed}", link.Link(link.made(seconds, arguments.seed), arguments.one_way_ms)
    name, rates = link.recorded(arguments.trace, arguments.trace_name, seconds)
    rates = link.with_outages(rates, arguments.seed) if arguments.outages else rates
    return f"{arguments.trace.name}: {name}", link.Link(rates, arguments.one_way_ms)


def over_link(part: Part) -> None:
    """An edge box with too much to do, its cloud behind a bad link."""
    arguments = part.arguments
    model, folder = part.model(arguments.link_model), part.fresh("link")
    name, road = link_of(arguments)
    with boxes.box(folder, driver_called("bubblewrap", folder), [model], replicas=2) as box, contextlib.ExitStack() as stack:
        (usual,) = boxes.usual_routes(box)
        here, there = ([replica] for replica in box.replicas[model.name])
        cloud = [msgspec.structs.replace(usual, replicas=there)]
        far = stack.enter_context(boxes.further_gateway(folder, "cloud", cloud, node="bench-cloud", tier="cloud"))
        boxes.wait_until_right(calls.binary(far.address, model))
        with boxes.further_gateway(folder, "measured", [msgspec.structs.replace(usual, replicas=here)]) as gateway:
            boxes.wait_until_right(calls.binary(gateway.address, model))
            capacity = capacity_of(part, calls.binary(gateway.address, model), 1)
        for share in arguments.link_load:

            def alone(name: str, share: float = share) -> load.Told:
                route = msgspec.structs.replace(usual, replicas=here)
                with boxes.further_gateway(folder, f"{name}-{share}", [route], node="bench-alone") as gateway:
                    return _arrivals(part, gateway, model, share * capacity)

            first = alone("before")
            with link.running(road, to=int(far.address.rpartition(":")[2]), folder=folder) as port:
                upstream = Upstream("bench-cloud", f"http://127.0.0.1:{port}", "cloud")
                route: Route = msgspec.structs.replace(usual, replicas=here, upstreams=[upstream], split="overflow")
                with boxes.further_gateway(folder, f"edge-{share}", [route], node="bench-edge") as gateway:
                    both = _arrivals(part, gateway, model, share * capacity)
                    (seen,) = boxes.totals(gateway).deployments
            served = {"edge": seen.edge, "cloud": seen.cloud, "late_by_gateway": seen.late}
            report(
                "deadline", part="link", model=arguments.link_model, link=name, link_mean_mbps=round(statistics.mean(road.mbps), 1),
                link_down_s=road.down_s, one_way_ms=road.one_way_ms, capacity_alone_per_s=round(capacity, 1), load=share, served=served,
                **compared(both, [first, alone("after")], arguments.link_deadline_ms),
            )  # fmt: skip


def _arrivals(part: Part, gateway: boxes.Gateway, model: Model, rate: float) -> load.Told:
    """The same arrivals each time."""
    boxes.wait_until_right(calls.binary(gateway.address, model))
    arguments = part.arguments
    target = calls.binary(gateway.address, model, timeout_us=int(arguments.link_deadline_ms * 1000))
    plan = load.Plan([target.call], 300, arguments.link_seconds, rate_per_s=rate, seed=arguments.seed)
    return load.driven(plan, part.folder)


def made_in_time(told: load.Told, deadline_ms: float) -> np.ndarray:
    """By request, in the order of arrival."""
    order = np.argsort(told.intended_s, kind="stable")
    return (told.good & ((told.done_s - told.sent_s) * 1000 <= deadline_ms))[order]


def compared(both: load.Told, alone: list[load.Told], deadline_ms: float) -> dict[str, object]:
    """What the cloud did to requests that the box alone made in time in each of its runs."""
    sure = np.logical_and.reduce([made_in_time(one, deadline_ms) for one in alone])
    turned_down = both.status[np.argsort(both.intended_s, kind="stable")] == TURNED_DOWN
    worse = int(np.count_nonzero(sure & ~made_in_time(both, deadline_ms) & ~turned_down))
    return {
        "deadline_ms": deadline_ms, "alone": [counts(one, deadline_ms) for one in alone], "with_cloud": counts(both, deadline_ms),
        "turned_down_that_alone_made": int(np.count_nonzero(sure & turned_down)), "past_deadline_that_alone_made": worse,
        "bar_past_deadline_that_alone_made": 0, "reached": worse == 0,
    }  # fmt: skip


PARTS: dict[str, Callable[[Part], None]] = {"steady": steady, "kill": kill, "overload": overload, "link": over_link}


def parsed() -> argparse.Namespace:
    """The command line."""
    names = [*models.NAMES, models.STEPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=names, default="shufflenet", help="of steady and kill; steady takes 'steps' too")
    parser.add_argument("--overload-model", choices=names, default=models.STEPS)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part but link")
    parser.add_argument("--deadline-ms", type=float, default=50.0, help="under overload")
    parser.add_argument("--high-share", type=float, default=0.3, help="high priority's arrivals, as a share of the capacity")
    parser.add_argument("--link-model", choices=names, default=models.STEPS)
    parser.add_argument("--link-seconds", type=float, default=40.0, help="of each of three runs, for each load")
    parser.add_argument("--link-load", type=float, nargs="+", default=[0.8, 1.2], help="as shares of what the edge box alone can do")
    parser.add_argument("--link-deadline-ms", type=float, default=120.0)
    parser.add_argument("--one-way-ms", type=float, default=15.0)
    parser.add_argument("--trace", type=Path, help="a csv.gz with the columns trace, t_s, mbps; else one is generated")
    parser.add_argument("--trace-name", default="", help="which of the file's traces; the longest where none is named")
    parser.add_argument("--outages", action="store_true", help="put generated outages into the trace")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parsed()
    boxes.end_orderly()
    ort.disable_telemetry_events()
    folder = Path(tempfile.mkdtemp(prefix="sk-"))
    folder.chmod(0o755)
    try:
        for name in arguments.parts:
            PARTS[name](Part(arguments, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

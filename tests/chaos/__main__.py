"""One chaos run: a real fleet, load on it all the time, and what a seed has in store for it.

``python -m tests.chaos [--seed N] [--seconds S] [--kinds KIND ...] [--keep DIR]``

As root. Ends with a line of JSON; status 1 where a promise was broken, and then the logs are kept. The same seed is the same schedule.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec
import onnx
import uvloop

from sim import checker, faults
from tests.chaos.callers import FACTORS, Callers
from tests.chaos.ground import Ground
from tests.chaos.machine import absent
from tests.chaos.wire import leave_for_own_namespaces
from tests.conftest import scaling

SETTLE_S = 45.0
STAYS_S = 3.0
PER_SECOND = 4.0
RECOVERY_S = {
    "gateway": 6.0, "memory": 8.0, "reboot": 15.0, "disk_read_only": 15.0,
    "cut": 4.0, "loss": 4.0, "latency": 6.0, "slow": 6.0, "one_way": 4.0,
}  # fmt: skip
"""How long a box may take, once it is over, to answer as before. What is not here must cost no answer."""


async def befall_all(ground: Ground, schedule: list[faults.Fault], began_s: float) -> list[faults.Fault]:
    """All of it in its time; as it happened, in seconds since ``began_s``."""
    happened: list[faults.Fault] = []

    async def one(fault: faults.Fault) -> None:
        await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
        at_s = time.monotonic() - began_s
        sys.stderr.write(f"{at_s:6.1f} s  {fault.box or 'centre':8} {fault.kind} {fault.part} for {fault.lasts_s:.1f} s\n")
        await ground.befall(fault)
        happened.append(msgspec.structs.replace(fault, at_s=at_s, lasts_s=time.monotonic() - began_s - at_s))

    async with asyncio.TaskGroup() as tasks:
        for fault in schedule:
            tasks.create_task(one(fault), name=fault.kind)
    return happened


async def settle(ground: Ground) -> tuple[float, list[str]]:
    """Wait until all is as it was told last and nothing is on its way, and stays so; how long that took, and what still was not so."""
    began_s = since_s = time.monotonic()
    wrong = ["nothing was heard"]
    while time.monotonic() - began_s < SETTLE_S:
        try:
            wrong = checker.unconverged(await ground.states()) + await ground.unsettled()
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as exc:
            wrong = [f"the coordinator: {exc}"]
        if wrong:
            since_s = time.monotonic()
        elif time.monotonic() - since_s > STAYS_S:
            return since_s - began_s, []
        await asyncio.sleep(0.3)
    return SETTLE_S, wrong


async def chaos(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The whole run."""
    versions = []
    for factor in FACTORS:
        versions.append(folder / f"scale-{factor:.0f}.onnx")
        onnx.save(scaling(factor), versions[-1])
    ground = Ground(folder, seed=arguments.seed)
    schedule = faults.schedule(
        arguments.seed, boxes=[box.name for box in ground.boxes], seconds=arguments.seconds, kinds=tuple(arguments.kinds)
    )
    callers: list[Callers] = []
    wrong: list[str] = []
    try:
        await ground.start(versions)
        began_s = time.monotonic()
        targets = [(box.name, [box], box.network) for box in ground.boxes if box.tier == "edge"] + [("afar", ground.boxes, 0)]
        for name, boxes, network in targets:
            callers.append(Callers(name, boxes, began_s=began_s, network=network, per_second=PER_SECOND, seed=arguments.seed))
            callers[-1].start()
        changing = asyncio.create_task(ground.change_now_and_then(began_s + arguments.seconds), name="operator")
        happened = await befall_all(ground, schedule, began_s)
        await changing
        settled_s, unconverged = await settle(ground)
        for one in callers:
            await asyncio.to_thread(one.end)
        if not unconverged:
            _, unconverged = await settle(ground)  # without load: nothing more is on its way
        lost = await ground.lost() if not unconverged else {}
        if unconverged:
            for box in ground.boxes:
                for path in (box.disk / "agent").glob("outbox.db*"):
                    shutil.copy(path, box.folder / "log")
        kept, arrived = ground.kept(), ground.arrived()
    finally:
        for one in callers:
            one.end()
        wrong += await ground.stop()
    asked = [request for one in callers for request in one.asked]
    away = checker.disturbances(happened, RECOVERY_S)
    wrong += checker.unanswered(asked, away) + checker.events_wrong(kept, arrived, lost=lost) + unconverged
    return {
        "chaos": "run", "seed": arguments.seed, "seconds": arguments.seconds, "faults": dict(Counter(fault.kind for fault in happened)),
        "requests": len(asked), "unanswered": sum(not request.is_answered for request in asked),
        "events_kept": len(kept), "events_in_registry": len(arrived), "given_up": sum(lost.values()), "changes": ground.changes,
        "restarts": sum(program.starts - 1 for box in ground.boxes for program in box.programs.values()),
        "by_watchdog": sum(program.fed_to_death for box in ground.boxes for program in box.programs.values()),
        "settled_s": round(settled_s, 1), "wrong": wrong[:40],
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long things befall the fleet")
    parser.add_argument(
        "--kinds", nargs="+", choices=faults.KINDS, default=list(faults.KINDS), metavar="KIND", help=", ".join(faults.KINDS)
    )
    parser.add_argument("--keep", type=Path, help="copy all logs and settings there at the end")
    arguments = parser.parse_args()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    reason = absent()
    if reason:
        parser.error(reason)
    leave_for_own_namespaces()
    folder = Path(tempfile.mkdtemp(prefix="sk-", dir="/tmp"))
    report: dict[str, object] = {"wrong": ["it did not come to its end"]}
    try:
        report = uvloop.run(chaos(arguments, folder))
    finally:
        keep = arguments.keep or (Path(tempfile.mkdtemp(prefix="skerry-chaos-", dir="/tmp")) if report["wrong"] else None)
        if keep is not None:
            shutil.copytree(
                folder, keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("disk", "disk.img", "*.sock", "*.notify", "run")
            )
            sys.stderr.write(f"logs: {keep}\n")
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    sys.stdout.flush()
    os._exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    main()

"""What a box costs that does nothing: its three programs' memory and processor time, at the pace of a fleet and not of a demo.

``python -m bench.idle_box [--warm-up S] [--seconds S] [--driver bubblewrap|docker]``

Memory is the proportional set size: what only this program holds, and its share of what it holds with others. Other programs of
the same interpreter on this machine, the coordinator among them, take a share too that on a box of its own would be the box's:
``rss_mb``, which counts what is shared in full for each program, is the bound from above.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

import aiohttp
import msgspec

from bench.report import report
from sim.ground import run, standing, until
from skerry.wire.api import NodeView

PROGRAMS = ("agent", "warden", "gateway")
BAR_PSS_MB = 120.0
BAR_CPU_SHARE = 0.01
LOOK_EVERY_S = 5.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> tuple[float, float]:
    """Proportional and resident set size of a process, in 10**6 bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {fields[0]: int(fields[1]) for fields in lines}
    return kib["Pss:"] * 1024 / 1e6, kib["Rss:"] * 1024 / 1e6


def cpu_s(pid: int) -> float:
    """Processor time of a process and of its children that ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Warm up, then look every LOOK_EVERY_S."""
    async with (
        standing(boxes=1, drivers=[arguments.driver]) as ground,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
    ):
        box = ground.boxes[0].name

        async def is_up() -> bool:
            nodes = await ground.call(session, "GET", "/v1/nodes", list[NodeView])
            return any(node.id == box and node.state == "online" and node.rungs for node in nodes)

        await until(is_up, within_s=60, what="the box is online with a sandbox that works")
        await asyncio.sleep(arguments.warm_up)
        pids = {program: ground.pid(f"{box}.{program}") for program in PROGRAMS}
        before_s = {program: cpu_s(pid) for program, pid in pids.items()}
        started = time.monotonic()
        looks: list[dict[str, tuple[float, float]]] = []
        while time.monotonic() - started < arguments.seconds:
            await asyncio.sleep(min(LOOK_EVERY_S, arguments.seconds))
            looks.append({program: memory_mb(pid) for program, pid in pids.items()})
        window_s = time.monotonic() - started
        share = {program: (cpu_s(pid) - before_s[program]) / window_s for program, pid in pids.items()}
    each = {
        program: {
            "pss_mb": round(statistics.median(look[program][0] for look in looks), 1),
            "rss_mb": round(statistics.median(look[program][1] for look in looks), 1),
            "cpu_share": round(share[program], 5),
        }
        for program in PROGRAMS
    }
    pss_mb = statistics.median(sum(pss for pss, _ in look.values()) for look in looks)
    rss_mb = statistics.median(sum(rss for _, rss in look.values()) for look in looks)
    return {
        "driver": arguments.driver,
        "window_s": round(window_s, 1),
        "looks": len(looks),
        **each,
        "pss_mb": round(pss_mb, 1),
        "rss_mb": round(rss_mb, 1),
        "bar_pss_mb": BAR_PSS_MB,
        "reached_pss": pss_mb <= BAR_PSS_MB,
        "cpu_share_of_one_core": round(sum(share.values()), 5),
        "bar_cpu_share": BAR_CPU_SHARE,
        "reached_cpu": sum(share.values()) <= BAR_CPU_SHARE,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds after the box is online")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--driver", choices=["bubblewrap", "docker"], default="bubblewrap")
    arguments = parser.parse_args()
    report("idle_box", **msgspec.to_builtins(run(lambda: measure(arguments))))


if __name__ == "__main__":
    main()

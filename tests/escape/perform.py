"""Runs every attempt on a rung and keeps what came out. One sandbox takes all that leave it whole; each of the others gets its own."""

import asyncio
import functools
import tempfile
import time
from pathlib import Path

import msgspec

from edge_agent.warden.ports import DriverFailed
from tests.escape import dealings, scenes
from tests.escape.inside import exhaustion, filesystem, kernel, network, processes
from tests.escape.inside.verdict import ATTEMPTS as QUIET
from tests.escape.inside.verdict import Attempt, Verdict
from tests.escape.stage import PIDS_MAX, Stage

SUBJECTS = (network, filesystem, kernel, processes, exhaustion)
QUIET_TIMEOUT_S = 100.0
BOX = dealings.BOX
ATTEMPTS: dict[str, Attempt] = QUIET | {name: attempt for name, (attempt, _) in scenes.SCENES.items()} | dealings.ATTEMPTS
"""All that are made on each rung."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of an attempt. ``broken`` says why nothing is known; then ``held`` says nothing."""

    held: bool
    how: str
    broken: str = ""


class Climb(msgspec.Struct, frozen=True):
    """One rung's outcomes, by attempt, and under which conditions: what its driver holds resources with, and "unfiltered" where a
    sandbox ran without a filter of system calls."""

    outcomes: dict[str, Outcome]
    conditions: frozenset[str]
    took_s: float


def _outcome(line: dict[str, object]) -> Outcome:
    broken = str(line.get("broken", ""))
    return Outcome(bool(line.get("held")), str(line.get("how", "")), broken)


async def _quiet(stage: Stage) -> tuple[dict[str, Outcome], bool]:
    """All attempts that leave a sandbox whole, in one, and whether it ran under a filter of system calls."""
    async with stage.sandbox("quiet", "attempts", *QUIET, pids_max=PIDS_MAX):
        lines = await stage.wait_said("quiet", "done", within_s=QUIET_TIMEOUT_S)
        ended = await stage.ended("quiet")
        said = {str(line["attempt"]): _outcome(line) for line in lines if "attempt" in line}
        for name, look in scenes.AFTERMATH.items():
            trouble = look(stage)
            if trouble and name in said:
                said[name] = Outcome(held=False, how=trouble)
    missing = Outcome(held=False, how="", broken=f"no verdict; the sandbox: {ended or 'runs on'}"[:300])
    return {name: said.get(name, missing) for name in QUIET}, any(line.get("filtered") for line in lines)


async def _scenes(stage: Stage) -> dict[str, Outcome]:
    found = {}
    for name, (_, play) in scenes.SCENES.items():
        try:
            found[name] = _of(await play(stage))
        except (scenes.Broken, DriverFailed, OSError) as exc:
            found[name] = _of(exc)
    return found


def _of(result: Verdict | Exception) -> Outcome:
    if isinstance(result, Exception):
        return Outcome(held=False, how="", broken=f"{type(result).__name__}: {result}"[:300])
    return Outcome(result.held, result.how)


async def _climb(rung: str) -> Climb:
    began = time.monotonic()
    async with Stage(rung) as stage:
        async with stage.sandbox("neighbour", "neighbour"):
            await stage.wait_said("neighbour", "ready")
            found, filtered = await _quiet(stage)
            found |= {name: _of(result) for name, result in (await dealings.deal(stage)).items()}
        found |= await _scenes(stage)
        conditions = frozenset({stage.driver.limits} if filtered else {stage.driver.limits, "unfiltered"})
        return Climb(found, conditions, time.monotonic() - began)


@functools.cache
def climb(rung: str) -> Climb:
    """All attempts on ``rung``; made once."""
    return asyncio.run(_climb(rung))


def on_the_box(name: str) -> Outcome:
    """An attempt that has no rung: it is made against the box's own code."""
    with tempfile.TemporaryDirectory() as folder:
        return _of(dealings.BOX[name](Path(folder)))

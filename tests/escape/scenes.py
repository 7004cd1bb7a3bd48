"""Attempts that need a sandbox of their own, or a look from outside: what they use up, and whether they can be ended."""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from edge_agent.warden.drivers.docker import GVISOR_PIDS
from edge_agent.warden.reconcile import STEADY_POLL_S
from tests.escape import rungs
from tests.escape.inside.verdict import Attempt, Verdict
from tests.escape.stage import PIDS_MAX, Stage

MIB = 2**20
SMALL_BYTES = 256 * MIB
SLACK_MIB = 64
LOG_BYTES = 1 * MIB
OWN_PROCESSES = 4
"""What a driver itself keeps in a sandbox."""
GRACE_S = 1.0

Scene = Callable[[Stage], Awaitable[Verdict]]
SCENES: dict[str, tuple[Attempt, Scene]] = {}


def scene(group: str) -> Callable[[Scene], Scene]:
    """Register a scene as an attempt, named for itself."""

    def register(play: Scene) -> Scene:
        name = play.__name__.replace("_", "-")
        SCENES[name] = (Attempt(name, group, (play.__doc__ or "").splitlines()[0], _elsewhere, killed_ok=False), play)
        return play

    return register


def _elsewhere(_: object) -> Verdict:
    raise AssertionError("this attempt is judged from outside")


class Broken(Exception):
    """The attempt did not get as far as to try anything."""


def _number(lines: list[dict[str, object]], key: str) -> int:
    return max((int(str(line[key])) for line in lines if key in line), default=0)


@scene("exhaustion")
async def fork_bomb(stage: Stage) -> Verdict:
    """Forks without end in every process; held where the machine's processes stay bounded and it can go on."""
    peak = 0
    async with stage.sandbox("bomb", "fork-bomb") as spec:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not any("forks" in line for line in await stage.said("bomb")):
            peak = max(peak, rungs.processes(stage.rung, stage.run_dir, "bomb"))
            subprocess.run(["/bin/true"], check=True)  # noqa: ASYNC221 - that it can be started at once is the point
            if await stage.ended("bomb") is not None:
                break
            await asyncio.sleep(0.05)
        forks, ended = _number(await stage.said("bomb"), "forks"), await stage.ended("bomb")
    if not forks and ended is None:
        raise Broken("the bomb said nothing")
    allowed = spec.pids_max + (GVISOR_PIDS if stage.rung == "gvisor" else 0)
    return Verdict(0 < peak <= allowed + OWN_PROCESSES, f"at most {peak} processes on the host, {allowed} are allowed")


async def _memory(stage: Stage, program: str) -> Verdict:
    """Held where the program got no more than its limit and a little, whatever ended it."""
    async with stage.sandbox("bomb", program, memory_bytes=SMALL_BYTES, pids_max=PIDS_MAX):
        lines = await stage.wait_said("bomb", "refused", within_s=30)
        ended = await stage.ended("bomb")
    mib, allowed = _number(lines, "mib"), SMALL_BYTES // MIB
    if not any("mib" in line for line in lines):
        raise Broken(f"the bomb said nothing: {ended}")
    refused = next((str(line["refused"]) for line in lines if line.get("refused")), "")
    end = refused or (ended if ended and "memory" in ended.lower() else "killed" if ended else "no end")
    return Verdict(mib <= allowed + SLACK_MIB, f"{end[:60]} after {mib} MiB of {allowed}")


@scene("exhaustion")
async def memory_bomb(stage: Stage) -> Verdict:
    """Touches memory without end in one process; held where it gets no more than it may."""
    return await _memory(stage, "memory-bomb")


@scene("exhaustion")
async def memory_bomb_of_many(stage: Stage) -> Verdict:
    """Touches memory in eight processes, each below the limit; held where they get no more together."""
    return await _memory(stage, "memory-bomb-of-many")


@scene("exhaustion")
async def memory_files(stage: Stage) -> Verdict:
    """Keeps memory in files without a name (memfd); held where they count like other memory."""
    return await _memory(stage, "memory-files")


@scene("exhaustion")
async def zombies(stage: Stage) -> Verdict:
    """Makes processes that end and are never waited for; held where it is refused them, or ends of it, and the host's stay bounded."""
    peak = 0
    async with stage.sandbox("zombies", "zombies") as spec:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and await stage.ended("zombies") is None:
            peak = max(peak, rungs.processes(stage.rung, stage.run_dir, "zombies"))
            await asyncio.sleep(0.05)
        lines, ended = await stage.said("zombies"), await stage.ended("zombies")
    made = _number(lines, "made")
    if not made:
        raise Broken(f"it said nothing: {ended}")
    reason = next((str(line["refused"]) for line in lines if line.get("refused")), "the sandbox ended" if ended else "")
    is_bounded = peak <= spec.pids_max + (GVISOR_PIDS if stage.rung == "gvisor" else OWN_PROCESSES)
    if stage.rung == "gvisor" and not reason:  # its kernel keeps what has ended, in the memory that it may have: the host has none of it
        return Verdict(is_bounded, f"{made} of gVisor's own, at most {peak} processes on the host")
    return Verdict(bool(reason) and made <= spec.pids_max and is_bounded, f"{reason or 'no end'} after {made} processes")


@scene("exhaustion")
async def many_files_in_the_socket_directory(stage: Stage) -> Verdict:
    """Writes files, each within the bound of one, into the socket directory; held where the warden ends it at its next look."""
    async with stage.sandbox("filler", "many-files"):
        await stage.wait_said("filler", "ready")
        await asyncio.sleep(STEADY_POLL_S)  # what it gets done between two looks
        excess = stage.slots.overfull("filler")
        mib = sum(file.stat().st_blocks for file in stage.socket_dir("filler").iterdir()) * 512 // MIB
        await stage.driver.stop("filler", grace_s=0)
        stage.slots.close("filler")
        left = stage.socket_dir("filler").exists()
    if not mib:
        raise Broken("it wrote nothing")
    return Verdict(
        bool(excess) and not left, f"{'ended' if excess else 'unnoticed'} at the next look, with {mib} MiB on the disk until then"
    )


@scene("exhaustion")
async def deep_folders_in_the_socket_directory(stage: Stage) -> Verdict:
    """Makes folders in folders, deeper than a recursion goes; held where the warden can look at them and get rid of them."""
    async with stage.sandbox("deep", "deep-folders"):
        lines = await stage.wait_said("deep", "ready")
        if not any("ready" in line for line in lines):
            raise Broken(f"it said nothing: {await stage.ended('deep')}")
        made, refused = _number(lines, "made"), next((str(line["refused"]) for line in lines if line.get("refused")), "")
        try:
            excess = stage.slots.overfull("deep")
            await stage.driver.stop("deep", grace_s=0)
            stage.slots.close("deep")
        except (OSError, RecursionError) as exc:
            return Verdict(False, f"{type(exc).__name__} in the warden at {made} folders")
        left = stage.socket_dir("deep").exists()
    if made < 1000 and refused:
        return Verdict(True, f"{refused} after {made} folders")
    return Verdict(
        bool(excess) and not left, f"{made} folders, {'some are left' if left else 'noticed and gone' if excess else 'unnoticed'}"
    )


@scene("exhaustion")
async def log_flood(stage: Stage) -> Verdict:
    """Writes 24 MiB to its output; held where the log keeps to its bound after each look of the warden, and to a file's bound between."""
    most = settled = 0
    async with stage.sandbox("flood", "log-flood", log_max_bytes=LOG_BYTES, file_max_bytes=4 * LOG_BYTES):
        deadline = time.monotonic() + 30
        over = False
        while time.monotonic() < deadline and not over:
            for _ in range(20):
                most = max(most, rungs.log_bytes(stage.rung, stage.run_dir, "flood"))
                await asyncio.sleep(0.02)
            over = await stage.ended("flood") is not None  # this is the look
            settled = rungs.log_bytes(stage.rung, stage.run_dir, "flood")
    if not most:
        raise Broken("there is no log")
    held = settled <= 2 * LOG_BYTES and most <= 5 * LOG_BYTES
    return Verdict(held, f"{settled / MIB:.1f} MiB of {LOG_BYTES / MIB:.0f} allowed, {most / MIB:.1f} between two looks")


@scene("exhaustion")
async def processor_hog(stage: Stage) -> Verdict:
    """Computes in two processes; held where they get no more processor time than half a core has."""
    cpus, measured_s = 0.5, 3.0

    async def used_s() -> float:
        """What the host counts; without a control group it knows of some processes only, and they say it themselves."""
        usage = await stage.driver.stats("hog")
        if usage is None or stage.driver.limits == "rlimits":
            return _number(await stage.said("hog"), "cpu_ms") / 1000
        return usage.cpu_seconds

    async with stage.sandbox("hog", "cpu-hog", cpus=cpus):
        if not any("cpu_ms" in line for line in await stage.wait_said("hog", "cpu_ms")):
            raise Broken(f"the hog said nothing: {await stage.ended('hog')}")
        began, before = time.monotonic(), await used_s()
        await asyncio.sleep(measured_s)
        used = (await used_s() - before) / (time.monotonic() - began)
    how = f"{used:.1f} cores used, {cpus} allowed"
    if stage.driver.limits == "rlimits":  # a busy machine gives it little; nothing else does
        return Verdict(False, f"{how}; niceness alone holds it")
    return Verdict(used <= cpus * 1.4, how)


@scene("ending")
async def ignored_signals(stage: Stage) -> Verdict:
    """Ignores every signal; held where a stop ends it soon after its grace."""
    async with stage.sandbox("stubborn", "ignored-signals"):
        if not any("ready" in line for line in await stage.wait_said("stubborn", "ready")):
            raise Broken(f"it said nothing: {await stage.ended('stubborn')}")
        began = time.monotonic()
        await stage.driver.stop("stubborn", grace_s=GRACE_S)
        took_s = time.monotonic() - began
        left = [sandbox.name for sandbox in await stage.driver.sandboxes()]
    held = took_s < GRACE_S + 3 and "stubborn" not in left
    return Verdict(held, "killed when its grace was over" if held else f"took {took_s:.1f} s")


@scene("ending")
async def daemon(stage: Stage) -> Verdict:
    """Leaves a process behind in a session of its own; held where a stop leaves none of it."""
    beat = stage.socket_dir("daemon") / "beat"
    async with stage.sandbox("daemon", "daemon"):
        if not any("ready" in line for line in await stage.wait_said("daemon", "ready")):
            raise Broken(f"it said nothing: {await stage.ended('daemon')}")
        deadline = time.monotonic() + 10
        while not beat.exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if not beat.exists():
            raise Broken("the daemon never came up")
        await stage.driver.stop("daemon", grace_s=GRACE_S)
        last = beat.read_text() if beat.exists() else ""
        await asyncio.sleep(0.5)
        alive = beat.exists() and beat.read_text() != last
    return Verdict(not alive, "it writes on after the stop" if alive else "ended with its sandbox")


def _setuid_owner(stage: Stage) -> str:
    path = stage.socket_dir("quiet") / "setuid"
    if not path.exists():
        return ""
    found = path.stat()
    return "the file is setuid and root's outside" if found.st_mode & 0o4000 and found.st_uid == 0 else ""


AFTERMATH: dict[str, Callable[[Stage], str]] = {
    "signal-a-process": lambda stage: "" if stage.victim_lives() else "the process outside is gone",
    "making-a-setuid-file": _setuid_owner,
    "write-to-a-neighbours-socket-directory": lambda stage: _stray(stage.socket_dir("neighbour")),
}
"""What is looked at outside once the attempts are over: why one was not held, whatever it says itself; empty where it was."""


def _stray(folder: Path) -> str:
    strange = {path.name for path in folder.iterdir()} - {"worker.sock"}
    return "a strange file lies in the neighbour's directory" if strange else ""

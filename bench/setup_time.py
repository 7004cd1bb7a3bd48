"""How long a person waits who clones the repository and runs ``make demo``: until the demo starts, and in all.

``python -m bench.setup_time [--no-pip-cache] [--seconds N]``

HEAD is cloned: what is not committed does not take part. How much pip's cache held before and after says what was downloaded.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from bench.report import report
from sim.ground import run
from skerry.demo.fleet import Fleet, left_behind

BAR_S = 240.0
START_LINE = "state:"
"""What the demo says first, once everything is installed."""
MOST_S = 1800.0
END_WITHIN_S = 40.0
ROOT = Path(__file__).resolve().parents[1]


def pip_cache_mb(environment: dict[str, str]) -> float:
    """What lies in pip's cache, in 10**6 bytes; 0 without one."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    folder = Path(asked.stdout.strip() or "/nonexistent")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6 if folder.is_dir() else 0.0


def environment_of(arguments: argparse.Namespace) -> dict[str, str]:
    """A fresh shell's, as far as Python is concerned."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PIP_NO_CACHE_DIR", "PYTHONPATH")}
    if arguments.no_pip_cache:
        environment["PIP_NO_CACHE_DIR"] = "1"
    return environment


async def end(process: asyncio.subprocess.Process) -> None:
    """Make the demo take everything down, then whatever is left of the group that it started in."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_WITHIN_S)


async def make_demo(clone: Path, seconds: int, environment: dict[str, str]) -> dict[str, object]:
    """Run it there; what it says is passed on to standard error."""
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        "make", "demo", f"SECONDS={seconds}",
        cwd=clone, env=environment, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    setup_s = None
    try:
        async with asyncio.timeout(MOST_S):
            async for raw in process.stdout:
                line = raw.decode(errors="replace")
                sys.stderr.write(line)
                if setup_s is None and line.startswith(START_LINE):
                    setup_s = time.monotonic() - started
            status = await process.wait()
    except TimeoutError:
        status = -1
    finally:
        await end(process)
    total_s = time.monotonic() - started
    return {
        "setup_s": None if setup_s is None else round(setup_s, 1),
        "total_s": round(total_s, 1),
        "exit_status": status,
        "bar_s": BAR_S,
        "reached": status == 0 and total_s < BAR_S,
    }


def clone_head(into: Path) -> str:
    """Clone HEAD; returns its short name."""
    subprocess.run(["git", "clone", "--quiet", ".", str(into)], cwd=ROOT, check=True, timeout=120)
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=into, check=True, capture_output=True, text=True, timeout=10)
    return asked.stdout.strip()


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Clone, run, and leave nothing."""
    environment = environment_of(arguments)
    cache_mb = await asyncio.to_thread(pip_cache_mb, environment)
    folder = Path(tempfile.mkdtemp(prefix="sk-", dir="/tmp"))
    clone = folder / "skerry"
    try:
        head = await asyncio.to_thread(clone_head, clone)
        figures = await make_demo(clone, arguments.seconds, environment)
    finally:
        if left_behind(clone):
            await Fleet(clone / ".demo").purge()
        if left := left_behind(folder):
            sys.stderr.write(f"left behind: {left}\n")
        shutil.rmtree(folder, ignore_errors=True)
    after_mb = await asyncio.to_thread(pip_cache_mb, environment)
    return {
        "head": head,
        "demo_seconds": arguments.seconds,
        "pip_cache": "off" if arguments.no_pip_cache else "warm" if cache_mb > 1 else "empty",
        "pip_cache_mb_before": round(cache_mb, 1),
        "pip_cache_mb_after": round(after_mb, 1),
        "pip_finds_local_wheels": "PIP_FIND_LINKS" in environment,
        **figures,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="how long the demo may run")
    parser.add_argument("--no-pip-cache", action="store_true", help="every package is downloaded again")
    arguments = parser.parse_args()
    report("setup_time", **msgspec.to_builtins(run(lambda: measure(arguments))))


if __name__ == "__main__":
    main()

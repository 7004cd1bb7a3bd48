"""The suite can fail: the same attempts, with no sandbox around them, succeed and say so.

As an ordinary user they run as they are. As root they run in namespaces of their own, which hold nothing back and keep this machine whole.
"""

import asyncio
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import need
from tests.escape import rungs
from tests.escape.perform import ATTEMPTS
from tests.escape.stage import BOOT, Stage, as_user

AS_A_USER = [
    *("tcp-to-the-host", "udp-to-the-host", "abstract-socket", "unix-sockets-of-the-host", "connect-to-a-neighbours-socket"),
    *("read-a-secret-of-the-host", "read-the-wardens-state", "write-to-a-neighbours-socket-directory", "address-randomisation"),
    *("large-file-in-the-socket-directory", "see-processes-of-the-host"),
    *("quotas-and-accounting", "reach-the-root-of-a-process", "signal-a-process"),
]
"""What succeeds for any user of a common Linux system. The last ends the process that others look for."""
BY_TRACING = ["trace-a-process", "read-memory-of-a-process", "copy-memory-of-a-process", "take-a-descriptor-of-a-process"]
"""The same where no security module forbids to trace one's own processes."""
IN_NAMESPACES = ["unshare-user", "clone-user", "clone-all-namespaces"]
"""The same where users may make namespaces, as the process rung needs it."""
AS_ROOT = [
    *("raw-socket", "packet-socket", "changing-routes", "read-password-hashes", "write-to-the-root", "write-to-usr", "write-to-the-model"),
    *(
        "setuid-programs",
        "kernel-settings",
        "kernel-memory-in-proc",
        "sys-is-read-only",
        "mount",
        "new-mount-calls",
        "umount",
        "pivot-root",
    ),
    *("chroot", "unshare-mount", "unshare-network", "join-namespaces", "file-handles", "kernel-keys", "reboot", "host-name", "swap-space"),
    *("becoming-root", "raise-its-priority"),
]
"""What succeeds for root."""
TIMEOUT_S = 100.0
PRIVATE = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--net"]


@functools.cache
def _runs(*command: str) -> bool:
    return subprocess.run([*command, "-I", "-c", "import ctypes, socket"], capture_output=True, check=False).returncode == 0


def interpreter(prefix: list[str]) -> str:
    """One that can be run behind ``prefix``: ours may lie in a home folder that is closed to others."""
    found = next((path for path in (sys.executable, "/usr/bin/python3") if _runs(*prefix, path)), "")
    need("interpreter", "" if found else "no interpreter here can be run by every user")
    return found


async def _run(model_dir: Path, prefix: list[str], names: list[str]) -> dict[str, dict[str, object]]:
    command = [*prefix, interpreter(prefix), "-I", "-c", BOOT, str(model_dir), "attempts", str(model_dir / "world.json"), *names]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd="/")
    output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    return {str(line["attempt"]): line for line in rungs.lines_of_json(output.decode().splitlines()) if "attempt" in line}


async def _uncontained(names: list[str], *, is_root: bool) -> dict[str, dict[str, object]]:
    """Run attempts with no sandbox, each as root each in namespaces of its own; their lines by name."""
    async with Stage("none") as stage:
        for folder in (stage.folder / "no-sandbox", stage.socket_dir("neighbour")):
            folder.mkdir(parents=True)
            folder.chmod(0o777)
        model_dir = stage.slots.model_dir("quiet")
        told = stage.world._replace(model_dir=str(model_dir), socket_dir=str(stage.folder / "no-sandbox"))
        stage.fill(model_dir, told)
        with socket.socket(socket.AF_UNIX) as neighbour:
            neighbour.bind(f"{told.neighbour_dir}/worker.sock")
            Path(f"{told.neighbour_dir}/worker.sock").chmod(0o666)
            neighbour.listen()
            found: dict[str, dict[str, object]] = {}
            prefix = PRIVATE if is_root else as_user(stage.uid)
            for batch in [[name] for name in names] if is_root else [names]:
                found |= await _run(model_dir, prefix, batch)
            return found


def _not_detected(names: list[str], *, is_root: bool = False) -> dict[str, dict[str, object]]:
    """Those that did not say that they succeeded, with what they said."""
    assert set(names) <= set(ATTEMPTS)
    found = asyncio.run(_uncontained(names, is_root=is_root))
    return {name: found.get(name, {}) for name in names if found.get(name, {}).get("held") is not False}


def _tracing_is_forbidden() -> str:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return "the Yama security module" if scope.exists() and scope.read_text().strip() != "0" else ""


def test_without_a_sandbox_an_ordinary_user_gets_through_and_the_attempts_say_so() -> None:
    assert _not_detected(AS_A_USER) == {}


def test_without_a_sandbox_a_user_reaches_processes_and_the_attempts_say_so() -> None:
    need("ptrace", _tracing_is_forbidden())
    assert _not_detected(BY_TRACING) == {}


def test_without_a_sandbox_a_user_makes_namespaces_and_the_attempts_say_so() -> None:
    need("process", rungs.absence("process"))
    assert _not_detected(IN_NAMESPACES) == {}


def test_without_a_sandbox_root_gets_through_and_the_attempts_say_so() -> None:
    need("root", "" if os.geteuid() == 0 else "what root can do is tried by root")
    assert _not_detected(AS_ROOT, is_root=True) == {}


BROKEN_ATTEMPTS = {
    "raises": ("raise LookupError('no such thing')", "LookupError"),
    "dies": ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "dies before any call": ("os.kill(os.getpid(), signal.SIGSYS)", "SIGSYS"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    "says nothing": ("os._exit(0)", "no verdict"),
}
PLANT = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from inside import run
from inside.verdict import Attempt, World, say
def planted(world):
    {act}
print(run.perform(Attempt("planted", "", "", planted, False), None))
"""


@pytest.mark.parametrize("kind", BROKEN_ATTEMPTS)
def test_an_attempt_that_breaks_is_not_taken_for_one_that_was_held(kind: str) -> None:
    act, reason = BROKEN_ATTEMPTS[kind]
    program = PLANT.format(folder=str(Path(__file__).parent), act=act)
    done = subprocess.run([sys.executable, "-I", "-B", "-c", program], capture_output=True, text=True, check=True)
    assert "broken" in done.stdout
    assert reason in done.stdout


def test_one_that_the_filter_kills_at_a_call_was_held_by_it() -> None:
    act = "say('mount'); os.kill(os.getpid(), signal.SIGSYS)"
    program = PLANT.format(folder=str(Path(__file__).parent), act=act)
    done = subprocess.run([sys.executable, "-I", "-B", "-c", program], capture_output=True, text=True, check=True)
    assert "SIGSYS from mount" in done.stdout

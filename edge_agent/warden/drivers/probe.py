"""Whether a driver works here, found by trying: a sandbox that looks around and says what it found on its socket."""

import asyncio
import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import msgspec

from edge_agent.warden.ports import NOBODY, SOCKET_DIR, SOCKET_NAME, Driver, DriverFailed, SandboxSpec
from skerry.runtime import unix_socket

TIMEOUT_S = 20.0
MEMORY_BYTES = 256 * 1024 * 1024
ANSWER_MAX_BYTES = 16 * 1024

PROGRAM = f"""
import json, os, socket
def writable(path):
    try:
        os.close(os.open(path + "/.probe", os.O_WRONLY | os.O_CREAT, 0o600))
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
seen = {{
    "uid": os.getuid(),
    "interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]],
    "writable": [path for path in ("/", "/usr", "/etc", "/model", "/dev") if writable(path)],
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "seccomp": int(status.get("Seccomp", "0")),
    "no_new_privileges": int(status.get("NoNewPrivs", "0")),
}}
path = "{SOCKET_DIR}/{SOCKET_NAME}"
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path + ".new")
    listener.listen()
    os.chmod(path + ".new", 0o666)
    os.rename(path + ".new", path)
    listener.settimeout({TIMEOUT_S})
    listener.accept()[0].sendall(json.dumps(seen).encode() + b"\\n")
"""
"""All that a worker does to be reached. gVisor hides a socket made inside, unless it is told not to."""


class Seen(msgspec.Struct, frozen=True):
    """What the probe found inside."""

    uid: int
    interfaces: list[str]
    writable: list[str]
    capabilities: int
    seccomp: int
    no_new_privileges: int


def complaint(seen: Seen, *, expects_filter: bool) -> str:
    """What of the policy does not hold, for people; empty where all of it does."""
    if seen.uid == 0:
        return "a probe sandbox ran as root"
    if set(seen.interfaces) - {"lo"}:
        return f"a probe sandbox had network interfaces: {', '.join(sorted(seen.interfaces))}"
    if seen.writable:
        return f"a probe sandbox could write to {', '.join(seen.writable)}"
    if seen.capabilities:
        return f"a probe sandbox had capabilities: {seen.capabilities:x}"
    if expects_filter and (seen.seccomp != 2 or not seen.no_new_privileges):
        return "a probe sandbox ran without a filter of system calls"
    return ""


async def tried(driver: Driver, folder: Path) -> str:
    """Why ``driver`` can't run sandboxes that hold here; empty where it can. ``folder`` is for this call's sockets."""
    name = f"probe-{os.getpid()}"
    place = folder / driver.name
    spec = SandboxSpec(
        name=name,
        argv=[sys.executable, "-I", "-S", "-c", PROGRAM],
        model_dir=place / "model",
        socket_dir=place / "run",
        memory_bytes=MEMORY_BYTES,
        cpus=1.0,
        uid=NOBODY,
    )
    try:
        for part in (spec.model_dir, spec.socket_dir):
            part.mkdir(parents=True, exist_ok=True)
        spec.socket_dir.chmod(0o777)
        await driver.start(spec)
        return await _answer(driver, spec)
    except (DriverFailed, OSError) as exc:
        return str(exc)
    finally:
        with contextlib.suppress(DriverFailed):
            await driver.stop(name, grace_s=0)
        shutil.rmtree(place, ignore_errors=True)


async def _answer(driver: Driver, spec: SandboxSpec) -> str:
    """Empty once the probe was heard and found all as it should be, else why not."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, TimeoutError, msgspec.DecodeError):
            with unix_socket.pinned(spec.socket_dir / SOCKET_NAME) as socket:
                reader, writer = await asyncio.wait_for(asyncio.open_unix_connection(socket), 1.0)
            try:
                line = await asyncio.wait_for(reader.read(ANSWER_MAX_BYTES), TIMEOUT_S)
            finally:
                writer.close()
            # gVisor's kernel is not ours to filter: the policy's filter does not apply to what runs on it
            return complaint(msgspec.json.decode(line, type=Seen), expects_filter=driver.rung != "gvisor")
        ended = next((s.exit_reason for s in await driver.sandboxes() if s.name == spec.name and not s.running), "")
        if ended:
            return f"a probe sandbox ended: {ended}"
        await asyncio.sleep(0.02)
    return f"a probe sandbox runs, and its socket could not be reached within {TIMEOUT_S:.0f} s"

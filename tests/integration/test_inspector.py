"""A pushed model is looked into by a process that has nothing but the file; what the file does to it is a refusal, and nothing else."""

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.model_store import ModelStore, NotTaken
from skerry.confine.kernel import landlock_version
from skerry.wire.messages import StateTensor
from tests.conftest import need

SMALL = Path(__file__).parents[2] / "edge_agent" / "worker" / "small.onnx"

ATTEMPTS = {
    "read a file": "open('/etc/hostname').read()",
    "list a folder": "os.listdir('/')",
    "write a file": "open('/tmp/left-behind', 'w')",
    "open a socket": "socket.socket()",
    "start a program": "os.posix_spawn('/bin/true', ['true'], {})",
    "look at a process": "os.readlink('/proc/self/exe')",
    "send a signal": "os.kill(os.getppid(), 0)",
}


async def _in_pieces(content: bytes):
    for at in range(0, len(content), 1 << 20):
        yield content[at : at + (1 << 20)]


def push(folder: Path, content: bytes, state: tuple[StateTensor, ...] = ()) -> str:
    """The code with which it is refused; empty where it is taken."""
    store = ModelStore(folder, limit_bytes=2**30, reserve_bytes=0)
    try:
        asyncio.run(store.receive(_in_pieces(content), expected_sha256="", expected_bytes=None, state=state))
    except NotTaken as exc:
        return exc.code if str(exc) else "without a word"
    return ""


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_looks_into_a_model_has_neither_files_nor_network(attempt):
    need("landlock", "" if landlock_version() else "this kernel has none")
    program = (
        "import os, socket, coordinator.inspector as inspector\n"
        "inspector.confine()\n"
        f"try: {ATTEMPTS[attempt]}\n"
        "except OSError as exc: print('refused')\n"
        "else: print('done')"
    )
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert tried.stdout == "refused\n" or tried.returncode == -31, (tried.stdout, tried.stderr)  # 31: SIGSYS


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_same_is_possible_to_a_program_that_is_not_confined(attempt):
    program = f"import os, socket\nos.chdir('/')\n{ATTEMPTS[attempt]}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    Path("/tmp/left-behind").unlink(missing_ok=True)


def test_a_model_is_taken_and_another_file_is_not(tmp_path):
    model = SMALL.read_bytes()
    assert push(tmp_path, model) == ""
    assert [push(tmp_path, other) for other in (b"", model[:-9], b"PK\x03\x04" + bytes(500))] == ["not_onnx"] * 3
    assert push(tmp_path, model, (StateTensor("no-such", "y"),)) == "invalid_state"
    assert len(list(tmp_path.iterdir())) == 1  # the one that was taken


def test_an_inspection_that_is_killed_is_a_refusal_and_the_next_push_goes_through(tmp_path):
    many_fields = SMALL.read_bytes() + b"\x08\x01" * 6_000_000  # ir_version, said again and again: seconds to walk

    async def scene() -> str:
        store = ModelStore(tmp_path, limit_bytes=2**30, reserve_bytes=0)
        pushing = asyncio.create_task(store.receive(_in_pieces(many_fields), expected_sha256="", expected_bytes=None))
        async with asyncio.timeout(60):
            while not (found := [child for child in psutil.Process().children() if "coordinator.inspector" in " ".join(child.cmdline())]):
                await asyncio.sleep(0.01)
        found[0].kill()
        with pytest.raises(NotTaken) as refused:
            await pushing
        await store.receive(_in_pieces(SMALL.read_bytes()), expected_sha256="", expected_bytes=None)
        return refused.value.code

    assert asyncio.run(scene()) == "inspection"
    assert len(list(tmp_path.iterdir())) == 1

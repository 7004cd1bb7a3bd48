"""Models are answered right under the filters and Landlock, and a worker that was taken over can do no more than answer."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.drivers.host_runtime import with_model, worker_argv, worker_environment
from edge_agent.warden.ports import SandboxSpec
from edge_agent.worker import lockdown
from edge_agent.worker.session import CPU_PROVIDER, GPU_PROVIDER, Session
from skerry.cli import catalogue
from skerry.confine.policy import NEVER
from skerry.runtime import nvml
from skerry.wire import ipc, oip
from tests.conftest import need
from tests.contract.test_drivers import Kit, absence, spec_of, wait_ready
from tests.integration.models_of_many_kinds import KINDS, tensor_of
from tests.integration.test_worker import Client
from tests.integration.test_worker_memory import share
from tests.nobody import ROOT

CATALOGUE = ROOT / "models"
HERE = [provider for provider in (GPU_PROVIDER, CPU_PROVIDER) if provider in ort.get_available_providers()]
"""Fastest first; the first is whom a worker gives its model to, the others what that one lacks."""


class Worker:
    """A worker in bubblewrap, with the driver's own filter below the worker's."""

    def __init__(self, driver: BubblewrapDriver, spec: SandboxSpec, folder: Path) -> None:
        self.driver = driver
        self.spec = spec
        self.socket = spec.socket_dir / "worker.sock"
        self._folder = folder

    def client(self) -> Client:
        return Client(self.socket)

    def pid(self) -> int:
        """Outside; the sandbox's init has it as its only child."""
        init = json.loads((self._folder / self.spec.name / "handle.json").read_text())["pid"]
        (worker,) = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return int(worker)

    def threads(self) -> list[Path]:
        return sorted(Path(f"/proc/{self.pid()}/task").iterdir())


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Callable[..., Worker]]:
    """Start a worker for a model and wait until it serves; all of them are ended afterwards."""
    need("bubblewrap", absence("bubblewrap"))
    folder = tmp_path_factory.mktemp("confine")
    driver = BubblewrapDriver(folder / "run")

    async def started(spec: SandboxSpec) -> None:
        await driver.start(spec)
        await wait_ready(driver, spec)

    def start(model: Path, **changes: object) -> Worker:
        name = f"d-{len(list(folder.iterdir()))}"
        spec = spec_of(folder, model, name=name, **changes)
        gpus = [] if HERE[0] == CPU_PROVIDER else [gpu.uuid for gpu in nvml.gpus()]
        argv = with_model(worker_argv(2.0), changes.get("warmup") or [], gpu_memory_bytes=2**31 if gpus else 0)
        spec = msgspec.structs.replace(
            spec, argv=argv, environment=worker_environment(2.0), cpus=2.0, memory_bytes=2**30, file_max_bytes=2**30, gpus=gpus
        )
        asyncio.run(started(spec))
        return Worker(driver, spec, folder / "run")

    async def stop_all() -> None:
        for sandbox in await driver.sandboxes():
            await driver.stop(sandbox.name, grace_s=0)

    yield start
    asyncio.run(stop_all())


@pytest.fixture(scope="module")
def scale(start, scale_model) -> Worker:
    return start(scale_model)


def doubled(client: Client, array: np.ndarray) -> np.ndarray:
    answer, body = client.call([tensor_of("x", array)])
    assert answer.error == ""
    (output,), _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, None)
    return np.frombuffer(output.data, "<f4").reshape(output.shape)


def assert_same(got: oip.Tensor, want: oip.Tensor) -> None:
    assert (got.name, got.datatype, got.shape) == (want.name, want.datatype, want.shape)
    if got.datatype == "BYTES":
        assert bytes(got.data) == bytes(want.data)
        return
    ours, theirs = (np.frombuffer(tensor.data, oip.NUMPY_DTYPES[tensor.datatype]) for tensor in (got, want))
    # A GPU multiplies with fewer bits; what the same kernels computed is the same.
    if HERE[0] == GPU_PROVIDER and ours.dtype.kind in "iu":  # what was sorted by such numbers may change places
        assert np.mean(ours != theirs) < 0.01, got.name
        return
    tolerances = {"rtol": 1e-6, "atol": 1e-6} if HERE[0] == CPU_PROVIDER else {"rtol": 5e-2, "atol": 2e-2}
    np.testing.assert_allclose(ours, theirs, **tolerances, err_msg=got.name)


def assert_answered(worker: Worker, tensors: list[oip.Tensor], expected: list[oip.Tensor]) -> None:
    client = worker.client()
    try:
        for _ in range(2):
            answer, body = client.call(tensors)
            assert answer.error == ""
            outputs, _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, None)
            assert len(outputs) == len(expected)
            for got, want in zip(outputs, expected, strict=True):
                assert_same(got, want)
    finally:
        client.close()


# -- what must go on working


@pytest.mark.parametrize("provider", HERE[:1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_operator_is_answered_right_in_confinement(start, tmp_path, kind, provider):
    content, feeds = KINDS[kind]()
    (tmp_path / "model.onnx").write_bytes(content)
    tensors = [tensor_of(name, array) for name, array in feeds.items()]
    expected = Session(tmp_path / "model.onnx", threads=2, warmup=[]).run(tensors, [])
    worker = start(tmp_path / "model.onnx")
    client = worker.client()
    assert client.hello.provider == provider
    assert "seccomp" in client.hello.confinement
    client.close()
    assert_answered(worker, tensors, expected)


@pytest.mark.parametrize("provider", HERE[:1])
@pytest.mark.parametrize("manifest", catalogue.read_catalogue(CATALOGUE), ids=lambda manifest: manifest.name)
def test_a_model_of_the_catalogue_is_answered_right_in_confinement(start, tmp_path, manifest, provider):
    path = catalogue.materialise(manifest, tmp_path)
    session = Session(path, threads=2, warmup=manifest.warmup)
    datatypes = {spec.name: spec.datatype for spec in session.inputs}
    arrays = {
        warmup.name: np.full(warmup.shape, warmup.value or 0.1).astype(oip.NUMPY_DTYPES[datatypes[warmup.name]])
        for warmup in manifest.warmup
    }
    tensors = [tensor_of(name, array) for name, array in arrays.items()]
    worker = start(path, warmup=manifest.warmup)
    client = worker.client()
    assert (client.hello.provider, client.hello.warm) == (provider, True)
    client.close()
    assert_answered(worker, tensors, session.run(tensors, []))


def test_connections_come_and_go_after_the_lockdown_and_several_at_once(scale):
    array = np.arange(3, dtype=np.float32).reshape(1, 3)

    def one(number: int) -> None:
        client = scale.client()
        try:
            assert doubled(client, array + number).tolist() == [[2 * number, 2 * number + 2, 2 * number + 4]]
        finally:
            client.close()

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(one, range(300)))


def test_errors_are_answered_and_the_connection_goes_on(scale):
    client = scale.client()
    good = np.ones((2, 3), np.float32)
    for bad in (np.ones((2, 4), np.float32), np.ones((2, 3), np.int64)):
        answer, _ = client.call([tensor_of("x", bad)])
        assert answer.refused
        assert doubled(client, good).tolist() == [[2, 2, 2], [2, 2, 2]]
    client.close()


def test_tensors_of_50_megabytes_are_answered(scale):
    client = scale.client()
    array = np.arange(50_000_000 // 12 * 3, dtype=np.float32).reshape(-1, 3)
    for _ in range(3):  # the memory is used again
        np.testing.assert_array_equal(doubled(client, array), array * 2)
    client.close()


# -- what it may no longer do


def status_of(thread: Path) -> dict[str, str]:
    return dict(re.split(r":\s*", line, maxsplit=1) for line in (thread / "status").read_text().splitlines())


def test_every_thread_has_both_filters_and_no_way_to_new_privileges(scale):
    clients = [scale.client() for _ in range(3)]
    threads = scale.threads()
    assert len(threads) >= 1 + 3  # connections have one each
    for thread in threads:
        status = status_of(thread)
        assert (status["Seccomp"], status["Seccomp_filters"], status["NoNewPrivs"]) == ("2", "2", "1"), status["Name"]
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    for client in clients:
        client.close()


def test_a_worker_holds_no_descriptor_but_its_log_and_its_sockets(scale):
    held = {str(descriptor.readlink()) for descriptor in Path(f"/proc/{scale.pid()}/fd").iterdir()}
    others = {name for name in held if not name.startswith("socket:[") and name != "/dev/null"}
    if HERE[0] == GPU_PROVIDER:  # its driver keeps the devices, and pipes and events to its own threads
        others = {name for name in others if not name.startswith(("/dev/nvidia", "pipe:", "anon_inode:"))}
    assert [Path(name).name for name in others] == ["log"]


def test_hello_says_what_holds(scale):
    client = scale.client()
    landlock = lockdown.landlock_version()
    need("landlock", "" if landlock else "this kernel has none")
    expected = f"landlock {landlock}, seccomp" if HERE[0] == CPU_PROVIDER else "landlock before loading, seccomp"
    assert client.hello.confinement == expected
    client.close()


def test_a_kernel_without_landlock_gives_what_it_has_and_hello_says_so(tmp_path, scale_model):
    need("gvisor", absence("gvisor"))
    kit, spec = Kit("gvisor", tmp_path / "run"), spec_of(tmp_path, scale_model)

    async def scene() -> None:
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        client = Client(spec.socket_dir / "worker.sock")
        assert client.hello.confinement == "seccomp"
        assert doubled(client, np.ones((1, 3), np.float32)).tolist() == [[2, 2, 2]]
        client.close()

    kit.play(scene)


REFUSED = {
    *("write to /tmp", "write to the socket directory", "open for writing without making", "cut a file by opening it"),
    *("make a file without a name", "write to its own memory", "unlink", "rename", "make a directory", "make a link", "change a mode"),
    *("truncate", "fork by glibc", "clone with a name space", "clone, the thread's bit in the high half", "a new socket"),
    *("a new Internet socket", "a pair of sockets", "listen to another name", "set an option of a socket", "map code"),
    *("make memory code", "make memory code by a key", "signal another process", "ioctl", "take off the filter"),
    *(
        "say that it may be looked into",
        "call openat2",
        "call prlimit64",
        "call setrlimit",
        "call seccomp",
        "call memfd_create",
        "call ftruncate",
    ),
    *("call pidfd_open", "call pidfd_send_signal", "call pkey_mprotect", "call userfaultfd", "call perf_event_open", "call io_setup"),
}
KILLED = {"connect", *(f"call {name}" for name in (*NEVER, "execve", "execveat", "fork", "vfork")), "execve"}
ABSENT = {"call clone3", "call io_uring_setup", "call a call of the x32 table"}
READING = {"read /etc/passwd", "read a file of its socket directory", "read its own environment", "list a directory"}
ALLOWED = {
    *("read a library", "import what was not imported", "start a thread", "signal a thread of its own", "map memory", "random numbers")
}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> dict:
    """What each try came to. What lies outside is not below /tmp, which is the sandbox's own."""
    folder = tmp_path_factory.mktemp("locked")
    outside = Path(tempfile.mkdtemp(dir="/var/tmp"))
    command = [sys.executable, "-m", "tests.integration.locked_down", str(folder), str(outside)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, cwd=ROOT)
    shutil.rmtree(outside)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("names", "answer"), [(REFUSED, "EPERM"), (KILLED, "SIGSYS"), (ABSENT, "ENOSYS"), (ALLOWED, "done")], ids=lambda value: str(value)[:6]
)
def test_a_locked_down_process_gets_the_same_answer_in_each_of_its_threads(attempts, names, answer):
    serving = attempts["serving"]
    present = names & set(serving)
    assert len(present) > len(names) // 2  # some calls are of one architecture alone
    assert {name: serving[name] for name in present} == {name: dict.fromkeys(("old", "main", "new"), answer) for name in present}


def test_every_try_has_an_answer_that_is_expected(attempts):
    assert set(attempts["serving"]) <= REFUSED | KILLED | ABSENT | READING | ALLOWED


def test_threads_that_serve_read_libraries_alone_and_older_ones_what_the_first_layer_allows(attempts):
    need("landlock", "" if lockdown.landlock_version() else "this kernel has none")
    expected = {"old": "done", "main": "EACCES", "new": "EACCES"}
    assert {name: attempts["serving"][name] for name in READING} == dict.fromkeys(READING, expected)


def test_while_it_loads_it_may_write_to_its_own_places_and_reach_nobody(attempts):
    version = lockdown.landlock_version()
    need("landlock 6", "" if version >= 6 else f"this kernel has {version}")
    done = {"write to /tmp", "write to the socket directory", "a socket in the socket directory", "rename in the socket directory"}
    by_answer = {"done": done | {"read a file", "map code"}, "EPERM": {"connect to an abstract name outside", "signal a process outside"}}
    answers = {name: answer for answer, names in by_answer.items() for name in names}
    assert {name: answers.get(name, "EACCES") for name in attempts["loading"]} == attempts["loading"]
    assert len(attempts["loading"]) == 20


OWN_FILTER = """
import ctypes, os, struct, threading
from skerry.confine.numbers import AARCH64, X86_64
from edge_agent.worker import lockdown
libc, ready = ctypes.CDLL(None), threading.Event()
number = {"x86_64": X86_64, "aarch64": AARCH64}[os.uname().machine]["seccomp"]
def other():
    code = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000), 8)  # one that allows all
    libc.prctl(38, 1, 0, 0, 0)
    libc.syscall(number, 1, 0, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
    ready.set()
    threading.Event().wait()
threading.Thread(target=other, daemon=True).start()
ready.wait()
try:
    said = lockdown.before_serving("CPUExecutionProvider")
except lockdown.ConfineFailed as exc:
    said = f"failed: {exc}"
os.write(1, said.encode())
os._exit(0)
"""


def test_a_filter_that_one_thread_does_not_get_is_said_and_not_taken_for_one():
    """The kernel answers with that thread's number, which is no error (seccomp(2))."""
    ran = subprocess.run([sys.executable, "-c", OWN_FILTER], capture_output=True, text=True, check=True, timeout=30, cwd=ROOT)
    assert re.fullmatch(r"failed: seccomp: thread \d+ has a filter of its own", ran.stdout)


@pytest.mark.parametrize("is_first", [True, False])
def test_what_a_connection_sends_of_descriptors_is_not_kept(scale, is_first):
    """A gateway that was taken over hands in a descriptor: with its first frame that ends the connection, unless it is memory to be shared.
    Later ones find no place where they are read, so the kernel drops them."""
    client = scale.client()
    frame = b"".join(ipc.frame(ipc.Batch([ipc.Call(1, [ipc.TensorHead("x", "FP32", (1, 3), 12)])]), [bytes(12)]))
    if not is_first:
        doubled(client, np.ones((1, 3), np.float32))
    with (ROOT / "pyproject.toml").open("rb") as file:
        socket.send_fds(client.socket, [frame], [file.fileno()])
    if is_first:
        assert client.stream.read(1) == b""
    else:
        assert ipc.parse_header(client.frame()[0], ipc.Answers).answers[0].error == ""
    deadline = time.monotonic() + 5
    while any(str(d.readlink()).endswith("pyproject.toml") for d in Path(f"/proc/{scale.pid()}/fd").iterdir()):
        assert time.monotonic() < deadline
    client.close()


@pytest.mark.parametrize("kind", ["bubblewrap", "docker", "gvisor"])
def test_memory_that_is_shared_is_the_same_memory_on_every_rung(tmp_path, scale_model, kind):
    need(kind, absence(kind))
    kit, spec = Kit(kind, tmp_path / "run"), spec_of(tmp_path, scale_model)

    async def scene() -> None:
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        for _ in range(2):  # the next connection has memory of its own
            client = Client(spec.socket_dir / "worker.sock")
            assert client.hello.shares_memory
            ask_in_memory(client)
            client.close()

    kit.play(scene)


def ask_in_memory(client: Client) -> None:
    """Many calls through the same few pages, each with other numbers: small outputs copied there, large ones written there."""
    memory = share(client, 2**20)
    for number, rows in enumerate([1, 1000, 20_000] * 30):
        size = 12 * rows
        memory[:size] = np.full(3 * rows, number, "<f4").tobytes()
        call = ipc.Call(1, [ipc.TensorHead("x", "FP32", (rows, 3), size, at=0)], room=ipc.Room(2**19, 2**19))
        (answer,), body = client.batch([call])
        (output,), _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, memory)
        assert np.array_equal(np.frombuffer(output.data, "<f4"), np.full(3 * rows, 2 * number))

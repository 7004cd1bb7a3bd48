"""What every sandbox driver promises, run against each."""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.drivers.docker import DockerDriver
from edge_agent.warden.drivers.fake import FakeDriver, FakeWorld
from edge_agent.warden.drivers.host_runtime import with_model, worker_argv, worker_environment
from edge_agent.warden.ports import Driver, DriverFailed, SandboxSpec
from skerry.wire import ipc
from skerry.wire.messages import WarmupTensor
from tests.conftest import need

READY_TIMEOUT_S = 60
RUNTIMES = {"docker": "", "gvisor": "runsc"}
DRIVERS = ["bubblewrap", "docker", "fake", "gvisor"]


def docker_socket() -> Path:
    """The engine for the tests: SKERRY_DOCKER_SOCKET, DOCKER_HOST, or the machine's own."""
    host = os.environ.get("DOCKER_HOST", "").removeprefix("unix://")
    return Path(os.environ.get("SKERRY_DOCKER_SOCKET") or host or "/var/run/docker.sock")


class Kit:
    """One kind of driver in one test's world: ``make`` gives a new driver that must find what earlier ones started."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.owner = f"test-{uuid.uuid4().hex[:8]}"
        self.world = FakeWorld()

    def make(self, owner: str = "") -> Driver:
        match self.kind:
            case "bubblewrap":
                return BubblewrapDriver(self.folder)
            case "fake":
                return FakeDriver(self.world)
            case _:
                return DockerDriver(self.folder, socket=docker_socket(), runtime=RUNTIMES[self.kind], owner=owner or self.owner)

    def play(self, scene: Callable[[], Awaitable[None]]) -> None:
        """Run ``scene``, and end what it started in the same event loop: the fake's sandboxes live in it."""

        async def whole() -> None:
            try:
                await scene()
            finally:
                self.world.close()
                self.world.fail.clear()
                for sandbox in await self.make().sandboxes():
                    await self.make().stop(sandbox.name, grace_s=0)

        asyncio.run(whole())

    def init_pid(self, name: str) -> int:
        """The pid, on this machine, of a sandbox's first process."""
        if self.kind == "bubblewrap":
            return json.loads((self.folder / name / "handle.json").read_text())["pid"]
        import docker

        with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as engine:
            return engine.inspect_container(f"skerry-{self.owner}-{name}")["State"]["Pid"]


@functools.cache
def absence(kind: str) -> str:
    """Why a kind of driver does not work here; asked once, since it takes a sandbox to know."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(Kit(kind, Path(folder) / "run").make().probe())


@pytest.fixture(params=DRIVERS)
def kit(request, tmp_path):
    need(request.param, absence(request.param))
    return Kit(request.param, tmp_path / "run")


def spec_of(folder: Path, model: Path, *, name: str = "d-1", warmup: list[WarmupTensor] | None = None, waits: bool = False) -> SandboxSpec:
    """A worker's sandbox below ``folder``, its directories made as a warden makes them."""
    place = folder / f"place-{name}"
    (place / "model").mkdir(parents=True, exist_ok=True)
    (place / "run").mkdir(exist_ok=True)
    (place / "run").chmod(0o777)
    if not waits:
        shutil.copy(model, place / "model" / "model.onnx")
    return SandboxSpec(
        name=name,
        argv=worker_argv(1.0) if waits else with_model(worker_argv(1.0), warmup or []),
        environment=worker_environment(1.0),
        model_dir=place / "model",
        socket_dir=place / "run",
        memory_bytes=512 * 2**20,
        cpus=1.0,
        uid=1_879_100_001 + sum(name.encode()),
    )


@pytest.fixture
def spec(tmp_path, scale_model):
    return spec_of(tmp_path, scale_model)


@pytest.fixture
def bad_spec(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    return spec_of(tmp_path / "bad", tmp_path / "bad.onnx")


async def wait_ready(driver, spec) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (spec.socket_dir / "worker.sock").exists():
        states = {state.name: state for state in await driver.sandboxes()}
        assert spec.name in states, "the sandbox is not listed"
        assert states[spec.name].running, states[spec.name].exit_reason
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.01)


async def wait_ended(driver, name) -> str:
    """Until the sandbox is listed as ended; returns the reason."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        (state,) = [state for state in await driver.sandboxes() if state.name == name]
        if not state.running:
            return state.exit_reason
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


class Client:
    """The gateway's end of a worker's socket, written out plainly."""

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def frame(self) -> tuple[bytes, bytes]:
        async with asyncio.timeout(20):
            header_bytes, body_bytes = ipc.parse_prefix(await self.reader.readexactly(8))
            return await self.reader.readexactly(header_bytes), await self.reader.readexactly(body_bytes)

    async def doubled(self, *values: float) -> tuple[float, ...]:
        body = struct.pack("<3f", *values)
        call = ipc.Call(1, [ipc.TensorHead("x", "FP32", (1, 3), len(body))])
        self.writer.writelines(ipc.frame(ipc.Batch([call]), [body]))
        header, answer_body = await self.frame()
        (answer,) = ipc.parse_header(header, ipc.Answers).answers
        assert answer.error == ""
        assert [(head.name, head.shape) for head in answer.outputs] == [("y", (1, 3))]
        return struct.unpack("<3f", answer_body)


async def connect(spec) -> Client:
    client = Client()
    client.reader, client.writer = await asyncio.open_unix_connection(str(spec.socket_dir / "worker.sock"))
    client.hello = ipc.parse_header((await client.frame())[0], ipc.Hello)
    return client


def test_a_started_sandbox_is_listed_and_answers(kit, spec):
    async def scene():
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        (state,) = await driver.sandboxes()
        assert (state.name, state.running, state.exit_reason) == ("d-1", True, "")
        async with await connect(spec) as client:
            assert client.hello.inputs == [ipc.TensorSpec("x", "FP32", (-1, 3))]
            assert await client.doubled(1, 2, 3) == (2, 4, 6)
        usage = await driver.stats("d-1")
        assert usage is not None
        assert 2**20 < usage.memory_bytes < 512 * 2**20
        assert 0 < usage.cpu_seconds < 60

    kit.play(scene)


def test_a_driver_made_anew_finds_what_an_earlier_one_started_and_can_end_it(kit, spec):
    async def scene():
        await kit.make().start(spec)
        second = kit.make()
        assert [s.running for s in await second.sandboxes()] == [True]
        await second.start(spec)
        assert len(await second.sandboxes()) == 1
        await second.stop("d-1", grace_s=1)
        assert await second.sandboxes() == []
        assert await second.stats("d-1") is None
        await second.stop("d-1", grace_s=1)

    kit.play(scene)


def test_starting_what_runs_leaves_it_as_it_is(kit, spec):
    async def scene():
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        async with await connect(spec) as client:
            await driver.start(spec)
            assert await client.doubled(1, 2, 3) == (2, 4, 6)
        assert len(await driver.sandboxes()) == 1

    kit.play(scene)


def test_what_is_absent_can_be_stopped_and_has_no_stats_and_no_logs(kit):
    async def scene():
        driver = kit.make()
        await driver.stop("d-9", grace_s=1)
        assert await driver.stats("d-9") is None
        assert (await driver.logs("d-9", lines=10)).lines == []
        assert await driver.sandboxes() == []

    kit.play(scene)


def test_a_sandbox_whose_model_is_bad_is_listed_as_ended_with_the_reason(kit, bad_spec):
    async def scene():
        driver = kit.make()
        await driver.start(bad_spec)
        assert "load failed" in await wait_ended(driver, "d-1")
        assert "load failed" in await wait_ended(kit.make(), "d-1")
        assert await driver.stats("d-1") is None

    kit.play(scene)


def test_logs_are_the_last_lines_even_of_what_has_ended(kit, bad_spec):
    async def scene():
        driver = kit.make()
        await driver.start(bad_spec)
        await wait_ended(driver, "d-1")
        (line,) = (await driver.logs("d-1", lines=1)).lines
        assert "load failed" in line
        assert (await kit.make().logs("d-1", lines=50)).lines[-1] == line

    kit.play(scene)


def test_one_that_ended_can_be_started_again_under_its_name(kit, spec, bad_spec):
    async def scene():
        driver = kit.make()
        await driver.start(bad_spec)
        await wait_ended(driver, "d-1")
        await driver.start(spec)
        await wait_ready(driver, spec)
        async with await connect(spec) as client:
            assert await client.doubled(1, 2, 3) == (2, 4, 6)
        assert [(s.name, s.running) for s in await driver.sandboxes()] == [("d-1", True)]

    kit.play(scene)


def test_two_side_by_side_do_not_disturb_each_other(kit, spec, tmp_path, scale_model):
    other = spec_of(tmp_path, scale_model, name="d-2")

    async def scene():
        driver = kit.make()
        await asyncio.gather(driver.start(spec), driver.start(other))
        await asyncio.gather(wait_ready(driver, spec), wait_ready(driver, other))
        assert [s.name for s in await driver.sandboxes()] == ["d-1", "d-2"]
        async with await connect(other) as client:
            await driver.stop("d-1", grace_s=1)
            assert await client.doubled(1, 2, 3) == (2, 4, 6)
        assert [s.name for s in await driver.sandboxes()] == ["d-2"]

    kit.play(scene)


def test_a_stop_ends_calls_in_progress_within_its_grace(kit, spec):
    async def scene():
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        async with await connect(spec) as client:
            began = time.monotonic()
            await driver.stop("d-1", grace_s=2)
            assert time.monotonic() - began < 2 + 3
            assert await asyncio.wait_for(client.reader.read(), 5) == b""
        assert await driver.sandboxes() == []

    kit.play(scene)


def test_one_that_wants_more_memory_than_it_may_have_ends_and_says_so(kit, tmp_path, scale_model):
    # 2.6 GB: over the limit of every driver, the address space that bubblewrap allows besides included.
    spec = spec_of(tmp_path, scale_model, warmup=[WarmupTensor("x", [220_000_000, 3], 1.0)])
    greedy = msgspec.structs.replace(spec, memory_bytes=256 * 2**20)

    async def scene():
        driver = kit.make()
        await driver.start(greedy)
        reason = (await wait_ended(driver, "d-1")).lower()
        assert "memory" in reason

    kit.play(scene)


def test_one_that_waits_loads_what_is_put_into_its_model_directory_when_told(kit, tmp_path, scale_model):
    spec = spec_of(tmp_path, scale_model, waits=True)

    async def scene():
        driver = kit.make()
        await driver.start(spec)
        control = spec.socket_dir / "control.sock"
        await until(control.exists)
        assert not (spec.socket_dir / "worker.sock").exists()
        os.link(scale_model, spec.model_dir / "model.onnx")
        _, writer = await asyncio.open_unix_connection(str(control))
        writer.writelines(ipc.frame(ipc.Load(), []))
        await writer.drain()
        await wait_ready(driver, spec)
        writer.close()
        async with await connect(spec) as client:
            assert await client.doubled(1, 2, 3) == (2, 4, 6)
        await until(lambda: not control.exists())

    kit.play(scene)


@pytest.mark.parametrize("kit", ["bubblewrap", "docker", "gvisor"], indirect=True)
def test_logs_go_on_from_a_position(kit, tmp_path, scale_model):
    spec = spec_of(tmp_path, scale_model)
    program = "import sys, time\nfor i in range(30): print('line', i, flush=True); time.sleep(0.05)\ntime.sleep(60)"
    chatty = msgspec.structs.replace(spec, argv=[sys.executable, "-I", "-S", "-c", program])

    async def scene():
        driver = kit.make()
        await driver.start(chatty)
        seen, position = [], ""
        async with asyncio.timeout(30):
            while "line 29" not in seen:
                found = await driver.logs("d-1", lines=1000, after=position)
                seen += found.lines
                position = found.position
                await asyncio.sleep(0.1)
        assert seen == [f"line {i}" for i in range(30)]
        assert (await driver.logs("d-1", lines=1000, after=position)).lines == []
        assert (await driver.logs("d-1", lines=2)).lines == ["line 28", "line 29"]

    kit.play(scene)


@pytest.mark.parametrize("kit", ["bubblewrap", "docker"], indirect=True)
def test_a_system_call_that_nobody_needs_ends_the_sandbox_and_is_said(kit, spec):
    program = "import ctypes; ctypes.CDLL(None).unshare(0x20000); print('still here')"
    curious = msgspec.structs.replace(spec, argv=[sys.executable, "-I", "-S", "-c", program])

    async def scene():
        driver = kit.make()
        await driver.start(curious)
        assert "system call" in await wait_ended(driver, "d-1")
        (state,) = await driver.sandboxes()
        assert state.ending.cause == "refused_call"
        assert state.ending.lines == []

    kit.play(scene)


@pytest.mark.parametrize("kit", ["bubblewrap", "docker", "gvisor"], indirect=True)
def test_a_sandbox_has_no_network_but_a_loopback_of_its_own(kit, spec):
    if kit.kind == "gvisor" and os.geteuid() != 0:
        need("root", "gVisor's process, which is another user's, can't be looked into")

    async def scene():
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        pid = kit.init_pid("d-1")
        assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
        assert {line.split(":")[0].strip() for line in lines} <= {"lo"}

    kit.play(scene)


@pytest.mark.parametrize("kit", ["bubblewrap", "docker"], indirect=True)
def test_a_worker_has_no_capability_and_no_way_to_gain_one(kit, spec):
    async def scene():
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        init = kit.init_pid("d-1")
        (worker,) = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        if kit.kind == "docker" or os.geteuid() == 0:
            assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(spec.uid)}

    kit.play(scene)


@pytest.mark.parametrize("kit", ["bubblewrap", "docker", "gvisor"], indirect=True)
def test_a_gpu_that_is_not_there_is_refused_by_its_id_and_leaves_nothing(kit, spec):
    async def scene():
        driver = kit.make()
        with pytest.raises(DriverFailed, match=r"GPU-0000|NVIDIA|nvidia|cdi|gpu"):
            await driver.start(msgspec.structs.replace(spec, gpus=["GPU-00000000-0000-0000-0000-000000000000"]))
        assert await driver.sandboxes() == []

    kit.play(scene)


@pytest.mark.parametrize("kit", ["docker"], indirect=True)
def test_wardens_that_share_an_engine_see_their_own_sandboxes_alone(kit, spec, tmp_path):
    async def scene():
        mine, theirs = kit.make(), kit.make(owner=f"{kit.owner}-other")
        await mine.start(spec)
        try:
            assert await theirs.sandboxes() == []
            await theirs.stop("d-1", grace_s=0)
            await theirs.start(
                msgspec.structs.replace(spec, socket_dir=spec_of(tmp_path / "theirs", spec.model_dir / "model.onnx").socket_dir)
            )
            await mine.stop("d-1", grace_s=0)
            assert [s.running for s in await theirs.sandboxes()] == [True]
        finally:
            await theirs.stop("d-1", grace_s=0)

    kit.play(scene)


def test_an_engine_that_is_absent_is_said_at_once(tmp_path, spec):
    driver = DockerDriver(tmp_path / "run", socket=tmp_path / "no.sock", owner="test")
    began = time.monotonic()
    reason = asyncio.run(driver.probe())
    assert time.monotonic() - began < 1
    assert "no Docker Engine" in reason
    assert "no.sock" in reason
    with pytest.raises(DriverFailed, match="no Docker Engine"):
        asyncio.run(driver.start(spec))


def test_an_engine_without_the_runtime_is_no_gvisor(tmp_path):
    need("docker", absence("docker"))
    driver = DockerDriver(tmp_path / "run", socket=docker_socket(), runtime="no-such-runtime", owner="test")
    assert "no-such-runtime" in asyncio.run(driver.probe())


def test_the_fake_follows_its_script(tmp_path, spec):
    kit = Kit("fake", tmp_path / "run")

    async def scene():
        driver = kit.make()
        kit.world.fail = {"start", "probe"}
        assert "script" in await driver.probe()
        with pytest.raises(DriverFailed):
            await driver.start(spec)
        kit.world.fail = set()
        kit.world.start_delay_s = 0.1
        began = time.monotonic()
        await driver.start(spec)
        await wait_ready(driver, spec)
        assert time.monotonic() - began >= 0.1
        async with await connect(spec) as client:
            kit.world.kill("d-1", "the cat pulled the plug")
            assert await asyncio.wait_for(client.reader.read(), 5) == b""
        assert await wait_ended(driver, "d-1") == "the cat pulled the plug"

    kit.play(scene)


@pytest.mark.parametrize("disk", ["the system's", "one of its own"])
def test_bubblewrap_a_warden_that_died_before_it_wrote_the_handle_leaves_nothing_that_cannot_be_ended(request, disk, scale_model, tmp_path):
    need("bubblewrap", absence("bubblewrap"))
    if disk == "one of its own":
        request.getfixturevalue("small_disk")  # lies at tmp_path
    spec = spec_of(tmp_path, scale_model)
    driver = BubblewrapDriver(tmp_path / "run")

    async def scene():
        await driver.start(spec)
        handle = json.loads((tmp_path / "run" / "d-1" / "handle.json").read_text())
        (tmp_path / "run" / "d-1" / "handle.json").unlink()
        second = BubblewrapDriver(tmp_path / "run")
        assert [s.running for s in await second.sandboxes()] == [False]
        await second.stop("d-1", grace_s=0)
        deadline = time.monotonic() + 5
        while Path(f"/proc/{handle['pid']}").exists() and Path(f"/proc/{handle['pid']}/stat").read_text().split(") ")[1][0] != "Z":
            assert time.monotonic() < deadline, "the orphan lives on"
            await asyncio.sleep(0.02)
        assert await second.sandboxes() == []

    asyncio.run(scene())

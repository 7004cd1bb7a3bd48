"""What every sandbox driver promises, run against each."""

import asyncio
import contextlib
import functools
import json
import os
import struct
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


@pytest.fixture
def spec(tmp_path, scale_model):
    return SandboxSpec(
        name="d-1", model=scale_model, socket_dir=tmp_path / "s1", memory_bytes=512 * 2**20, cpus=1.0, label='{"any": "text"}'
    )


@pytest.fixture
def bad_spec(tmp_path, spec):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    return msgspec.structs.replace(spec, model=tmp_path / "bad.onnx")


async def wait_ready(driver, spec) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (spec.socket_dir / "worker.sock").exists():
        states = {state.name: state for state in await driver.sandboxes()}
        assert spec.name in states, "the sandbox is not listed"
        assert states[spec.name].running, states[spec.name].exit_reason
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


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
        self.writer.writelines(ipc.frame(call, [body]))
        header, answer_body = await self.frame()
        answer = ipc.parse_header(header, ipc.Answer)
        assert answer.error == ""
        assert [(head.name, head.shape) for head in answer.outputs] == [("y", (1, 3))]
        return struct.unpack("<3f", answer_body)


async def connect(spec) -> Client:
    client = Client()
    client.reader, client.writer = await asyncio.open_unix_connection(str(spec.socket_dir / "worker.sock"))
    client.hello = ipc.parse_header((await client.frame())[0], ipc.Hello)
    return client


def test_a_started_sandbox_is_listed_with_its_label_and_answers(kit, spec):
    async def scene():
        driver = kit.make()
        await driver.start(spec)
        await wait_ready(driver, spec)
        (state,) = await driver.sandboxes()
        assert (state.name, state.label, state.running, state.exit_reason) == ("d-1", spec.label, True, "")
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
        assert await driver.logs("d-9", lines=10) == []
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
        (line,) = await driver.logs("d-1", lines=1)
        assert "load failed" in line
        assert (await kit.make().logs("d-1", lines=50))[-1] == line

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


def test_two_side_by_side_do_not_disturb_each_other(kit, spec, tmp_path):
    other = msgspec.structs.replace(spec, name="d-2", socket_dir=tmp_path / "s2", label="other")

    async def scene():
        driver = kit.make()
        await asyncio.gather(driver.start(spec), driver.start(other))
        await asyncio.gather(wait_ready(driver, spec), wait_ready(driver, other))
        assert [(s.name, s.label) for s in await driver.sandboxes()] == [("d-1", spec.label), ("d-2", "other")]
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


def test_one_that_wants_more_memory_than_it_may_have_ends_and_says_so(kit, spec):
    # 2.6 GB: over the limit of every driver, the address space that bubblewrap allows besides included.
    greedy = msgspec.structs.replace(spec, memory_bytes=256 * 2**20, warmup=[WarmupTensor("x", [220_000_000, 3], 1.0)])

    async def scene():
        driver = kit.make()
        await driver.start(greedy)
        reason = (await wait_ended(driver, "d-1")).lower()
        assert "memory" in reason

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
        if kit.kind == "docker":
            assert status["Seccomp"] == "2"
            assert "0" not in status["Uid"].split()

    kit.play(scene)


@pytest.mark.parametrize("kit", ["docker"], indirect=True)
def test_wardens_that_share_an_engine_see_their_own_sandboxes_alone(kit, spec, tmp_path):
    async def scene():
        mine, theirs = kit.make(), kit.make(owner=f"{kit.owner}-other")
        await mine.start(spec)
        try:
            assert await theirs.sandboxes() == []
            await theirs.stop("d-1", grace_s=0)
            await theirs.start(msgspec.structs.replace(spec, socket_dir=tmp_path / "s2"))
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


def test_bubblewrap_a_warden_that_died_before_it_wrote_the_handle_leaves_nothing_that_cannot_be_ended(tmp_path, spec):
    driver = BubblewrapDriver(tmp_path / "run")
    need("bubblewrap", asyncio.run(driver.probe()))

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

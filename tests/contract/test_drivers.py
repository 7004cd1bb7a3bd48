"""What every sandbox driver promises, run against each."""

import asyncio
import contextlib
import time

import pytest

from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.ports import SandboxSpec
from tests.conftest import need

DRIVERS = {"bubblewrap": BubblewrapDriver}


@pytest.fixture(params=sorted(DRIVERS))
def make_driver(request, tmp_path):
    def make():
        return DRIVERS[request.param](tmp_path / "run")

    need(request.param, asyncio.run(make().probe()))
    yield make

    async def clean():
        for sandbox in await make().sandboxes():
            await make().stop(sandbox.name, grace_s=0)

    asyncio.run(clean())


@pytest.fixture
def spec(tmp_path, scale_model):
    return SandboxSpec(
        name="d-1", model=scale_model, socket_dir=tmp_path / "sock", memory_bytes=512 * 2**20, cpus=1.0, label='{"any": "text"}'
    )


async def wait_ready(driver, spec) -> None:
    deadline = time.monotonic() + 30
    while not (spec.socket_dir / "worker.sock").exists():
        states = await driver.sandboxes()
        assert states, "the sandbox is not listed"
        assert states[0].running, states[0].exit_reason
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def test_a_started_sandbox_is_listed_with_its_label_and_can_be_reached(make_driver, spec):
    async def scene():
        driver = make_driver()
        await driver.start(spec)
        await wait_ready(driver, spec)
        (state,) = await driver.sandboxes()
        assert (state.name, state.label, state.running) == ("d-1", spec.label, True)
        reader, writer = await asyncio.open_unix_connection(str(spec.socket_dir / "worker.sock"))
        assert len(await asyncio.wait_for(reader.readexactly(8), 5)) == 8
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        usage = await driver.stats("d-1")
        assert usage is not None
        assert 2**20 < usage.memory_bytes < 512 * 2**20

    asyncio.run(scene())


def test_a_driver_made_anew_finds_what_an_earlier_one_started_and_can_end_it(make_driver, spec):
    async def scene():
        await make_driver().start(spec)
        second = make_driver()
        assert [s.running for s in await second.sandboxes()] == [True]
        await second.start(spec)
        assert len(await second.sandboxes()) == 1
        await second.stop("d-1", grace_s=1)
        assert await second.sandboxes() == []
        assert await second.stats("d-1") is None
        await second.stop("d-1", grace_s=1)

    asyncio.run(scene())


def test_a_sandbox_whose_model_is_bad_is_listed_as_ended_with_the_reason(make_driver, spec, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    bad = SandboxSpec(name="d-1", model=tmp_path / "bad.onnx", socket_dir=spec.socket_dir, memory_bytes=512 * 2**20, cpus=1.0)

    async def scene():
        driver = make_driver()
        await driver.start(bad)
        deadline = time.monotonic() + 30
        while (await driver.sandboxes())[0].running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        (state,) = await driver.sandboxes()
        assert not state.running
        assert "load failed" in state.exit_reason

    asyncio.run(scene())

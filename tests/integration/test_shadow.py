"""Another version that is asked besides: real workers, whose answers are compared, and callers who notice nothing."""

import asyncio
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from skerry.wire.box import LocalReplica, Route, RouteTable
from skerry.wire.messages import Agreement, Shadow
from tests.integration.test_data_plane import Replicas, infer
from tests.integration.test_gateway import Box, fleet, run
from tests.integration.test_worker_batches import model

FLOAT = onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """y = 2 x; the same by another way; 3 x; and one that fails on what the others take."""
    folder, free = tmp_path_factory.mktemp("files"), {"x": (FLOAT, ["N", "M"])}
    out = {"y": (FLOAT, ["N", "M"])}
    three = onnx.numpy_helper.from_array(np.array(3, "f4"), "three")
    made = {
        "twice": model(folder / "twice.onnx", [oh.make_node("Add", ["x", "x"], ["y"])], free, out),
        "also": model(folder / "also.onnx", [oh.make_node("Sum", ["x", "x"], ["y"])], free, out),
        "narrow": model(folder / "narrow.onnx", [oh.make_node("Add", ["x", "x"], ["y"])], {"x": (FLOAT, [1, 2])}, {"y": (FLOAT, [1, 2])}),
    }
    graph = oh.make_graph(
        [oh.make_node("Mul", ["x", "three"], ["y"])], "thrice",
        [oh.make_tensor_value_info("x", FLOAT, ["N", "M"])], [oh.make_tensor_value_info("y", FLOAT, ["N", "M"])], [three],
    )  # fmt: skip
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), folder / "thrice.onnx")
    return made | {"thrice": folder / "thrice.onnx"}


async def serve(box: Box, present: Replicas, shadows: Replicas | None, shadow: Shadow | None) -> None:
    def named(replicas: Replicas, name: str) -> list[LocalReplica]:
        return [LocalReplica(f"{name}{number}", str(path)) for number, path in enumerate(replicas.sockets)]

    route = Route("m", "m", 1, 5000, replicas=named(present, "r"), shadow=shadow, shadows=named(shadows, "s") if shadows else [])
    box.service.update(RouteTable(1, [route]))
    served = box.service.routes()[0]
    while served.pool.slots < len(present.sockets) or (shadows and not served.shadow.is_ready):
        await asyncio.sleep(0.01)


async def counted(box: Box, compared: int) -> tuple[int, int]:
    account = box.service.routes()[0].account
    for _ in range(500):
        if account.compared >= compared:
            break
        await asyncio.sleep(0.01)
    return account.compared, account.differed


@pytest.mark.parametrize(("name", "differs"), [("also", 0), ("thrice", 1), ("narrow", 1)])
def test_answers_are_compared_and_callers_get_those_of_what_serves(tmp_path, files, name, differs):
    async def scene():
        (tmp_path / "s").mkdir()
        async with fleet(tmp_path) as (here, _, session), Replicas(tmp_path, files["twice"], 1) as present:
            async with Replicas(tmp_path / "s", files[name], 1) as shadows:
                await serve(here, present, shadows, Shadow(1.0))
                rng = np.random.default_rng(1)
                for number in range(1, 13):
                    # Small ones, and such as lie in memory that is shared with the replica and used again at once.
                    x = rng.random((2, 30_000 if number % 3 == 0 else 3), "f4")
                    status, outputs, _ = await infer(session, here, x)
                    assert status == 200
                    assert np.array_equal(outputs["y"], x * 2)
                    assert (await counted(here, number))[0] == number
                assert await counted(here, 12) == (12, 12 * differs)
            told = [one.text for one in here.service._samples.of("m")]
            assert any("the shadow s0 answers otherwise" in text for text in told) == bool(differs)
            for _ in range(5):  # it is gone: nobody is asked, and nobody notices
                status, outputs, _ = await infer(session, here, np.ones((1, 3), "f4"))
                assert status == 200

    run(scene())


def test_a_share_is_asked_and_no_more(tmp_path, files):
    async def scene():
        (tmp_path / "s").mkdir()
        async with (
            fleet(tmp_path) as (here, _, session), Replicas(tmp_path, files["twice"], 1) as present,
            Replicas(tmp_path / "s", files["thrice"], 1) as shadows,
        ):  # fmt: skip
            await serve(here, present, shadows, Shadow(0.25, Agreement("largest")))
            for _ in range(40):
                await infer(session, here, np.ones((1, 3), "f4"))
                await asyncio.sleep(0.005)
            assert await counted(here, 10) == (10, 0), "by the largest, three times is as good as twice"
            await serve(here, present, None, None)
            for _ in range(8):
                await infer(session, here, np.ones((1, 3), "f4"))
            assert await counted(here, 10) == (10, 0)

    run(scene())


def test_a_shadow_that_is_frozen_costs_no_caller_anything(tmp_path, files):
    async def scene():
        (tmp_path / "s").mkdir()
        async with (
            fleet(tmp_path) as (here, _, session), Replicas(tmp_path, files["twice"], 1) as present,
            Replicas(tmp_path / "s", files["also"], 1) as shadows,
        ):  # fmt: skip
            await serve(here, present, shadows, Shadow(1.0))
            await infer(session, here, np.ones((1, 3), "f4"))
            assert await counted(here, 1) == (1, 0)
            shadows.processes[0].send_signal(19)  # SIGSTOP
            try:
                answers = await asyncio.gather(*(infer(session, here, np.ones((1, 3), "f4"), timeout_ms=2000) for _ in range(50)))
            finally:
                shadows.processes[0].send_signal(18)
            assert {status for status, _, _ in answers} == {200}
            assert (await counted(here, 1))[0] <= 3, "two at most were under way"

    run(scene())

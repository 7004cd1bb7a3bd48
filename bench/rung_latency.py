"""What each kind of sandbox adds to a call, over the same worker outside of any sandbox: the same caller, sockets and tensor everywhere.

``python -m bench.rung_latency [--rungs bubblewrap docker gvisor] [--calls N] [--real-calls N]``

An image of 602,112 bytes goes in. ``trivial`` answers with next to no work, so that what is seen is the transport; ``shufflenet`` is the
graph of a real network from the tests of the ``onnx`` package. Every worker runs at one time and they are called in turn in short blocks,
each in another order, so that all see the same machine. ``ratio_p50`` is the median over blocks of a rung's median over that of the bare
worker in the very same block; ``ratio_p10`` compares the tenth of all calls that were the least disturbed by other work.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper
from onnx.backend.test import data as onnx_test_data

from bench.report import report
from bench.sandboxes import CPUS, MEMORY_BYTES, RUNGS, Box, Caller, Question, bare_worker, reference, run, running, scratch, wait_for_socket
from edge_agent.warden.ports import SOCKET_NAME
from skerry.wire import oip

BARE = "bare"
BARS = {"bubblewrap": 1.03, "docker": 1.03}
BLOCK = {"trivial": 20, "shufflenet": 5}
WARM_UP_CALLS = 30
SHAPE = (1, 3, 224, 224)
RANDOM_SEED = 7


def trivial_model(path: Path) -> Path:
    """The image to its four corners."""
    ends = [onnx.numpy_helper.from_array(np.array(at, "i8"), name) for name, at in (("from", [0, 0, 0, 0]), ("to", [1, 1, 1, 4]))]
    graph = oh.make_graph(
        [oh.make_node("Slice", ["x", "from", "to"], ["y"])],
        "corner",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, SHAPE)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 1, 1, 4))],
        ends,
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), path)
    return path


def real_model(path: Path) -> Path | None:
    """The light ShuffleNet of the ``onnx`` package's tests; None where the package has none."""
    found = Path(onnx_test_data.__path__[0]) / "light" / "light_shufflenet.onnx"
    if not found.is_file():
        return None
    path.write_bytes(found.read_bytes())
    return path


def question(model: Path) -> Question:
    """An image of noise."""
    graph = onnx.load(str(model)).graph
    constants = {one.name for one in graph.initializer}
    (entry,) = [one.name for one in graph.input if one.name not in constants]
    pixels = random.Random(RANDOM_SEED).randbytes(SHAPE[1] * SHAPE[2] * SHAPE[3])
    values = np.frombuffer(pixels, "u1").astype("f4") / 255
    return Question(model, [oip.Tensor(entry, "FP32", SHAPE, values.tobytes())])


def in_turn(callers: dict[str, Caller], *, calls: int, block: int) -> dict[str, list[list[float]]]:
    """Milliseconds of each call, by block."""
    took: dict[str, list[list[float]]] = {name: [] for name in callers}
    order = list(callers)
    shuffle = random.Random(RANDOM_SEED).shuffle
    for caller in callers.values():
        caller.ask_and_check()
        for _ in range(WARM_UP_CALLS):
            caller.ask()
    for _ in range(-(-calls // block)):
        shuffle(order)
        for name in order:
            ask, times = callers[name].ask, []
            for _ in range(block):
                started = time.perf_counter()
                ask()
                times.append((time.perf_counter() - started) * 1000)
            took[name].append(times)
    for caller in callers.values():
        caller.ask_and_check()
    return took


def fastest_tenth(blocks: list[list[float]]) -> float:
    """The first decile of all calls, in milliseconds."""
    return statistics.quantiles([ms for block in blocks for ms in block], n=10, method="inclusive")[0]


def figures(took: dict[str, list[list[float]]]) -> dict[str, object]:
    """By rung, beside the bare worker."""
    bare = took[BARE]
    found: dict[str, object] = {}
    for name, blocks in took.items():
        p50_ms = statistics.median(ms for block in blocks for ms in block)
        one: dict[str, object] = {"p50_ms": round(p50_ms, 4), "calls": sum(map(len, blocks))}
        if name != BARE:
            ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(blocks, bare, strict=True))
            added_ms = statistics.median(statistics.median(a) - statistics.median(b) for a, b in zip(blocks, bare, strict=True))
            one |= {"added_p50_ms": round(added_ms, 4), "ratio_p50": round(ratio, 4)}
            one["ratio_p10"] = round(fastest_tenth(blocks) / fastest_tenth(bare), 4)
            if name in BARS:
                one |= {"bar_ratio": BARS[name], "reached": ratio <= BARS[name]}
        found[name] = one
    return found


@contextlib.contextmanager
def bare(folder: Path, model: Path) -> Iterator[Path]:
    """The worker outside of any sandbox; yields its socket."""
    process = bare_worker(folder, model, [])
    try:
        wait_for_socket(folder / SOCKET_NAME)
        yield folder / SOCKET_NAME
    finally:
        process.kill()
        process.wait()


async def one_model(folder: Path, name: str, file: Path, rungs: list[str], calls: int) -> dict[str, object]:
    """Every rung and the bare worker with one model."""
    asked = question(file)
    model = reference(name, file)
    async with contextlib.AsyncExitStack() as stack:
        paths = {BARE: stack.enter_context(bare(folder / f"{name}-bare", file))}
        for rung in rungs:
            box = await stack.enter_async_context(running(Box(folder / f"{name}-{rung}", rung, model=model, file=file)))
            box.want(1)
            (paths[rung],) = await box.sockets(1)
        callers = {one: stack.enter_context(contextlib.closing(Caller(path, asked))) for one, path in paths.items()}
        await asyncio.sleep(2.0)  # what the workers give back after their start is given back
        return figures(await asyncio.to_thread(in_turn, callers, calls=calls, block=BLOCK[name]))


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Both models."""
    found: dict[str, object] = {"tensor_bytes": 4 * SHAPE[1] * SHAPE[2] * SHAPE[3], "memory_bytes": MEMORY_BYTES, "cpus": CPUS}
    with scratch() as folder:
        trivial = trivial_model(folder / "trivial.onnx")
        found["trivial"] = await one_model(folder, "trivial", trivial, arguments.rungs, arguments.calls)
        real = real_model(folder / "shufflenet.onnx")
        if real is not None:
            found["shufflenet"] = await one_model(folder, "shufflenet", real, arguments.rungs, arguments.real_calls)
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--calls", type=int, default=2000, help="of the trivial model, each rung")
    parser.add_argument("--real-calls", type=int, default=500, help="of the network, each rung")
    arguments = parser.parse_args()
    report("rung_latency", **run(lambda: measure(arguments)))


if __name__ == "__main__":
    main()

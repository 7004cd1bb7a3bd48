"""The models that every server is measured with, what is put into them, and what ONNX Runtime alone makes of it.

``python -m bench.models FILE INPUTS`` is one process of bare ONNX Runtime: it says how often it ran within the seconds that it is told on
standard input, a number a line.

Threads are pinned alike for whoever serves them: one within an operator, one between operators, none that spins.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}
"""What every process that runs a model is started with, in a sandbox or not."""
NAMES = ("tiny", "speech", "shufflenet", "squeezenet")
STEPS = "steps"
"""Some milliseconds of matrix products on 256 bytes: what is computed is what costs, not what is carried."""
STEPS_WIDTH, STEPS_COUNT = 512, 8
DATATYPES = {"float32": "FP32", "int64": "INT64"}
IMAGE = (1, 3, 224, 224)
TOLERANCE = 1e-3
RANDOM_SEED = 4

Feeds = dict[str, np.ndarray]


class Model(msgspec.Struct, frozen=True):
    """A model's file, one call's inputs and the right outputs."""

    name: str
    file: Path
    feeds: Feeds
    truth: list[np.ndarray]
    output_names: list[str]

    @property
    def tensor_bytes(self) -> int:
        """Of the inputs together."""
        return sum(value.nbytes for value in self.feeds.values())

    def check(self, outputs: list[np.ndarray]) -> None:
        """Raise unless these are the right ones."""
        if len(outputs) != len(self.truth):
            raise RuntimeError(f"{self.name}: {len(outputs)} outputs, expected {len(self.truth)}")
        for got, right in zip(outputs, self.truth, strict=True):
            if got.size != right.size or not np.allclose(got.reshape(-1), right.reshape(-1), rtol=TOLERANCE, atol=TOLERANCE):
                raise RuntimeError(f"{self.name}: a wrong answer: {got.reshape(-1)[:4]} for {right.reshape(-1)[:4]}")

    def check_raw(self, body: bytes) -> None:
        """The same for all outputs' bytes, one after the other."""
        outputs, offset = [], 0
        for right in self.truth:
            outputs.append(np.frombuffer(body[offset : offset + right.nbytes], right.dtype))
            offset += right.nbytes
        if offset != len(body):
            raise RuntimeError(f"{self.name}: {len(body)} bytes came back, expected {offset}")
        self.check(outputs)


def session_of(file: Path) -> ort.InferenceSession:
    """A bare session with the options that everybody is given."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(file), sess_options=options, providers=["CPUExecutionProvider"])


def tiny_model(path: Path) -> Path:
    """64 numbers to 10: a matrix product."""
    import onnx
    import onnx.helper as oh

    weights = np.random.default_rng(RANDOM_SEED).standard_normal((64, 10)).astype("f4")
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 64])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 10])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), path)
    return path


def steps_model(path: Path) -> Path:
    """64 numbers to 10, by way of many products of matrices, the same each time."""
    import onnx
    import onnx.helper as oh

    noise = np.random.default_rng(RANDOM_SEED)
    width = STEPS_WIDTH
    weights = {
        "in": noise.standard_normal((64, width)).astype("f4") / 8,
        "step": noise.standard_normal((width, width)).astype("f4") / np.sqrt(width, dtype="f4"),
        "out": noise.standard_normal((width, 10)).astype("f4"),
        "rows": np.ones((128, 1), "f4"),
        "first": np.array([0], "i8"),
    }
    nodes = [oh.make_node("MatMul", ["x", "in"], ["row"]), oh.make_node("MatMul", ["rows", "row"], ["h0"])]
    for number in range(STEPS_COUNT):
        nodes.append(oh.make_node("MatMul", [f"h{number}", "step"], [f"p{number}"]))
        nodes.append(oh.make_node("Tanh", [f"p{number}"], [f"h{number + 1}"]))
    nodes += [
        oh.make_node("Gather", [f"h{STEPS_COUNT}", "first"], ["last"], axis=0),
        oh.make_node("MatMul", ["last", "out"], ["y"]),
    ]
    graph = oh.make_graph(
        nodes,
        STEPS,
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 10])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), path)
    return path


def light_model(path: Path, name: str) -> Path:
    """The graph of a real network from the tests of the ``onnx`` package: its weights are constants that it makes itself,
    and so is what it answers."""
    from onnx.backend.test import data

    found = Path(data.__path__[0]) / "light" / f"light_{name}.onnx"
    if not found.is_file():
        raise RuntimeError(f"the installed onnx package has no {found.name}: take one that has its tests with it")
    path.write_bytes(found.read_bytes())
    return path


def speech_model() -> Path:
    """The catalogue's speech detector."""
    from skerry.cli import catalogue
    from skerry.demo.story import CACHE, MODELS

    manifest = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == "speech-detector")
    return catalogue.materialise(manifest, CACHE).resolve()


def model(folder: Path, name: str) -> Model:
    """The model of that name, its file below ``folder`` where it has to be made."""
    noise = np.random.default_rng(RANDOM_SEED)
    feeds: Feeds
    if name == "speech":
        file = speech_model()
        feeds = {
            "input": noise.uniform(-0.1, 0.1, (1, 576)).astype("f4"),
            "state": np.zeros((2, 1, 128), "f4"),
            "sr": np.array(16000, "i8"),
        }
    elif name == "tiny":
        file, feeds = tiny_model(folder / "tiny.onnx"), {"x": noise.random((1, 64), "f4")}
    elif name == STEPS:
        file, feeds = steps_model(folder / "steps.onnx"), {"x": noise.random((1, 64), "f4")}
    else:
        file, feeds = light_model(folder / f"{name}.onnx", name), {}
    session = session_of(file)
    if not feeds:
        feeds = {session.get_inputs()[0].name: noise.random(IMAGE, "f4")}
    truth = session.run(None, feeds)
    if any(not np.isfinite(output).all() for output in truth):
        raise RuntimeError(f"{name}: the outputs are no numbers")
    return Model(name, file, feeds, truth, [output.name for output in session.get_outputs()])


def models(folder: Path, names: Iterable[str]) -> list[Model]:
    """Several of them."""
    return [model(folder, name) for name in names]


def bare(of: Model) -> Callable[[], object]:
    """One run in this process."""
    session, feeds = session_of(of.file), of.feeds
    return lambda: session.run(None, feeds)


def main() -> None:
    """Run as often as fits, whenever told to."""
    session = session_of(Path(sys.argv[1]))
    with np.load(sys.argv[2]) as inputs:
        feeds = {name: inputs[name] for name in inputs.files}
    session.run(None, feeds)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        runs, started = 0, time.perf_counter()
        until = started + float(line)
        while time.perf_counter() < until:
            session.run(None, feeds)
            runs += 1
        sys.stdout.write(f"{runs / (time.perf_counter() - started)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

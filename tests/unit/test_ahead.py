"""The model that a waiting worker serves once is what its source here says, and runs."""

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort

from edge_agent.worker import ahead

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def ones(name: str, shape: list[int]) -> onnx.TensorProto:
    return oh.make_tensor(name, FLOAT, shape, np.ones(shape, "f4").tobytes(), raw=True)


def source() -> onnx.ModelProto:
    """``onnx.save(source(), ahead.SMALL_MODEL)`` writes the file again."""
    graph = oh.make_graph(
        [
            oh.make_node("Conv", ["x", "filter"], ["c"], pads=[1, 1]),
            oh.make_node("Relu", ["c"], ["r"]),
            oh.make_node("Transpose", ["r"], ["t"], perm=[2, 0, 1]),
            oh.make_node("LSTM", ["t", "w", "u"], ["l"], hidden_size=4),
            oh.make_node("Squeeze", ["l", "one"], ["s"]),
            oh.make_node("MatMul", ["t", "m"], ["p"]),
            oh.make_node("Sigmoid", ["p"], ["g"]),
            oh.make_node("Shape", ["g"], ["h"]),
            oh.make_node("Reshape", ["g", "h"], ["y"]),
        ],
        "small",
        [oh.make_tensor_value_info("x", FLOAT, ahead.INPUT_SHAPE)],
        [oh.make_tensor_value_info("y", FLOAT, [8, 1, 4]), oh.make_tensor_value_info("s", FLOAT, [8, 1, 4])],
        [
            ones("filter", [4, 1, 3]),
            ones("w", [1, 16, 4]),
            ones("u", [1, 16, 4]),
            ones("m", [4, 4]),
            oh.make_tensor("one", INT64, [1], (1).to_bytes(8, "little"), raw=True),
        ],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)


def test_the_small_model_is_that_of_its_source_and_runs():
    held = onnx.load(ahead.SMALL_MODEL)
    onnx.checker.check_model(held, full_check=True)
    assert held == source()
    session = ort.InferenceSession(str(ahead.SMALL_MODEL), providers=["CPUExecutionProvider"])
    y, s = session.run(None, {"x": np.zeros(ahead.INPUT_SHAPE, "f4")})
    assert y.shape == s.shape == (8, 1, 4)
    assert np.allclose(y, 0.5)

"""Small models that between them hold many kinds of operators, and what to feed them."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper as oh
from onnx import TensorProto, numpy_helper

from skerry.wire import oip

DATATYPES = {"float32": "FP32", "int64": "INT64", "bool": "BOOL", "uint8": "UINT8", "object": "BYTES"}
FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING

Arrays = dict[str, np.ndarray]


def tensor_of(name: str, array: np.ndarray) -> oip.Tensor:
    data = oip.join_bytes([text.encode() for text in array.ravel()]) if array.dtype == object else array.tobytes()
    return oip.Tensor(name, DATATYPES[array.dtype.name], array.shape, data)


def _model(nodes: list, feeds: Arrays, outputs: dict[str, int], constants: Arrays) -> bytes:
    inputs = [
        oh.make_tensor_value_info(name, STRING if array.dtype == object else oh.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = oh.make_graph(
        nodes,
        "many",
        inputs,
        [oh.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [oh.make_opsetid("", 20), oh.make_opsetid("ai.onnx.ml", 3)]
    return oh.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def numbers() -> tuple[bytes, Arrays]:
    """Images, sequences, matrices large enough for two threads, sorting, norms."""
    feeds = {"image": _floats(1, 3, 32, 32), "sequence": _floats(5, 1, 8), "left": _floats(2, 256, 64), "right": _floats(2, 64, 256)}
    constants = {
        "kernel": _floats(8, 3, 3, 3),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "lstm_w": _floats(1, 16, 8),
        "lstm_r": _floats(1, 16, 4),
        "gru_w": _floats(1, 12, 8),
        "gru_r": _floats(1, 12, 4),
        "three": np.array([3], np.int64),
        "ones": np.ones(256, np.float32),
        "axis": np.array(1, np.int64),
        "frame": np.array(16, np.int64),
        "step": np.array(8, np.int64),
    }
    nodes = [
        oh.make_node("Conv", ["image", "kernel"], ["conv"], pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["conv"], ["relu"]),
        oh.make_node("Resize", ["relu", "", "scales"], ["resized"], mode="linear"),
        oh.make_node("MaxPool", ["resized"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        oh.make_node("GlobalAveragePool", ["pooled"], ["average"]),
        oh.make_node("LSTM", ["sequence", "lstm_w", "lstm_r"], ["lstm"], hidden_size=4),
        oh.make_node("GRU", ["sequence", "gru_w", "gru_r"], ["gru"], hidden_size=4),
        oh.make_node("MatMul", ["left", "right"], ["product"]),
        oh.make_node("Einsum", ["left", "right"], ["einsum"], equation="bij,bjk->bik"),
        oh.make_node("LayerNormalization", ["product", "ones"], ["norm"]),
        oh.make_node("Softmax", ["norm"], ["softmax"]),
        oh.make_node("TopK", ["softmax", "three"], ["top", "where"]),
        oh.make_node("CumSum", ["sequence", "axis"], ["sums"]),
        oh.make_node("Gelu", ["sums"], ["gelu"]),
        oh.make_node("Flatten", ["image"], ["flat"]),
        oh.make_node("STFT", ["flat", "step", "", "frame"], ["spectrum"]),
        oh.make_node("Cast", ["sequence"], ["half"], to=TensorProto.FLOAT16),
        oh.make_node("Cast", ["half"], ["whole"], to=FLOAT),
    ]
    outputs = dict.fromkeys(["average", "pooled", "lstm", "gru", "product", "einsum", "top", "gelu", "spectrum", "whole"], FLOAT)
    return _model(nodes, feeds, outputs | {"where": INT64}, constants), feeds


def _body(nodes: list, inputs: list[tuple[str, int, list]], outputs: list[tuple[str, int, list]]) -> onnx.GraphProto:
    return oh.make_graph(nodes, "body", [oh.make_tensor_value_info(*i) for i in inputs], [oh.make_tensor_value_info(*o) for o in outputs])


def control() -> tuple[bytes, Arrays]:
    """Graphs within graphs, and sequences."""
    feeds = {"x": _floats(4, 3), "times": np.array(7, np.int64), "condition": np.array(True)}
    loop = _body(
        [oh.make_node("Add", ["carried", "x"], ["next"]), oh.make_node("Identity", ["go"], ["go_on"])],
        [("i", INT64, []), ("go", TensorProto.BOOL, []), ("carried", FLOAT, [4, 3])],
        [("go_on", TensorProto.BOOL, []), ("next", FLOAT, [4, 3])],
    )
    scan = _body(
        [oh.make_node("Add", ["sum", "row"], ["sum_next"]), oh.make_node("Identity", ["sum_next"], ["row_out"])],
        [("sum", FLOAT, [3]), ("row", FLOAT, [3])],
        [("sum_next", FLOAT, [3]), ("row_out", FLOAT, [3])],
    )
    nodes = [
        oh.make_node("Loop", ["times", "condition", "x"], ["looped"], body=loop),
        oh.make_node(
            "If",
            ["condition"],
            ["chosen"],
            then_branch=_body([oh.make_node("Neg", ["x"], ["then"])], [], [("then", FLOAT, [4, 3])]),
            else_branch=_body([oh.make_node("Abs", ["x"], ["else"])], [], [("else", FLOAT, [4, 3])]),
        ),
        oh.make_node("Scan", ["zeros", "x"], ["last", "scanned"], body=scan, num_scan_inputs=1),
        oh.make_node("SequenceConstruct", ["x", "looped"], ["sequence"]),
        oh.make_node("ConcatFromSequence", ["sequence"], ["joined"], axis=0),
        oh.make_node("NonZero", ["x"], ["there"]),
    ]
    outputs = dict.fromkeys(["looped", "chosen", "last", "scanned", "joined"], FLOAT) | {"there": INT64}
    return _model(nodes, feeds, outputs, {"zeros": np.zeros(3, np.float32)}), feeds


def texts() -> tuple[bytes, Arrays]:
    """Strings, which ONNX Runtime allocates one by one, with locales and regular expressions."""
    feeds = {"text": np.array(["Edge", "the BOX", "x@y.org"], dtype=object)}
    nodes = [
        oh.make_node("StringNormalizer", ["text"], ["lower"], case_change_action="LOWER", locale="C"),
        oh.make_node("StringConcat", ["lower", "text"], ["twice"]),
        oh.make_node("StringSplit", ["text"], ["words", "how_many"], delimiter=" "),
        oh.make_node("RegexFullMatch", ["text"], ["is_address"], pattern=r"[a-z]+@[a-z.]+"),
        oh.make_node(
            "LabelEncoder",
            ["lower"],
            ["label"],
            domain="ai.onnx.ml",
            keys_strings=["edge", "the box"],
            values_int64s=[1, 2],
            default_int64=9,
        ),
    ]
    outputs = {"twice": STRING, "words": STRING, "how_many": INT64, "is_address": TensorProto.BOOL, "label": INT64}
    return _model(nodes, feeds, outputs, {}), feeds


def quantized() -> tuple[bytes, Arrays]:
    """Eight bits: code paths that are chosen by the processor's features."""
    feeds = {"x": _floats(1, 4, 16, 16), "left": np.arange(64, dtype=np.uint8).reshape(8, 8), "right": np.eye(8, dtype=np.uint8)}
    scale, zero = np.array(0.05, np.float32), np.array(128, np.uint8)
    constants = {"scale": scale, "zero": zero, "kernel": np.arange(4 * 4 * 9, dtype=np.uint8).reshape(4, 4, 3, 3)}
    nodes = [
        oh.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        oh.make_node("QLinearConv", ["q", "scale", "zero", "kernel", "scale", "zero", "scale", "zero"], ["qconv"], pads=[1, 1, 1, 1]),
        oh.make_node("DequantizeLinear", ["qconv", "scale", "zero"], ["conv"]),
        oh.make_node("QLinearMatMul", ["left", "scale", "zero", "right", "scale", "zero", "scale", "zero"], ["qproduct"]),
        oh.make_node("MatMulInteger", ["left", "right"], ["product"]),
        oh.make_node("Cast", ["product"], ["wide"], to=INT64),
        oh.make_node("DynamicQuantizeLinear", ["x"], ["dynamic", "dynamic_scale", "dynamic_zero"]),
    ]
    outputs = {"conv": FLOAT, "qproduct": TensorProto.UINT8, "wide": INT64, "dynamic": TensorProto.UINT8, "dynamic_scale": FLOAT}
    return _model(nodes, feeds, outputs, constants), feeds


KINDS: dict[str, Callable[[], tuple[bytes, Arrays]]] = {"numbers": numbers, "control": control, "texts": texts, "quantized": quantized}

"""The network that is read out of a file is the one that ONNX's own library wrote into it, and a hostile file gets a reason."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coordinator.core import onnx_graph
from coordinator.core.onnx_file import NotOnnx
from skerry.wire.model_graph import GraphNode, GraphTensor

TIMES = "\u00d7"


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def made(nodes, inputs, outputs, weights=(), middle=(), opset=17, metadata=None):
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in weights], value_info=middle
    )
    model = helper.make_model(
        graph, producer_name="tests", opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("other", 99)]
    )
    helper.set_model_props(model, metadata or {})
    return model


def read(model):
    return onnx_graph.graph(memoryview(model.SerializeToString()))


def test_operators_weights_and_tensors_are_told():
    model = made(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="first"),
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones((2, 5), np.float16))),
            helper.make_node("Mul", ["c", "k"], ["m"]),
            helper.make_node("Relu", ["m"], ["y"]),
        ],
        [value("x", ["batch", 3, None, 32]), value("w", [8, 3, 3, 3])],
        [value("y", ["batch", 8], TensorProto.INT64)],
        [("w", np.zeros((8, 3, 3, 3), np.float32)), ("b", np.zeros(8, np.float32))],
        [value("c", ["batch", 8, 30, 30])],
        metadata={"character": "a\nb\nc", "author": "nobody"},
    )
    found = read(model)
    assert (found.producer, found.opset, found.is_cut, found.labels) == ("tests", 17, False, ["a", "b", "c"])
    assert found.inputs == [GraphTensor("x", "FP32", ["batch", 3, "?", 32])], "a weight that may be replaced is no input"
    assert found.outputs == [GraphTensor("y", "INT64", ["batch", 8])]
    assert found.nodes == [
        GraphNode("Conv", "first", ["x"], ["c"], 8 * 27 + 8, ["8*3*3*3".replace("*", TIMES), "8"], "batch*8*30*30".replace("*", TIMES)),
        GraphNode("Mul", "", ["c"], ["m"], 10, [f"2{TIMES}5"]),
        GraphNode("Relu", "", ["m"], ["y"], shape=f"batch{TIMES}8"),
    ]
    assert found.operators == {"Conv": 1, "Constant": 1, "Mul": 1, "Relu": 1}
    assert (found.parameters, found.weight_bytes) == (8 * 27 + 8 + 10, 4 * (8 * 27 + 8) + 20)


def test_operators_in_branches_are_counted_however_deep():
    leaf = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "leaf", [], [value("z", [1])])
    inner = helper.make_node("If", ["c"], ["z"], then_branch=leaf, else_branch=leaf)
    branch = helper.make_graph([inner], "branch", [], [value("z", [1])])
    outer = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=leaf)
    [node] = read(made([outer], [value("c", [], TensorProto.BOOL), value("x", [1])], [value("y", [1])])).nodes
    assert (node.op, node.inner, node.inputs) == ("If", 4, ["c"])


def test_numbers_that_a_file_makes_up_stay_such_as_json_can_carry():
    tensor = TensorProto(name="w", data_type=TensorProto.DOUBLE, dims=[2**31 - 1] * 8)
    model = made([helper.make_node("Add", ["x", "w"], ["y"])], [value("x", [1])], [value("y", [1])])
    model.graph.initializer.append(tensor)
    found = read(model)
    assert found.parameters == found.weight_bytes == found.nodes[0].parameters == 2**53
    negative = made([helper.make_node("Relu", ["x"], ["y"])], [value("x", [-1, 0, 2**40])], [value("y", [1])])
    assert read(negative).inputs[0].shape == ["?", "?", "?"]


def test_names_are_cut_and_harmless():
    found = read(made([helper.make_node("Relu", ["x" * 5000], ["y\x00\x1b[2J"], name="\u202e" * 3)], [value("x", [1])], [value("y", [1])]))
    [node] = found.nodes
    assert len(node.inputs[0]) == 120
    assert node.outputs == ["y\ufffd\ufffd[2J"]
    assert node.name == "\ufffd" * 3


def test_of_a_network_that_is_too_large_the_beginning_is_told_and_all_of_it_counted():
    nodes = [helper.make_node("Relu", [f"t{n}"], [f"t{n + 1}"]) for n in range(onnx_graph.MOST_NODES + 5)]
    found = read(made(nodes, [value("t0", [1])], [value("y", [1])]))
    assert (len(found.nodes), found.is_cut, found.operators) == (onnx_graph.MOST_NODES, True, {"Relu": onnx_graph.MOST_NODES + 5})


@pytest.mark.parametrize("cut", [1, 7, 40, 90])
def test_a_file_that_is_cut_off_is_refused_and_nothing_else_happens(cut):
    model = made([helper.make_node("Conv", ["x", "w"], ["y"])], [value("x", [1])], [value("y", [1])], [("w", np.zeros((4, 4), np.float32))])
    with pytest.raises(NotOnnx, match=r"not ONNX|truncated|cut off"):
        onnx_graph.graph(memoryview(model.SerializeToString()[:-cut]))


def test_the_small_model_of_the_package_is_told_as_onnx_has_it(tmp_path):
    path = onnx_graph.__file__.replace("coordinator/core/onnx_graph.py", "edge_agent/worker/small.onnx")
    model = onnx.load(path)
    found = read(model)
    assert [node.op for node in found.nodes] == [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    weights = {one.name: list(one.dims) for one in model.graph.initializer}
    assert found.parameters == sum(int(np.prod(dims)) for dims in weights.values())
    assert json.dumps(found.inputs[0].shape) == json.dumps(
        [d.dim_value or d.dim_param or "?" for d in model.graph.input[0].type.tensor_type.shape.dim]
    )

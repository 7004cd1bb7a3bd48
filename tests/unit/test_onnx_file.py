"""A pushed file is taken only where it is a whole ONNX model that needs no other file; a hostile one is told so and nothing worse."""

import contextlib
import io
import mmap
import zipfile

import onnx
import onnx.helper as oh
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.onnx_file import NoSuchTensor, NotOnnx, check, check_state
from skerry.wire.messages import StateTensor

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64)


def scale(*, weights: onnx.TensorProto | None = None, more: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """y = 2 x."""
    graph = oh.make_graph(
        [oh.make_node("Mul", ["x", "two"], ["y"]), *(more or [])],
        "scale",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3])],
        [weights or oh.make_tensor("two", onnx.TensorProto.FLOAT, [1], [2.0])],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)


def outside(location: str, name: str = "two") -> onnx.TensorProto:
    """A tensor whose values lie in another file."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


WHOLE = scale().SerializeToString()


def reason(content: bytes) -> str:
    """Why it is refused; empty where it is taken."""
    try:
        check(memoryview(content))
    except NotOnnx as exc:
        return str(exc) or "refused without a word"
    return ""


def is_model(content: bytes) -> bool:
    """Whether onnx's own parser reads a model with a graph and a version in it."""
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        return False
    return model.HasField("graph") and model.HasField("ir_version")


def test_a_whole_model_is_taken(scale_model):
    assert reason(scale_model.read_bytes()) == ""
    assert reason(WHOLE) == ""


def test_a_model_cut_anywhere_is_refused_unless_what_is_left_is_one():
    for length in range(len(WHOLE)):
        assert reason(WHOLE[:length]) or is_model(WHOLE[:length]), f"taken when cut after {length} bytes"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (PNG, "not an ONNX model"),
        (b"name: a\nmodel: m:1\n", "not"),
        (b"{}", "not"),
        (bytes(1000), "field 0"),
        (b"\xff" * 1000, "not ONNX"),
        (oh.make_tensor("t", onnx.TensorProto.FLOAT, [2], [1.0, 2.0]).SerializeToString(), "not"),
        (oh.make_node("Mul", ["x", "y"], ["z"]).SerializeToString(), "no ir_version"),
        (onnx.ModelProto(ir_version=9).SerializeToString(), "no graph"),
        (onnx.ModelProto(graph=scale().graph).SerializeToString(), "no ir_version"),
        (scale().graph.SerializeToString(), "not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_files_are_refused(content, word):
    assert word in reason(content)


def test_a_zip_is_refused_even_with_a_model_in_it():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.onnx", WHOLE)
    assert reason(packed.getvalue())


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("../x", "outside"),
        ("a/../../x", "outside"),
        ("/etc/passwd", "outside"),
        ("..\\x", "outside"),
        ("weights.bin", "not part of the push"),
        ("", "not part of the push"),
    ],
)
def test_values_in_another_file_are_refused_by_its_name(location, word):
    said = reason(scale(weights=outside(location)).SerializeToString())
    assert repr(location) in said
    assert word in said
    assert said.startswith("graph.initializer.external_data.location: ")


def branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return oh.make_graph(
        [oh.make_node("Identity", [tensor.name], ["out"])], "branch", [], [oh.make_tensor_value_info("out", 1, [1])], [tensor]
    )


def hiding_places() -> dict[str, onnx.ModelProto]:
    constant = oh.make_node("Constant", [], ["c"], value=outside("weights.bin", "c"))
    fine = oh.make_tensor("d", onnx.TensorProto.FLOAT, [1], [1.0])
    either = oh.make_node("If", ["x"], ["z"], then_branch=branch(fine), else_branch=branch(outside("weights.bin", "e")))
    sparse = scale()
    entry = sparse.graph.sparse_initializer.add(dims=[9])
    entry.values.CopyFrom(outside("weights.bin", "s"))
    function = scale()
    function.functions.add(name="f", domain="d", node=[constant])
    training = scale()
    training.training_info.add().algorithm.CopyFrom(branch(outside("weights.bin", "t")))
    return {
        "node.attribute.t": scale(more=[constant]),
        "node.attribute.g.initializer": scale(more=[either]),
        "sparse_initializer.values": sparse,
        "functions.node.attribute.t": function,
        "training_info.algorithm.initializer": training,
    }


@pytest.mark.parametrize("place", hiding_places())
def test_values_in_another_file_are_found_wherever_a_tensor_may_stand(place):
    said = reason(hiding_places()[place].SerializeToString())
    assert f"{place}.external_data.location: 'weights.bin'" in said


def test_graphs_in_graphs_without_end_are_walked_without_falling_over():
    graph = branch(outside("weights.bin", "deep")).SerializeToString()
    for _ in range(3000):  # by hand: no protobuf library writes them so deep

        def part(field: int, content: bytes) -> bytes:
            size, length = b"", len(content)
            while length > 0x7F:
                size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
            return bytes([field << 3 | 2]) + size + bytes([length]) + content

        graph = part(1, part(5, part(6, graph)))
    assert "weights.bin" in reason(b"\x08\x09" + part(7, graph))


def test_a_mapped_file_can_be_closed_after_a_refusal(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(scale(weights=outside("weights.bin")).SerializeToString())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert "weights.bin" in reason(mapped)
    assert mapped.closed


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_from_anywhere_are_refused_and_nothing_else_is_raised(content):
    assert reason(content) or is_model(content)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_no_damage_to_a_model_raises_anything_but_a_refusal(data):
    content = bytearray(data.draw(st.sampled_from([WHOLE, scale(weights=outside("../x")).SerializeToString()])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 20))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                content += content[at : at + 40]
        if not content:
            break
    with contextlib.suppress(NotOnnx, NoSuchTensor):
        check(memoryview(bytes(content)))
        check_state(memoryview(bytes(content)), [StateTensor("x", "y")])


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_no_name_of_another_file_slips_through(location):
    assert "location" in reason(scale(weights=outside(location)).SerializeToString())


def keeps(*state: tuple[str, str], content: bytes = WHOLE) -> str:
    """What is said of a model that shall keep ``state``; empty where it can."""
    try:
        check_state(memoryview(content), [StateTensor(*pair) for pair in state])
    except NoSuchTensor as exc:
        return str(exc) or "refused without a word"
    return ""


def remembering() -> onnx.ModelProto:
    """Two sums that go on from request to request, and a constant that is listed among the inputs, as old exporters do."""
    floats = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "h", "c", "two", "y", "hN", "cN")]
    nodes = [oh.make_node("Add", [a, b], [c]) for a, b, c in (("x", "two", "y"), ("h", "x", "hN"), ("c", "x", "cN"))]
    two = oh.make_tensor("two", onnx.TensorProto.FLOAT, [1], [2.0])
    return oh.make_model(oh.make_graph(nodes, "sums", floats[:4], floats[4:], [two]), ir_version=3)


def test_state_names_an_input_and_an_output_of_the_file():
    content = remembering().SerializeToString()
    assert keeps(content=content) == ""
    assert keeps(("h", "hN"), ("c", "cN"), content=content) == ""
    assert keeps(("h", "hN"), ("c", "hN"), content=content) == "", "one output may go to two inputs"
    assert keeps(("x", "y")) == ""


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([("state", "hN")], "'state' is not an input of the model: it has 'x', 'h', 'c'"),
        ([("h", "stateN")], "'stateN' is not an output of the model: it has 'y', 'hN', 'cN'"),
        ([("h", "h")], "'h' is not an output of the model: it has 'y', 'hN', 'cN'"),
        ([("h", "hN"), ("", "cN")], "'' is not an input of the model: it has 'x', 'h', 'c'"),
        ([("two", "hN")], "'two' is not an input of the model: it has 'x', 'h', 'c'"),
        ([("h", "hN"), ("h", "cN")], "the input 'h' is given twice"),
    ],
)
def test_a_name_that_the_file_lacks_is_said_with_those_that_it_has(state, words):
    assert keeps(*state, content=remembering().SerializeToString()) == words


def test_a_model_with_a_thousand_outputs_is_told_of_in_a_few_words():
    model = remembering()
    model.graph.output.extend([oh.make_tensor_value_info(f"more-{i}" + "o" * 500, 1, [1]) for i in range(1000)])
    assert len(keeps(("h", "none" * 1000), content=model.SerializeToString())) < 3000

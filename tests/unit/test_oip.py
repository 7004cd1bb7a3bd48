"""The Open Inference Protocol, byte by byte, from both ends."""

import contextlib
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import np_to_triton_dtype

from skerry.wire import oip


def request_json(**changes) -> dict:
    return {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}], **changes}


def parse(document: dict, binary: bytes = b"", header_length: str | None = None) -> oip.InferRequest:
    head = json.dumps(document).encode()
    return oip.parse_infer(head + binary, header_length or (str(len(head)) if binary else None))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"])
def test_what_tritons_client_sends_arrives_unchanged(dtype, binary):
    array = np.array([[0, 1, 1], [1, 0, 1]], dtype=dtype)
    tensor = triton.InferInput("x", [2, 3], np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array, binary_data=binary)
    body, header_length = triton.InferenceServerClient.generate_request_body([tensor], request_id="7", timeout=2000, priority=3)
    request = oip.parse_infer(body, None if header_length is None else str(header_length))
    assert (request.id, request.timeout_us, request.priority) == ("7", 2000, 3)
    assert bytes(request.inputs[0].data) == array.tobytes()


def test_tritons_client_reads_the_binary_answer():
    request = parse(request_json(id="a", parameters={"binary_data_output": True}))
    outputs = [oip.Tensor("y", "FP32", (2,), np.array([3, 4], "<f4").tobytes()), oip.Tensor("s", "BYTES", (1,), oip.join_bytes([b"\xff"]))]
    response = oip.render_infer(request, outputs, model_name="m", model_version="1", parameters={"skerry_served_by": "edge"})
    result = triton.InferenceServerClient.parse_response_body(b"".join(response.parts), header_length=response.header_length)
    assert result.as_numpy("y").tolist() == [3, 4]
    assert result.as_numpy("s").tolist() == [b"\xff"]
    assert result.get_response()["id"] == "a"


def test_only_the_outputs_asked_for_are_sent_each_in_its_form():
    request = parse(request_json(outputs=[{"name": "b", "parameters": {"binary_data": True}}, {"name": "a"}]))
    tensors = [oip.Tensor(name, "INT8", (1,), b"\x05") for name in "abc"]
    response = oip.render_infer(request, tensors, model_name="m", model_version="1", parameters={})
    head = json.loads(response.parts[0])
    assert [o["name"] for o in head["outputs"]] == ["b", "a"]
    assert head["outputs"][1]["data"] == [5]
    assert response.parts[1:] == [b"\x05"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"inputs": []}, "inputs: 1 to"),
        ({"inputs": "x"}, r"request: .*inputs"),
        ({"inputs": [{"name": "x", "shape": [2], "datatype": "FP99", "data": [1, 2]}]}, r"inputs\[0\].datatype"),
        ({"inputs": [{"name": "x", "shape": [-1], "datatype": "FP32", "data": []}]}, r"inputs\[0\].shape.*negative"),
        ({"inputs": [{"name": "x", "shape": [2**50], "datatype": "FP32", "data": []}]}, r"inputs\[0\].shape.*more than"),
        ({"inputs": [{"name": "x", "shape": [1] * 40, "datatype": "FP32", "data": [1]}]}, r"inputs\[0\].shape.*dimensions"),
        ({"inputs": [{"name": "x", "shape": [3], "datatype": "FP32", "data": [1.0]}]}, r"inputs\[0\].data: 1 elements"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "UINT8", "data": [300]}]}, r"inputs\[0\].data.*does not fit"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [1.5]}]}, r"inputs\[0\].data.*not INT8"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP16", "data": [1.5]}]}, "no JSON form"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "neither data nor"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 9}}]}, "9 bytes announced"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": -1}}]}, "number of bytes"),
        ({"parameters": {"timeout": -5}}, "parameters.timeout"),
        ({"parameters": {"timeout": "soon"}}, "parameters.timeout"),
        ({"parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
        ({"inputs": request_json()["inputs"] * 2}, "inputs: a name is given twice"),
        ({"outputs": [{"name": "y"}] * 2}, "outputs: a name is given twice"),
        ({"outputs": [{"name": "y", "parameters": {"classification": 3}}]}, r"outputs\[0\].parameters.classification.*not offered"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, r"outputs\[0\].parameters.binary_data"),
        ({"parameters": {"sequence_id": -1}}, "parameters.sequence_id"),
        ({"parameters": {"sequence_id": 2**64}}, "parameters.sequence_id"),
        ({"parameters": {"sequence_id": 1.5}}, "parameters.sequence_id"),
        ({"parameters": {"sequence_id": True}}, "parameters.sequence_id"),
        ({"parameters": {"sequence_id": "s" * 257}}, "parameters.sequence_id: 257 characters"),
        ({"parameters": {"sequence_id": "s", "sequence_start": "yes"}}, "parameters.sequence_start"),
        ({"parameters": {"idempotent": "no"}}, "parameters.idempotent"),
        ({"parameters": {"priority": 2**63}}, "parameters.priority"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1e39]}]}, "does not fit FP32"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": [2**63]}]}, "does not fit INT64"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "UINT64", "data": [-1]}]}, "does not fit UINT64"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "BF16", "data": [1.5]}]}, "no JSON form"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "INT32", "data": [math.nan]}]}, "not INT32"),
    ],
)
def test_a_broken_request_is_refused_by_the_name_of_its_field(changes, complaint):
    with pytest.raises(oip.BadRequest, match=complaint):
        parse(request_json(**changes))


@pytest.mark.parametrize("header_length", ["-1", "1e3", "99999", "\u0661", "9" * 5000, ""])
def test_a_header_length_that_cannot_be_is_refused(header_length):
    with pytest.raises(oip.BadRequest, match="Inference-Header-Content-Length"):
        oip.parse_infer(b"{}", header_length)


def test_bytes_after_the_last_tensor_are_refused():
    item = {"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}
    with pytest.raises(oip.BadRequest, match="2 bytes after"):
        parse({"inputs": [item]}, binary=b"123456")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("INT64", [-(2**63), 2**63 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("BOOL", [True, False]),
        ("FP64", [5e-324, -1.7976931348623157e308]),
        ("FP32", [math.nan, -math.inf]),
        ("FP64", [math.inf, math.nan]),
        ("BYTES", ["", "naïve \u0000 \U0001f6a2"]),
    ],
)
def test_extreme_values_go_through_to_tritons_client_and_back(datatype, values, binary):
    array = np.array(
        [v.encode() if datatype == "BYTES" else v for v in values], object if datatype == "BYTES" else oip.NUMPY_DTYPES[datatype]
    )
    tensor = triton.InferInput("x", [2], datatype)
    tensor.set_data_from_numpy(np.array(values, object) if datatype == "BYTES" and not binary else array, binary_data=binary)
    body, header_length = triton.InferenceServerClient.generate_request_body([tensor], outputs=[triton.InferRequestedOutput("x", binary)])
    request = oip.parse_infer(body, None if header_length is None else str(header_length))
    response = oip.render_infer(request, request.inputs, model_name="m", model_version="1", parameters={})
    result = triton.InferenceServerClient.parse_response_body(b"".join(response.parts), header_length=response.header_length)
    got = result.as_numpy("x").tolist()
    wanted = array.tolist() if binary or datatype != "BYTES" else values
    assert [str(v) for v in got] == [str(v) for v in wanted]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_go_in_binary_and_have_no_json_form(datatype):
    array = np.array([1.5, -2.0], np.float16 if datatype == "FP16" else ml_dtypes.bfloat16)
    tensor = triton.InferInput("x", [2], datatype)
    tensor.set_data_from_numpy(array, binary_data=True)
    body, header_length = triton.InferenceServerClient.generate_request_body([tensor])
    request = oip.parse_infer(body, str(header_length))
    response = oip.render_infer(request, request.inputs, model_name="m", model_version="1", parameters={})
    result = triton.InferenceServerClient.parse_response_body(b"".join(response.parts), header_length=response.header_length)
    assert result.as_numpy("x").tolist() == [1.5, -2.0]
    in_json = parse(request_json(outputs=[{"name": "x"}]))
    with pytest.raises(oip.BadRequest, match="no JSON form, ask for binary"):
        oip.render_infer(in_json, request.inputs, model_name="m", model_version="1", parameters={})


def test_an_answer_with_numbers_that_json_has_not_is_read_by_our_own_clients_too():
    tensor = oip.Tensor("y", "FP32", (3,), np.array([math.nan, -math.inf, 1], "<f4").tobytes())
    response = oip.render_infer(parse(request_json()), [tensor], model_name="m", model_version="1", parameters={})
    assert b"[NaN, -Infinity, 1.0]" in response.parts[0]
    assert oip.parse_answer(response.parts[0], None).outputs == [tensor]


def test_half_a_character_in_a_request_with_nan_is_refused():
    body = b'{"id":"\\ud800","inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}'
    with pytest.raises(oip.BadRequest, match="request"):
        oip.parse_infer(body, None)
    assert math.isnan(np.frombuffer(oip.parse_infer(body.replace(b"\\ud800", b"a"), None).inputs[0].data, "<f4")[0])


@pytest.mark.parametrize(("given_id", "step_id"), [(7, "7"), (2**64 - 1, str(2**64 - 1)), ("cam 3", "cam 3"), ("s" * 256, "s" * 256)])
def test_tritons_client_names_a_sequence_by_number_or_text(given_id, step_id):
    tensor = triton.InferInput("x", [1], "INT8")
    tensor.set_data_from_numpy(np.array([1], "i1"))
    body, header_length = triton.InferenceServerClient.generate_request_body([tensor], sequence_id=given_id, sequence_end=True)
    assert oip.parse_infer(body, str(header_length)).sequence == oip.SequenceStep(step_id, start=False, end=True)


@pytest.mark.parametrize("none", [{}, {"sequence_id": 0}, {"sequence_id": "", "sequence_start": True}, {"sequence_id": None}])
def test_a_request_without_a_sequence_belongs_to_none(none):
    request = parse(request_json(parameters=none))
    assert request.sequence is None
    assert request.idempotent
    assert not parse(request_json(parameters={"idempotent": False})).idempotent


def test_an_input_in_a_region_is_read_there_and_an_output_is_said_to_be_there():
    memory = {"in": np.arange(8, dtype="<f4").tobytes()}
    x, out = triton.InferInput("x", [2], "FP32"), triton.InferRequestedOutput("y")
    x.set_shared_memory("in", 8, offset=12)
    out.set_shared_memory("out", 64, offset=32)
    body, header_length = triton.InferenceServerClient.generate_request_body([x], outputs=[out, triton.InferRequestedOutput("z")])
    with pytest.raises(oip.BadRequest, match="not offered on this connection"):
        oip.parse_infer(body, header_length)
    request = oip.parse_infer(body, header_length, regions=lambda e, field: memory[e.region][e.offset : e.offset + e.size_bytes])
    assert np.frombuffer(request.inputs[0].data, "<f4").tolist() == [3, 4]
    y, z = oip.Tensor("y", "FP32", (2,), b"12345678"), oip.Tensor("z", "INT8", (1,), b"\x05")
    assert oip.placements(request, [y, z]) == [(y, oip.Extent("out", 32, 64))]
    response = oip.render_infer(request, [y, z], model_name="m", model_version="1", parameters={})
    result = triton.InferenceServerClient.parse_response_body(b"".join(response.parts), header_length=response.header_length)
    assert result.get_output("y") == {
        "name": "y",
        "datatype": "FP32",
        "shape": [2],
        "parameters": {"shared_memory_region": "out", "shared_memory_offset": 32, "shared_memory_byte_size": 8},
    }
    assert result.as_numpy("z").tolist() == [5]


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"shared_memory_byte_size": 12}, "12 bytes announced, the shape asks for 2 x 4"),
        ({}, "shared_memory_byte_size: is missing"),
        ({"shared_memory_byte_size": 8, "shared_memory_offset": -4}, "shared_memory_offset"),
        ({"shared_memory_byte_size": 8, "binary_data_size": 8}, "has data besides"),
        ({"shared_memory_byte_size": 8, "shared_memory_region": ""}, "shared_memory_region: 1 to"),
        ({"shared_memory_byte_size": 8, "shared_memory_region": "short"}, "gave 3 bytes instead of 8"),
    ],
)
def test_a_region_that_is_named_wrongly_is_refused(parameters, complaint):
    item = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"shared_memory_region": "r", **parameters}}
    with pytest.raises(oip.BadRequest, match=complaint):
        oip.parse_infer(
            json.dumps({"inputs": [item]}).encode(), None, regions=lambda e, _: bytes(3 if e.region == "short" else e.size_bytes)
        )


def test_an_output_that_is_larger_than_its_place_is_refused():
    out = {"name": "y", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}
    request = oip.parse_infer(json.dumps(request_json(outputs=[out])).encode(), None, regions=lambda e, _: b"")
    with pytest.raises(oip.BadRequest, match="4 bytes, the output takes 8"):
        oip.placements(request, [oip.Tensor("y", "FP32", (2,), bytes(8))])


@pytest.mark.parametrize(
    ("model_input", "size", "shape"),
    [
        (("x", "FP32", (-1, 4)), 32, (2, 4)),
        (("x", "FP32", (-1, 4)), 0, (0, 4)),
        (("x", "INT64", ()), 8, ()),
        (("x", "FP16", (3,)), 6, (3,)),
        (("x", "BYTES", (-1, 1)), 5, (1, 1)),
    ],
)
def test_a_body_without_json_is_the_models_one_input(model_input, size, shape):
    request = oip.parse_raw(bytes(size), [model_input])
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", model_input[1], shape)
    assert bytes(tensor.data) == (oip.join_bytes([bytes(size)]) if model_input[1] == "BYTES" else bytes(size))
    assert request.binary_default


@pytest.mark.parametrize(
    ("inputs", "size", "complaint"),
    [
        ([("x", "FP32", (1,))] * 2, 4, "one input, this one has 2"),
        ([], 4, "one input, this one has 0"),
        ([("x", "FP32", (-1, -1))], 4, "can't tell 2 free extents"),
        ([("x", "FP32", (-1, 4))], 17, "17 bytes do not fill"),
        ([("x", "FP32", (4,))], 32, "32 bytes do not fill"),
        ([("x", "FP32", (-1, 0))], 4, "do not fill"),
        ([("x", "BYTES", (2,))], 4, "one BYTES element"),
        ([("x", "STRING", (2,))], 4, "no binary form"),
        ([("x", "FP32", (2**50,))], 4, "shape"),
    ],
)
def test_a_body_without_json_that_can_not_be_the_input_is_refused(inputs, size, complaint):
    with pytest.raises(oip.BadRequest, match=complaint):
        oip.parse_raw(bytes(size), inputs)


def test_what_is_passed_on_says_what_the_caller_said_and_copies_nothing():
    tensors = [oip.Tensor("x", "FP32", (1,), memoryview(b"1234")), oip.Tensor("s", "BYTES", (1,), oip.join_bytes([b"a"]))]
    step = oip.SequenceStep("7", start=True)
    parts, headers = oip.render_request_parts(tensors, timeout_us=5000, priority=2, outputs=["y"], id="q", sequence=step, idempotent=False)
    assert parts[1] is tensors[0].data
    request = oip.parse_infer(b"".join(parts), headers[oip.HEADER_LENGTH])
    assert (request.id, request.timeout_us, request.priority, request.sequence, request.idempotent) == ("q", 5000, 2, step, False)
    assert [(output.name, output.binary) for output in request.outputs] == [("y", True)]
    assert [bytes(tensor.data) for tensor in request.inputs] == [bytes(tensor.data) for tensor in tensors]


def test_a_head_that_was_seen_before_takes_the_new_bodys_bytes():
    item = {"name": "x", "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": 1}}
    first, second = (parse({"inputs": [item]}, binary=byte) for byte in (b"a", b"b"))
    assert [bytes(request.inputs[0].data) for request in (first, second)] == [b"a", b"b"]
    first.outputs.append(oip.RequestedOutput("mine"))
    assert parse({"inputs": [item]}, binary=b"c").outputs == []


@given(st.binary(max_size=200), st.none() | st.integers(0, 220).map(str))
def test_no_bytes_do_anything_but_parse_or_be_refused(body, header_length):
    try:
        request = oip.parse_infer(body, header_length)
    except oip.BadRequest:
        return
    assert request.inputs


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 3))
def test_bytes_elements_survive_and_a_cut_is_noticed(elements, cut):
    joined = oip.join_bytes(elements)
    assert oip.split_bytes(joined, "x") == elements
    if 0 < cut <= len(joined) and elements:
        with contextlib.suppress(oip.BadRequest):
            assert oip.split_bytes(joined[:-cut], "x") != elements


def test_deep_nesting_is_refused_without_recursion():
    document = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 5000 + b"1.0" + b"]" * 5000 + b"}]}"
    with pytest.raises(oip.BadRequest):
        oip.parse_infer(document, None)


VALID_ITEMS = [
    {"name": "x", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
    {"name": "s", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 11}},
    {"name": "j", "shape": [3], "datatype": "INT16", "data": [1, [2, -3]]},
    {"name": "r", "shape": [4], "datatype": "UINT8", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}},
]
VALID_HEAD = json.dumps(
    {
        "id": "a",
        "inputs": VALID_ITEMS,
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 5, "priority": "1", "sequence_id": 4, "sequence_start": True},
    }
).encode()
VALID_TAIL = bytes(16) + oip.join_bytes([b"a", b"bc"])

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "double", "put"]),
        st.integers(0, len(VALID_HEAD) + len(VALID_TAIL)),
        st.integers(1, 40),
        st.sampled_from([b"", b"-", b"9" * 20, b"null", b"true", b"1e999", b"NaN", b"[]", b"{}", b"\xff", b'"', b"\\ud800", b"BYTES"]),
    ),
    max_size=4,
)


WORDS = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.sampled_from(
            [b"0", b"1", b"3", b"15", b"17", b"-1", b"1.0", b"9" * 20, b'"x"', b'"s"', b'"BYTES"', b'"INT64"', b'"7"', b"null", b"true"]
        ),
    ),
    max_size=3,
)


def reworded(head: bytes, words: list) -> bytes:
    """Some of the numbers, texts and words of a JSON text replaced by others."""
    for number, word in words:
        found = list(re.finditer(rb'-?[0-9]+|(?<!")"\w+"(?!:)|true', head))
        at = found[number % len(found)]
        head = head[: at.start()] + word + head[at.end() :]
    return head


def changed(body: bytes, changes: list) -> bytes:
    for kind, at, count, put in changes:
        if kind == "cut":
            body = body[:at] + body[at + count :]
        elif kind == "double":
            body = body[: at + count] + body[at:]
        elif kind == "put":
            body = body[:at] + put + body[at + len(put) :]
        elif at < len(body):
            body = body[:at] + bytes([body[at] ^ (1 << count % 8)]) + body[at + 1 :]
    return body


@settings(max_examples=1000, deadline=None)
@given(WORDS, st.just([]) | CHANGES, st.just(0) | st.integers(-2, 2) | st.none())
def test_a_valid_request_that_was_tampered_with_is_refused_or_keeps_every_promise(words, changes, off):
    head = reworded(VALID_HEAD, words)
    body = changed(head + VALID_TAIL, changes)
    try:
        request = oip.parse_infer(body, None if off is None else str(len(head) + off), regions=lambda e, _: bytes(e.size_bytes % 5000))
    except oip.BadRequest:
        return
    assert 0 < len(request.inputs) <= oip.MAX_TENSORS
    assert len({tensor.name for tensor in request.inputs}) == len(request.inputs)
    assert 0 <= request.timeout_us < 2**63 > request.priority >= 0
    assert request.sequence is None or 0 < len(request.sequence.id) <= oip.MAX_SEQUENCE_ID
    for tensor in request.inputs:
        assert len(tensor.shape) <= oip.MAX_RANK
        if tensor.datatype == "BYTES":
            assert len(oip.split_bytes(tensor.data, "x")) == math.prod(tensor.shape)
        else:
            assert len(tensor.data) == math.prod(tensor.shape) * oip.ITEM_BYTES[tensor.datatype]
    with contextlib.suppress(oip.BadRequest):
        oip.render_infer(request, request.inputs, model_name="m", model_version="1", parameters={})
    parts, headers = oip.render_request_parts(request.inputs, timeout_us=request.timeout_us, sequence=request.sequence)
    again = oip.parse_infer(b"".join(parts), headers[oip.HEADER_LENGTH])
    assert [(t.name, t.shape, bytes(t.data)) for t in again.inputs] == [(t.name, t.shape, bytes(t.data)) for t in request.inputs]


@settings(max_examples=500, deadline=None)
@given(WORDS, st.just([]) | CHANGES)
def test_an_answer_that_was_tampered_with_is_refused_or_keeps_its_sizes(words, changes):
    request = parse(request_json(parameters={"binary_data_output": True}))
    outputs = [oip.Tensor("y", "FP32", (2,), bytes(8)), oip.Tensor("s", "BYTES", (1,), oip.join_bytes([b"abc"]))]
    response = oip.render_infer(request, outputs, model_name="m", model_version="1", parameters={"served_by": "edge"})
    head = reworded(response.parts[0], words)
    try:
        answer = oip.parse_answer(changed(b"".join([head, *response.parts[1:]]), changes), str(len(head)))
    except oip.BadRequest:
        return
    for tensor in answer.outputs:
        oip.check_size(tensor.data, tensor.datatype, math.prod(tensor.shape), tensor.name)

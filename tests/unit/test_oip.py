"""The Open Inference Protocol, byte by byte, from both ends."""

import contextlib
import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
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
        ({"inputs": request_json()["inputs"] * 2}, "given twice"),
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

"""gRPC's messages against the definitions that Triton's client was generated from, and their way to our Structs and back."""

import struct

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import InferInput, InferResult, model_config_pb2, service_pb2

from skerry.wire import grpc_codec, oip
from skerry.wire.grpc_messages import ENUMS, MESSAGES


def theirs(path: str):
    """The descriptor of the same name in what Triton's client was generated from."""
    first, *inner = path.split(".")
    found = service_pb2.DESCRIPTOR.message_types_by_name.get(first) or model_config_pb2.DESCRIPTOR.message_types_by_name[first]
    for name in inner:
        found = found.nested_types_by_name[name]
    return found


def fields_of(message, only=None) -> dict:
    """All that a field is on the wire and in JSON, by its name."""
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.has_presence,
            field.is_packed,
            field.json_name,
            field.containing_oneof and field.containing_oneof.name,
            field.message_type and field.message_type.full_name,
            field.message_type and field.message_type.GetOptions().map_entry and fields_of(field.message_type),
            field.enum_type and field.enum_type.full_name,
        )
        for field in message.fields
        if only is None or field.name in only
    }


@pytest.mark.parametrize("path", MESSAGES)
def test_each_message_is_the_public_protocols_field_by_field(path):
    ours = MESSAGES[path].DESCRIPTOR
    assert fields_of(ours) == fields_of(theirs(path), only=set(ours.fields_by_name))
    assert ours.full_name == theirs(path).full_name


PARTIAL = {"ModelConfig", "ModelInput", "ModelOutput", "ModelInstanceGroup", "ModelDynamicBatching", "ModelSequenceBatching"}
PARTIAL |= {"ModelSequenceBatching.State"}


@pytest.mark.parametrize("path", sorted(set(MESSAGES) - PARTIAL))
def test_no_message_but_the_configurations_lacks_a_field(path):
    assert set(MESSAGES[path].DESCRIPTOR.fields_by_name) == set(theirs(path).fields_by_name)


@pytest.mark.parametrize("path", ENUMS)
def test_each_enum_has_the_public_protocols_values(path):
    parent, _, name = path.rpartition(".")
    enum = theirs(parent).enum_types_by_name[name] if parent else model_config_pb2.DESCRIPTOR.enum_types_by_name[name]
    assert {value.number: value.name for value in enum.values} == dict(enumerate(ENUMS[path]))


def test_the_messages_live_beside_another_copy_of_the_protocol():
    pool = MESSAGES["ModelInferRequest"].DESCRIPTOR.file.pool
    assert pool is not service_pb2.DESCRIPTOR.pool
    assert MESSAGES["ModelInferRequest"].DESCRIPTOR is not service_pb2.ModelInferRequest.DESCRIPTOR


def request_of(datatype="FP32", shape=(2,), raw=b"12345678", **more):
    request = service_pb2.ModelInferRequest(model_name="m", **more)
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def parse(request, regions=None) -> oip.InferRequest:
    return grpc_codec.infer_request(grpc_codec.read_request(request.SerializeToString()), regions=regions)


names = st.text("abc", max_size=3)
requests = st.builds(
    service_pb2.ModelInferRequest,
    model_name=names,
    model_version=names,
    id=names,
    parameters=st.dictionaries(names, st.builds(service_pb2.InferParameter, int64_param=st.integers(-5, 2**40)), max_size=3),
    inputs=st.lists(
        st.builds(service_pb2.ModelInferRequest.InferInputTensor, name=names, shape=st.lists(st.integers(-1, 300), max_size=3)), max_size=3
    ),
    raw_input_contents=st.lists(st.binary(max_size=300), max_size=4),
)


@given(st.lists(requests, max_size=3), st.binary(max_size=3))
def test_taking_raw_contents_off_leaves_what_protobuf_reads(parts, unknown):
    """Messages put end to end are one message: raw contents then stand between other fields."""
    others = b"".join(b"\xc2\x3e" + bytes([len(unknown)]) + unknown + b"\xc8\x3e\x96\x01\xcd\x3e1234\xd1\x3e12345678" for _ in parts[:1])
    body = others + b"".join(part.SerializeToString() for part in parts)
    whole = MESSAGES["ModelInferRequest"].FromString(body)
    received = grpc_codec.read_request(body)
    assert [bytes(raw) for raw in received.raw] == list(whole.raw_input_contents)
    del whole.raw_input_contents[:]
    assert received.head.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


@given(st.one_of(st.binary(max_size=60), st.tuples(requests, st.data())))
def test_bytes_that_are_no_request_are_refused_and_never_crash(garbage):
    if isinstance(garbage, tuple):
        request, data = garbage
        body = bytearray(request.SerializeToString() or b"\x00")
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        garbage = bytes(body[: data.draw(st.integers(0, len(body)))])
    try:
        parsed = grpc_codec.infer_request(grpc_codec.read_request(garbage))
    except oip.BadRequest:
        return
    for tensor in parsed.inputs:
        oip.check_size(tensor.data, tensor.datatype, oip.elements_of(tensor.shape, "x"), "x")


def test_a_request_is_refused_wherever_protobuf_finds_it_cut_off():
    body = b"\xd1\x3e12345678" + two(request_of(id="abc")).SerializeToString() + b"\xcd\x3e1234"
    for cut in range(len(body)):
        try:
            whole = MESSAGES["ModelInferRequest"].FromString(body[:cut])
        except DecodeError:
            with pytest.raises(oip.BadRequest):
                grpc_codec.read_request(body[:cut])
        else:
            assert [bytes(raw) for raw in grpc_codec.read_request(body[:cut]).raw] == list(whole.raw_input_contents)


def test_raw_contents_are_views_of_the_message_not_copies():
    body = request_of(raw=bytes(range(8))).SerializeToString()
    [tensor] = grpc_codec.infer_request(grpc_codec.read_request(body)).inputs
    assert isinstance(tensor.data, memoryview)
    assert tensor.data.obj is body
    assert bytes(tensor.data) == bytes(range(8))


def test_many_small_fields_are_refused_before_they_are_walked():
    with pytest.raises(oip.BadRequest, match="more than 1040 fields"):
        grpc_codec.read_request(b"\x2a\x00" * 2_000_000)


def test_large_typed_contents_are_refused():
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="BYTES", shape=[1]).contents.bytes_contents.append(bytes(oip.MAX_HEADER_BYTES))
    with pytest.raises(oip.BadRequest, match="send tensors raw"):
        parse(request)


def typed(datatype, shape, **contents):
    request = service_pb2.ModelInferRequest(model_name="m")
    entry = request.inputs.add(name="x", datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(entry.contents, field).extend(values)
    return request


def with_parameters(request, **parameters):
    for name, (kind, value) in parameters.items():
        setattr(request.parameters[name], kind, value)
    return request


def two(request):
    request.inputs.add(name="x", datatype="INT8", shape=[0])
    request.raw_input_contents.append(b"")
    return request


def with_more_raw(request):
    request.raw_input_contents.append(b"")
    return request


def asking_twice(request):
    request.outputs.add(name="y")
    request.outputs.add(name="y")
    return request


def shared(request, **parameters):
    for name, value in parameters.items():
        setattr(request.inputs[0].parameters[name], "string_param" if isinstance(value, str) else "int64_param", value)
    return request


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (service_pb2.ModelInferRequest(), "inputs: 1 to 256 tensors are accepted, got 0"),
        (request_of(shape=[-1]), r"inputs\[0\].shape: \[-1\] has a negative extent"),
        (request_of(shape=[1] * 33), r"inputs\[0\].shape: 33 dimensions"),
        (request_of(shape=[2**40, 2**40]), r"inputs\[0\].shape: .* more than"),
        (request_of(datatype="FP33"), r"inputs\[0\].datatype: 'FP33' is not one of"),
        (request_of(raw=b"123"), r"inputs\[0\]: 3 bytes, the shape asks for 2 x 4"),
        (request_of(datatype="BYTES", raw=b"\x05\x00\x00\x00ab"), r"inputs\[0\]: an element of 5 bytes reaches past"),
        (request_of(id="i" * 5000), "id: 5000 characters"),
        (two(request_of()), "inputs: a name is given twice"),
        (asking_twice(request_of()), "outputs: a name is given twice"),
        (with_more_raw(request_of()), "raw_input_contents: 2 are given, the inputs take 1"),
        (typed("FP32", [2], fp32_contents=[1]), r"inputs\[0\].contents.fp32_contents: 1 elements, the shape asks for 2"),
        (typed("FP32", [2]), r"inputs\[0\].contents.fp32_contents: 0 elements"),
        (typed("FP32", [2], fp64_contents=[1, 2]), r"inputs\[0\].contents.fp64_contents: FP32 is given in fp32_contents"),
        (typed("FP16", [1]), r"inputs\[0\]: FP16 has no typed contents"),
        (typed("BF16", [1], fp32_contents=[1]), r"inputs\[0\].contents.fp32_contents: BF16 is given raw alone"),
        (typed("INT8", [1], int_contents=[128]), r"inputs\[0\].contents.int_contents: a value does not fit INT8"),
        (typed("UINT16", [1], uint_contents=[65536]), r"inputs\[0\].contents.uint_contents: a value does not fit UINT16"),
        (typed("BYTES", [200_001], bytes_contents=[b""] * 200_001), r"inputs\[0\].shape: 200001 BYTES elements"),
        (with_parameters(request_of(), timeout=("int64_param", -1)), "parameters.timeout: expected a whole number"),
        (with_parameters(request_of(), priority=("bool_param", True)), "parameters.priority: expected a whole number"),
        (with_parameters(request_of(), idempotent=("int64_param", 1)), "parameters.idempotent: expected true or false"),
        (with_parameters(request_of(), sequence_id=("bool_param", True)), "parameters.sequence_id: expected a whole number or"),
        (with_parameters(request_of(), sequence_id=("string_param", "s" * 600)), "parameters.sequence_id: expected a whole number or"),
        (with_parameters(request_of(), sequence_start=("bool_param", True)), "parameters.sequence_id: missing"),
        (with_parameters(request_of(), **{f"p{n}": ("bool_param", True) for n in range(257)}), "parameters: 257 are given"),
        (shared(request_of(raw=None), shared_memory_region="r"), r"inputs\[0\].parameters.shared_memory_region: .* not offered"),
        (shared(request_of(), shared_memory_region=5), r"inputs\[0\].parameters.shared_memory_region: expected a name"),
        (
            shared(request_of(), shared_memory_region="r", shared_memory_offset=-4),
            r"inputs\[0\].parameters.shared_memory_offset: expected a whole number",
        ),
    ],
)
def test_what_breaks_the_protocol_is_told_with_its_field(request_, complaint):
    with pytest.raises(oip.BadRequest, match=complaint):
        parse(request_)


def test_typed_and_raw_contents_exclude_each_other():
    request = request_of()
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    with pytest.raises(oip.BadRequest, match=r"inputs\[0\].contents: given beside raw_input_contents"):
        parse(request)
    request = request_of()
    request.inputs.add(name="y", datatype="FP32", shape=[1])
    with pytest.raises(oip.BadRequest, match=r"raw_input_contents: 1 are given, inputs\[1\] has none left"):
        parse(request)


@pytest.mark.parametrize("datatype", [*grpc_codec.CONTENTS, "FP16", "BF16"])
def test_a_tensor_without_elements_needs_no_contents(datatype):
    assert bytes(parse(typed(datatype, [0, 3])).inputs[0].data) == b""


def test_parameters_that_nobody_knows_are_passed_over():
    request = with_parameters(request_of(), mine=("double_param", 0.5), sequence_id=("int64_param", 0), timeout=("string_param", "70"))
    request.parameters["nothing"].SetInParent()
    parsed = parse(request)
    assert (parsed.sequence, parsed.timeout_us, parsed.idempotent) == (None, 70, True)


def test_inputs_in_shared_memory_take_no_raw_contents_and_bytes_are_copied_once_checked():
    memory = bytearray(oip.join_bytes([b"abc"]) + bytes(8))

    def regions(extent, field):
        assert (extent.region, field) == ("r", "inputs[0]")
        return memoryview(memory)[extent.offset : extent.offset + extent.size_bytes]

    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.append(InferInput("x", [1], "BYTES").set_shared_memory("r", 7)._get_tensor())
    request.inputs.add(name="y", datatype="INT8", shape=[2])
    request.raw_input_contents.append(b"\x01\x02")
    parsed = parse(request, regions)
    memory[0] = 255
    assert [bytes(tensor.data) for tensor in parsed.inputs] == [oip.join_bytes([b"abc"]), b"\x01\x02"]
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 6
    memory[0] = 3
    with pytest.raises(oip.BadRequest, match=r"inputs\[0\]: an element of 3 bytes reaches past the end"):
        parse(request, regions)


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.lists(shapes, max_size=5), st.text(max_size=20), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
def test_a_rendered_answer_is_what_tritons_client_reads(given_shapes, text, number, real):
    arrays = [np.arange(int(np.prod(shape)), dtype="<f4").reshape(shape) for shape in given_shapes]
    outputs = [oip.Tensor(f"y{index}", "FP32", array.shape, array.tobytes()) for index, array in enumerate(arrays)]
    told = {"reason": text, "number": number, "real": real, "yes": True}
    parts = grpc_codec.render_infer(oip.InferRequest("7", [], []), outputs, model_name="m", model_version="2", parameters=told)
    answer = service_pb2.ModelInferResponse.FromString(b"".join(parts))
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "2", "7")
    assert {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in answer.parameters.items()} == told
    result = InferResult(answer)
    for tensor, array in zip(outputs, arrays, strict=True):
        assert result.as_numpy(tensor.name).tolist() == array.tolist()
    streamed = service_pb2.ModelStreamInferResponse.FromString(grpc_codec.streamed(parts))
    assert streamed.infer_response == answer
    assert not streamed.error_message


def test_long_outputs_are_rendered_with_their_whole_length():
    for size in (127, 128, 16_383, 16_384, 3_000_000):
        output = oip.Tensor("y", "UINT8", (size,), memoryview(bytes(size)))
        parts = grpc_codec.render_infer(oip.InferRequest("", [], []), [output], model_name="m", model_version="1", parameters={})
        assert service_pb2.ModelInferResponse.FromString(b"".join(parts)).raw_output_contents == [bytes(size)]
        assert parts[-1] is output.data


def test_outputs_in_shared_memory_leave_an_empty_place_among_the_contents():
    written = []
    request = oip.InferRequest("", [], [oip.RequestedOutput("a", True, oip.Extent("r", 8, 64)), oip.RequestedOutput("b")])
    outputs = [oip.Tensor("a", "INT8", (2,), b"\x01\x02"), oip.Tensor("b", "INT8", (1,), b"\x03")]
    told = {"model_name": "m", "model_version": "1", "parameters": {}}
    parts = grpc_codec.render_infer(request, outputs, put=lambda *call: written.append(call), **told)
    answer = service_pb2.ModelInferResponse.FromString(b"".join(parts))
    assert written == [(oip.Extent("r", 8, 64), b"\x01\x02", "outputs[0]")]
    assert list(answer.raw_output_contents) == [b"", b"\x03"]
    assert answer.outputs[0].parameters["shared_memory_byte_size"].int64_param == 2
    with pytest.raises(oip.BadRequest, match=r"outputs\[0\].parameters.shared_memory_region: .* not offered"):
        grpc_codec.render_infer(request, outputs, **told)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=40), st.lists(st.booleans(), max_size=40))
def test_typed_numbers_become_the_bytes_that_raw_contents_would_have_had(reals, flags):
    """Those that protobuf packs as a tensor's bytes are cut out of its own form, whatever else a caller's message holds."""
    for datatype, code, field, values in (
        ("FP32", "f", "fp32_contents", reals),
        ("FP64", "d", "fp64_contents", reals),
        ("BOOL", "?", "bool_contents", flags),
    ):
        unknown = b"\xc2\x3e\x03abc"
        contents = service_pb2.InferTensorContents(**{field: values}).SerializeToString() + unknown
        request = typed(datatype, [len(values)])
        request.inputs[0].contents.MergeFromString(contents)
        assert bytes(parse(request).inputs[0].data) == struct.pack(f"<{len(values)}{code}", *values)


def test_what_grpc_has_no_field_for_is_left_out_of_what_rest_tells():
    body = grpc_codec.of_json("ServerMetadataResponse", {"name": "skerry", "version": "1", "extensions": ("a",), "tier": "edge"})
    told = service_pb2.ServerMetadataResponse.FromString(body)
    assert (told.name, list(told.extensions)) == ("skerry", ["a"])

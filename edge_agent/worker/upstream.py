"""A model server on this loopback, spoken to in the Open Inference Protocol over HTTP. What it answers is hostile until parsed."""

import contextlib
import http.client
import time
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import msgspec

from skerry.wire import ipc, oip

HOST = "127.0.0.1"
MAX_METADATA_BYTES = 1024 * 1024
ASK_TIMEOUT_S = 5.0
ASK_EVERY_S = 0.1
MAX_WORDS = 500
_CHUNK_BYTES = 256 * 1024
BINARY_SHARE, JSON_SHARE = 8, 64
"""Of the memory, so large a part may one body have: a number in JSON is text, an object and its bytes at the same time."""


class ServerFailed(Exception):
    """The server did not do what was asked of it, or spoke nonsense; the text says which."""


class Refused(ValueError):
    """The server, or this end, does not take the inputs; the text is for the caller."""


class Served(msgspec.Struct, frozen=True):
    """What a server serves, as it says itself. ``binary`` is whether it announces the binary tensor extension."""

    inputs: list[ipc.TensorSpec]
    outputs: list[ipc.TensorSpec]
    software: str
    binary: bool


class _ServerMetadata(msgspec.Struct, frozen=True):
    name: str = ""
    version: str = ""
    extensions: list[str] = []


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]


class _ModelMetadata(msgspec.Struct, frozen=True):
    inputs: list[_Tensor] | None = None
    outputs: list[_Tensor] | None = None


class _Error(msgspec.Struct, frozen=True):
    error: str


class _Reply(msgspec.Struct, frozen=True):
    status: int
    header_length: str | None
    body: bytes


class Server:
    """Where the server is, and how much of it is borne."""

    def __init__(self, port: int, model: str, *, timeout_s: float, memory_bytes: int) -> None:
        self.port = port
        self.model_path = f"/v2/models/{quote(model, safe='')}"
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes

    def wait_ready(self, *, within_s: float) -> Served:
        """Ask until server and model are ready; returns what they serve. Raises ServerFailed with the last that was heard."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                for path in ("/v2/health/ready", f"{self.model_path}/ready"):
                    reply = self._ask(path)
                    if reply.status != 200:
                        raise ServerFailed(f"{path}: status {reply.status}{_words(reply.body)}")
                break
            except ServerFailed as exc:
                if time.monotonic() > deadline:
                    raise ServerFailed(f"not ready within {within_s:.0f} s: {exc}") from exc
            time.sleep(ASK_EVERY_S)
        return self._served()

    def _ask(self, path: str) -> _Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ASK_TIMEOUT_S)
        with contextlib.closing(connection):
            return _exchange(connection, "GET", path, None, {}, most_bytes=MAX_METADATA_BYTES, timeout_s=ASK_TIMEOUT_S)

    def _served(self) -> Served:
        about = self._metadata("/v2", _ServerMetadata)
        model = self._metadata(self.model_path, _ModelMetadata)
        software = " ".join(filter(None, [about.name, about.version])) or "a model server"
        return Served(
            inputs=_specs("inputs", model.inputs or []),
            outputs=_specs("outputs", model.outputs or []),
            software=printable(software)[:100],
            binary="binary_tensor_data" in about.extensions,
        )

    def _metadata(self, path: str, kind: type[Any]) -> Any:
        reply = self._ask(path)
        if reply.status != 200:
            raise ServerFailed(f"{path}: status {reply.status}{_words(reply.body)}")
        try:
            return msgspec.json.decode(reply.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ServerFailed(f"{path}: {printable(str(exc))[:MAX_WORDS]}") from exc


def _specs(field: str, tensors: list[_Tensor]) -> list[ipc.TensorSpec]:
    if len(tensors) > oip.MAX_TENSORS:
        raise ServerFailed(f"{field}: {len(tensors)} tensors, at most {oip.MAX_TENSORS} are taken")
    for tensor in tensors:
        if tensor.datatype not in oip.ITEM_BYTES and tensor.datatype != "BYTES":
            raise ServerFailed(f"{field}: {printable(tensor.name)[:80]!r} has the datatype {printable(tensor.datatype)[:40]!r}")
        if len(tensor.name) > oip.MAX_NAME or len(tensor.shape) > oip.MAX_RANK:
            raise ServerFailed(f"{field}: {printable(tensor.name)[:80]!r} has a name or a shape that is too long")
    return [ipc.TensorSpec(t.name, t.datatype, tuple(extent if extent >= 0 else -1 for extent in t.shape)) for t in tensors]


def printable(text: str) -> str:
    """Text for a log or an answer: what can't be printed is a question mark."""
    return "".join(character if character.isprintable() else "?" for character in text[: 2 * MAX_WORDS])


def _words(body: bytes) -> str:
    """What a server says of a failure, in the protocol's shape or as it is."""
    text = body[: 2 * MAX_WORDS].decode(errors="replace").strip()
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = msgspec.json.decode(body, type=_Error).error
    return f": {printable(text)[:MAX_WORDS]}" if text else ""


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    *,
    most_bytes: int,
    timeout_s: float,
) -> _Reply:
    """One request and its answer, whole. Raises ServerFailed where it is late, larger than ``most_bytes``, encoded, or no HTTP."""
    deadline = time.monotonic() + timeout_s
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise ServerFailed("the server's answer is compressed, which was not asked for")
        parts, size = [], 0
        while part := response.read1(_CHUNK_BYTES):
            size += len(part)
            if size > most_bytes:
                raise ServerFailed(f"the server's answer has more than {most_bytes} bytes")
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server's answer was not whole after {timeout_s:.0f} s")
            parts.append(part)
        if response.length:
            raise ServerFailed(f"the server's answer is cut off: {response.length} bytes are missing")
        response.read()  # nothing is left: this is how the connection learns that it is free again
        return _Reply(response.status, response.getheader(oip.HEADER_LENGTH), b"".join(parts))
    except ServerFailed:
        connection.close()
        raise
    except TimeoutError as exc:
        connection.close()
        raise ServerFailed(f"the server did not answer within {timeout_s:.0f} s") from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        connection.close()
        raise ServerFailed(f"the server can't be spoken to: {type(exc).__name__}: {printable(str(exc))[:200]}") from exc


class Upstream:
    """One connection to the server, kept alive between calls; not for several threads."""

    def __init__(self, server: Server, *, binary: bool) -> None:
        self._server = server
        self._binary = binary
        self._connection = http.client.HTTPConnection(HOST, server.port, timeout=server.timeout_s)
        self.most_bytes = server.memory_bytes // (BINARY_SHARE if binary else JSON_SHARE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    def infer(self, tensors: list[oip.Tensor], wanted: list[str]) -> list[oip.Tensor]:
        """The outputs named in ``wanted``, in that order, all where it is empty. Raises Refused and ServerFailed."""
        try:
            body, headers = self._render(tensors, wanted)
        except oip.BadRequest as exc:
            raise Refused(str(exc)) from exc
        reply = self._send(body, headers)
        if reply.status in (400, 404, 413, 415, 422):
            raise Refused(f"the server refused with status {reply.status}{_words(reply.body)}")
        if reply.status != 200:
            raise ServerFailed(f"the server answered with status {reply.status}{_words(reply.body)}")
        self._check_json_size(reply)
        try:
            outputs = oip.parse_answer(reply.body, reply.header_length).outputs
        except (ValueError, RecursionError, MemoryError) as exc:
            raise ServerFailed(f"the server's answer is not of the protocol: {printable(str(exc))[:MAX_WORDS]}") from exc
        return _chosen(outputs, wanted)

    def _check_json_size(self, reply: _Reply) -> None:
        """Before it is decoded: JSON grows by far more than binary tensors do. Raises ServerFailed."""
        length = reply.header_length or ""
        json_bytes = int(length) if length.isascii() and length.isdigit() and len(length) <= 12 else len(reply.body)
        most_bytes = self._server.memory_bytes // JSON_SHARE
        if json_bytes > most_bytes:
            raise ServerFailed(f"the server's answer has {json_bytes} bytes of JSON, at most {most_bytes} are taken")

    def _render(self, tensors: list[oip.Tensor], wanted: list[str]) -> tuple[bytes, dict[str, str]]:
        outputs = [{"name": name} for name in wanted]
        if self._binary:
            return oip.render_request(tensors, outputs=wanted)
        inputs = [{"name": t.name, "shape": t.shape, "datatype": t.datatype, "data": oip.json_of_data(t)} for t in tensors]
        return msgspec.json.encode({"inputs": inputs} | ({"outputs": outputs} if outputs else {})), {"Content-Type": "application/json"}

    def _send(self, body: bytes, headers: dict[str, str]) -> _Reply:
        """The request, once more over a new connection where the one that was kept turns out to be closed."""
        was_kept = self._connection.sock is not None
        path, timeout_s = f"{self._server.model_path}/infer", self._server.timeout_s
        try:
            return _exchange(self._connection, "POST", path, body, headers, most_bytes=self.most_bytes, timeout_s=timeout_s)
        except ServerFailed as exc:
            gone = isinstance(exc.__cause__, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError)
            if not (was_kept and gone):
                raise
        return _exchange(self._connection, "POST", path, body, headers, most_bytes=self.most_bytes, timeout_s=timeout_s)


def _chosen(outputs: list[oip.Tensor], wanted: list[str]) -> list[oip.Tensor]:
    """The outputs that were asked for; raises ServerFailed where the server gave others, or one twice."""
    by_name = {output.name: output for output in outputs}
    if len(by_name) != len(outputs) or len(outputs) > oip.MAX_TENSORS:
        raise ServerFailed(f"the server's answer has {len(outputs)} outputs of {len(by_name)} names")
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise ServerFailed(f"the server's answer lacks the output {missing[0][:80]!r}")
    return [by_name[name] for name in wanted] if wanted else outputs

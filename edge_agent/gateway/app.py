"""The Open Inference Protocol v2 over HTTP, Prometheus' page, and what only this box's own programs may ask.

Sources: kserve/open-inference-protocol inference_rest.md; Triton's extension_statistics.md, extension_model_repository.md,
extension_model_configuration.md, extension_shared_memory.md, extension_binary_data.md.
"""

import asyncio
import time
import zlib
from typing import Any
from urllib.parse import parse_qs

import msgspec

from edge_agent.gateway import exposition
from edge_agent.gateway.books import Books
from edge_agent.gateway.dispatch import Interrupted
from edge_agent.gateway.facts import Facts, NotKnown
from edge_agent.gateway.http_message import Head, Memory, Peer, Response
from edge_agent.gateway.inquiry import Inquiry
from edge_agent.gateway.regions import Regions, uid_of_loopback_peer
from edge_agent.gateway.service import Answer, Arrival, Failed, Refused, Rejected, Served, Service, Unknown
from edge_agent.gateway.upstream import FORWARDED, TIMEOUT
from skerry.runtime import refusals
from skerry.wire import codec, oip
from skerry.wire.decision import MOST_KEPT_MIN, changed
from skerry.wire.oip import Bytes

JSON = ("Content-Type", "application/json")
LONG_JSON_BYTES = 64 * 1024
"""JSON from this size on is turned into tensors in a thread: others' requests go on meanwhile."""
IDEMPOTENT = "skerry-idempotent"
"""A header that says ``false`` of a request that must not be tried twice."""


class NotFound(Exception):
    """No such path."""


class NotAllowed(Exception):
    """The path does not take this method."""


class TooLarge(Exception):
    """A body that grows beyond its bound when it is unpacked."""


def json_response(value: Any, status: int = 200, headers: list[tuple[str, str]] | None = None) -> Response:
    """An answer in JSON."""
    return Response(status, [msgspec.json.encode(value)], [JSON, *(headers or [])])


def error_response(exc: Exception) -> Response:
    """The protocol's one error shape, with the status that fits."""
    headers: list[tuple[str, str]] = []
    match exc:
        case oip.BadRequest() | Rejected():
            status = 400
        case Unknown() | NotFound():
            status = 404
        case NotAllowed():
            status = 405
        case Interrupted():
            status = 409
        case TooLarge():
            status = 413
        case NotKnown():
            status = 503
            headers = [("Retry-After", "1")]
        case Refused(retry_after_s=retry_after_s):
            status = 503
            headers = [("Retry-After", str(retry_after_s)), ("Skerry-Reason", header_text(str(exc)))]
        case _:
            status = 500
    return json_response({"error": str(exc)}, status, headers)


def _no_such_path(head: Head) -> NotFound:
    return NotFound(f"{head.method[:20]} {head.path[:200]}: no such path")


def header_text(text: str) -> str:
    """Text that may stand in a header: printable ASCII, bounded."""
    return (
        text if text.isascii() and text.isprintable() and len(text) <= 300 else "".join(c if " " <= c <= "~" else "?" for c in text[:300])
    )


class Api:
    """One listener's requests: read, handed to the service, answered. ``for_agent`` adds what only this box's programs may ask."""

    def __init__(
        self,
        service: Service,
        facts: Facts,
        *,
        regions: Regions | None,
        body_limit_bytes: int,
        for_agent: bool,
        books: Books,
        inquiry: Inquiry,
    ) -> None:
        self._service = service
        self._facts = facts
        self._regions = regions
        self._body_limit_bytes = body_limit_bytes
        self._books = books
        self._inquiry = inquiry
        self._for_agent = for_agent

    # -- http.Application

    def begin(self, head: Head) -> Memory | Response | None:
        """See http.Application: a request that would be refused is refused before its body is read."""
        if head.method != "POST" or not head.path.endswith("/infer"):
            return None
        try:
            served = self._served(head.path)
        except (Unknown, NotFound) as exc:
            return error_response(exc)
        length = head.headers.get("inference-header-content-length", "")
        lead_bytes = int(length) if length.isascii() and length.isdigit() and len(length) < 10 else 0
        return served.pool.memory_for(head.size_bytes, lead_bytes=lead_bytes) if "content-encoding" not in head.headers else None

    def refusal(self, status: int, message: str) -> Response:
        """See http.Application."""
        return json_response({"error": message}, status)

    async def answer(self, head: Head, body: memoryview, memory: Memory | None) -> Response:
        """See http.Application."""
        try:
            if head.method == "POST" and head.path.endswith("/infer"):
                return await self._infer(head, body, memory)
            return await self._other(head, body)
        except (oip.BadRequest, Rejected, Unknown, NotFound, NotAllowed, NotKnown, Interrupted, TooLarge, Refused, Failed) as exc:
            if isinstance(exc, oip.BadRequest):
                refusals.count("request.malformed", str(exc))
            return error_response(exc)
        finally:
            if memory is not None:
                memory.release()

    # -- inference

    def _served(self, path: str) -> Served:
        """What ``/v2/models/M[/versions/V]/infer`` names. Raises Unknown and NotFound."""
        match path.split("/"):
            case ["", "v2", "models", model, "infer"]:
                return self._service.find(model, None)
            case ["", "v2", "models", model, "versions", version, "infer"]:
                return self._service.find(model, version)
        raise NotFound(f"{path[:200]}: no such path")

    async def _infer(self, head: Head, body: memoryview, memory: Memory | None) -> Response:
        served = self._served(head.path)
        headers = head.headers
        if "content-encoding" in headers:
            body = await self._unpacked(headers["content-encoding"], body)
        request = await self._parsed(head, body, served)
        if headers.get(IDEMPOTENT, "true").lower() == "false":
            request = msgspec.structs.replace(request, idempotent=False)
        arrival = Arrival(request, head.started, _deadline_ms(head, request, served), FORWARDED.lower() in headers, memory)
        answer = await self._service.infer(arrival, served)
        try:
            return await self._rendered(head, request, answer)
        except BaseException:
            answer.release()
            raise

    async def _parsed(self, head: Head, body: memoryview, served: Served) -> oip.InferRequest:
        length = head.headers.get("inference-header-content-length")
        if length == "0":
            if served.pool.hello is None:
                raise Refused("no replica of this model has been ready here yet, its input is not known", 1)
            return oip.parse_raw(body, [(t.name, t.datatype, t.shape) for t in served.pool.hello.inputs])
        reader = None
        if self._regions is not None and head.peer.is_local:
            reader = _needs_owner if head.peer.uid is None else self._regions.reader(head.peer.uid)
        try:
            if length is None and len(body) > LONG_JSON_BYTES:
                return await asyncio.to_thread(oip.parse_infer, body, length, regions=reader)
            return oip.parse_infer(body, length, regions=reader)
        except _OwnerNeeded:
            await _owner_of(head.peer)
            return await self._parsed(head, body, served)

    async def _unpacked(self, coding: str, body: memoryview) -> memoryview:
        if coding not in ("gzip", "deflate", "identity"):
            raise oip.BadRequest(f"Content-Encoding: {coding[:40]!r} is not offered, gzip and deflate are")
        return body if coding == "identity" else await asyncio.to_thread(_inflated, body, self._body_limit_bytes)

    async def _rendered(self, head: Head, request: oip.InferRequest, answer: Answer) -> Response:
        outputs = answer.outputs
        if any(output.extent is not None for output in request.outputs):
            owner = await _owner_of(head.peer)
            if self._regions is None:
                raise oip.BadRequest("outputs: shared memory regions are not offered by this gateway's settings")
            for tensor, extent in oip.placements(request, outputs):
                self._regions.write(extent, tensor.data, f"output {tensor.name[:80]!r}", owner)
        rendered = oip.render_infer(
            request,
            outputs,
            model_name=answer.route.model,
            model_version=str(answer.route.version),
            parameters={"served_by": answer.served_by, "node": answer.node, "reason": answer.reason, **answer.numbers},
        )
        headers = [
            ("Skerry-Served-By", answer.served_by),
            ("Skerry-Node", answer.node),
            ("Skerry-Reason", header_text(answer.reason)),
            ("Server-Timing", f"{answer.timing}, total;dur={(time.perf_counter() - head.started) * 1000:.3f}"),
        ]
        if rendered.header_length is None:
            headers.append(JSON)
        else:
            headers += [("Content-Type", oip.BINARY_CONTENT_TYPE), (oip.HEADER_LENGTH, str(rendered.header_length))]
        return Response(200, rendered.parts, headers, answer.release)

    # -- everything else

    async def _other(self, head: Head, body: memoryview) -> Response:
        if head.method not in ("GET", "HEAD", "POST"):
            raise NotAllowed(f"{head.method[:20]}: GET and POST are taken")
        match ["POST" if head.method == "POST" else "GET", *(part for part in head.path.split("/") if part)]:
            case ["GET", "v2", "models", *rest]:
                return await self._models(head, rest)
            case [_, "v2", "repository", *rest]:
                return self._repository(head, rest, body)
            case [_, "v2", "systemsharedmemory", *rest]:
                return await self._shared_memory(head, rest, body)
            case ["GET", "v2", *rest]:
                return self._about(head, rest)
            case ["GET", "metrics"]:
                return Response(200, [await self._books.page()], [("Content-Type", exposition.CONTENT_TYPE)])
            case ["GET", "totals"] if self._for_agent:
                return Response(200, [self._books.totals()], [JSON])
            case ["GET", "routes"] if self._for_agent:
                return json_response(self._service.explained())
        raise _no_such_path(head)

    def _about(self, head: Head, rest: list[str]) -> Response:
        match rest:
            case []:
                return json_response(self._facts.server_metadata())
            case ["health", "live"]:
                return json_response({"live": True})
            case ["health", "ready"]:
                waiting_for = self._facts.waiting_for()
                return json_response({"ready": not waiting_for, "waiting_for": waiting_for}, 503 if waiting_for else 200)
            case ["cudasharedmemory", *_]:
                return json_response([])
        raise _no_such_path(head)

    async def _models(self, head: Head, rest: list[str]) -> Response:
        match rest:
            case ["stats"]:
                return json_response(self._facts.statistics())
            case [model, "versions", version, *verb]:
                return await self._model(head, model, version, verb)
            case [model, *verb]:
                return await self._model(head, model, None, verb)
        raise _no_such_path(head)

    def _repository(self, head: Head, rest: list[str], body: memoryview) -> Response:
        match [head.method, *rest]:
            case ["POST", "index"]:
                return json_response(self._facts.repository_index(ready_only=_ready_only(body)))
            case ["POST", "models", _, "load" | "unload"]:
                raise oip.BadRequest("models are placed by the coordinator: use 'skerry deploy' and 'skerry deployment delete'")
        raise _no_such_path(head)

    async def _model(self, head: Head, model: str, version: str | None, verb: list[str]) -> Response:
        served = self._service.find(model, version)
        match verb:
            case []:
                return json_response(self._facts.model_metadata(served))
            case ["ready"]:
                ready = self._facts.can_answer(served)
                return json_response({"name": served.route.model, "ready": ready}, 200 if ready else 503)
            case ["config"]:
                return json_response(self._facts.model_config(served))
            case ["stats"]:
                return json_response(self._facts.statistics(model, version))
            case ["decision"]:
                query = _query(head)
                foreseen = self._inquiry.foreseen(
                    served,
                    deadline_ms=_number(query, "deadline_ms", served.route.deadline_ms),
                    size_bytes=int(_number(query, "size_bytes", 0)),
                    priority=int(_number(query, "priority", 0)),
                )
                return json_response(foreseen)
            case ["decisions"]:
                query = _query(head)
                try:
                    change = changed(query)
                except codec.Malformed as exc:
                    raise oip.BadRequest(str(exc)) from exc
                return json_response(await self._inquiry.replayed(served, change, minutes=_number(query, "minutes", MOST_KEPT_MIN)))
            case ["slowest"]:
                return json_response(self._inquiry.slowest(served, minutes=_number(_query(head), "minutes", MOST_KEPT_MIN)))
        raise _no_such_path(head)

    async def _shared_memory(self, head: Head, rest: list[str], body: memoryview) -> Response:
        regions = self._regions
        if regions is None:
            raise oip.BadRequest("shared memory is not offered by this gateway's settings")
        owner = await _owner_of(head.peer)
        match [head.method, *rest]:
            case ["GET", "status"]:
                return json_response(regions.status(None, owner))
            case ["GET", "region", name, "status"]:
                return json_response(regions.status(name, owner))
            case ["POST", "region", name, "register"]:
                wanted = _decoded(body, _Register)
                regions.register(name, wanted.key, offset=wanted.offset, size_bytes=wanted.byte_size, owner=owner)
            case ["POST", "region", name, "unregister"]:
                regions.unregister(name, owner)
            case ["POST", "unregister"]:
                regions.unregister(None, owner)
            case _:
                raise _no_such_path(head)
        return json_response({})


class _OwnerNeeded(Exception):
    """Whose the connection is must be found first."""


def _needs_owner(_extent: oip.Extent, _field: str) -> oip.Bytes:
    raise _OwnerNeeded


async def _owner_of(peer: Peer) -> int:
    """The user at the other end: shared memory is offered to those on this box, of their own. Raises BadRequest."""
    if peer.uid is None and peer.is_local:
        peer.uid = await asyncio.to_thread(uid_of_loopback_peer, peer.local_port, peer.address, peer.port)
    if peer.uid is None:
        raise oip.BadRequest("shared memory is offered to callers on this box alone")
    return peer.uid


class _Register(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


class _Index(msgspec.Struct):
    ready: bool = False


def _decoded(body: memoryview, kind: type[Any]) -> Any:
    try:
        return codec.decode(body, kind)
    except codec.Malformed as exc:
        raise oip.BadRequest(str(exc)) from exc


def _ready_only(body: memoryview) -> bool:
    return bool(_decoded(body, _Index).ready) if len(body) else False


def _query(head: Head) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(head.query[:2000]).items()}


def _number(query: dict[str, str], name: str, default: float) -> float:
    text = query.get(name, "")
    try:
        value = float(text) if text else float(default)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e15:  # not a number is not
        raise oip.BadRequest(f"{name}: {text[:40]!r} is not a number from 0 to 1e15")
    return value


def _inflated(body: Bytes, most_bytes: int) -> memoryview:
    """A gzip or zlib body unpacked. Raises BadRequest and TooLarge."""
    inflate = zlib.decompressobj(wbits=47)  # either, told by its first bytes
    try:
        unpacked = inflate.decompress(body, most_bytes)
    except zlib.error as exc:
        raise oip.BadRequest(f"body: {exc}") from exc
    if inflate.unconsumed_tail or len(unpacked) >= most_bytes:
        raise TooLarge(f"body: more than {most_bytes} bytes when it is unpacked")
    if not inflate.eof:
        raise oip.BadRequest("body: its compression ends in the middle")
    return memoryview(unpacked)


def _deadline_ms(head: Head, request: oip.InferRequest, served: Served) -> float:
    """The request's own deadline, else the deployment's; of a forwarded request what its first box says is left."""
    given = head.headers.get(TIMEOUT.lower())
    if given is None:
        return request.timeout_us / 1000 if request.timeout_us else float(served.route.deadline_ms)
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise oip.BadRequest(f"{TIMEOUT}: {given[:40]!r} is not a number of milliseconds")
    return float(given)

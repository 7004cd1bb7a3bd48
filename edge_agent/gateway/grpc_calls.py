"""What each call of ``inference.GRPCInferenceService`` does. Messages come and go as bytes: what they hold is the codec's business.

Sources: kserve/open-inference-protocol open_inference_grpc.proto; Triton's grpc_service.proto.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

import grpc
import msgspec

from edge_agent.gateway.dispatch import Interrupted
from edge_agent.gateway.facts import NotKnown
from edge_agent.gateway.service import Answer, Arrival, Failed, Refused, Rejected, Served, Service, Unknown
from skerry.runtime import refusals
from skerry.wire import grpc_codec, oip
from skerry.wire.grpc_messages import SERVICE

STREAM_REQUESTS = 32
"""Requests of one stream that may be under way, or answered and not yet taken."""
MAX_DETAILS_BYTES = 1024
"""Of an error's text: it travels as a header, up to three bytes for one."""
ERRORS = (oip.BadRequest, Rejected, Unknown, Refused, Interrupted, NotKnown, Failed)
NOT_OFFERED = {
    **dict.fromkeys(
        ["RepositoryModelLoad", "RepositoryModelUnload"],
        "models are placed by the coordinator: use 'skerry deploy' and 'skerry deployment delete'",
    ),
    **dict.fromkeys(
        ["CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"],
        "shared memory of a GPU is not offered by this server",
    ),
    **dict.fromkeys(["TraceSetting", "LogSettings"], "traces and logs are not set through this server"),
}
"""The calls of the protocol that are answered with UNIMPLEMENTED, and why."""
NO_REGIONS = "shared memory regions are not offered by this server"

Context = Any
"""A grpc.aio.ServicerContext, which has no types to check against."""
Metadata = tuple[tuple[str, str], ...]
Call = Callable[[bytes, Context], Awaitable[bytes]]
Steps = dict[tuple[str, str], asyncio.Event]
"""Of a stream: by model and sequence, what the latest step sets when it is done."""


class Facts(Protocol):
    """What the gateway tells of itself and its models, in the shapes of Triton's REST extensions."""

    def server_metadata(self) -> dict[str, Any]: ...
    def is_ready(self) -> bool: ...
    def can_answer(self, served: Served) -> bool: ...
    def model_metadata(self, served: Served) -> dict[str, Any]: ...
    def model_config(self, served: Served) -> dict[str, Any]: ...
    def statistics(self, name: str | None, version: str | None) -> dict[str, Any]: ...
    def repository_index(self, *, ready_only: bool) -> list[dict[str, str]]: ...


class Regions(Protocol):
    """The shared memory regions of callers on this box; each method raises BadRequest for what ``peer`` may not have."""

    def register(self, name: str, key: str, offset: int, size_bytes: int, peer: str) -> None: ...
    def unregister(self, name: str | None, peer: str) -> None: ...
    def status(self, name: str | None, peer: str) -> list[dict[str, Any]]: ...
    def resolver(self, peer: str) -> grpc_codec.Resolve: ...
    def write(self, extent: oip.Extent, data: oip.Bytes, field: str, peer: str) -> None: ...


class _Asked(msgspec.Struct, frozen=True):
    """A request as it was read. ``started`` is on time.perf_counter, in seconds; ``put`` writes to the caller's shared memory."""

    model: str
    version: str
    request: oip.InferRequest
    put: grpc_codec.Put | None
    started: float


class Calls:
    """The calls, each from the bytes of its request to those of its answer."""

    def __init__(self, service: Service, facts: Facts, regions: Regions | None) -> None:
        self._service = service
        self._facts = facts
        self._regions = regions

    def handler(self) -> Any:
        """All of them, as grpc.aio wants them."""
        calls: dict[str, Call] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "SystemSharedMemoryStatus": self._region_status,
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
            "ModelInfer": self._infer,
        }
        not_offered = dict(NOT_OFFERED)
        if self._regions is None:
            not_offered |= dict.fromkeys((name for name in calls if "SharedMemory" in name), NO_REGIONS)
        handlers = {name: grpc.unary_unary_rpc_method_handler(_failing_by_status(call)) for name, call in calls.items()}
        handlers |= {name: grpc.unary_unary_rpc_method_handler(_refusal(why)) for name, why in not_offered.items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _infer(self, body: bytes, context: Context) -> bytes:
        started = time.perf_counter()
        asked = self._asked(grpc_codec.read_request(body), context, started)
        message, answer = await self._run(asked, context, {}, b"".join)
        context.set_trailing_metadata(_told_of(answer))
        return message

    def _asked(self, received: grpc_codec.Received, context: Context, started: float) -> _Asked:
        resolve: grpc_codec.Resolve | None = None
        put: grpc_codec.Put | None = None
        if (regions := self._regions) is not None:
            peer = context.peer()
            resolve, put = regions.resolver(peer), partial(regions.write, peer=peer)
        request = grpc_codec.infer_request(received, regions=resolve)
        return _Asked(received.head.model_name, received.head.model_version, request, put, started)

    async def _run(
        self, asked: _Asked, context: Context, more: dict[str, grpc_codec.Parameter], joined: Callable[[list[oip.Bytes]], bytes]
    ) -> tuple[bytes, Answer]:
        """The rendered answer, ``joined``, with ``more`` among its parameters; what the service lent has been given back."""
        served = self._service.find(asked.model, asked.version or None)
        deadline_ms = _deadline_ms(asked, served, context.time_remaining())
        arrival = Arrival(request=asked.request, started=asked.started, deadline_ms=deadline_ms, forwarded=False)
        answer = await self._service.infer(arrival, served)
        try:
            parts = grpc_codec.render_infer(
                asked.request,
                answer.outputs,
                model_name=answer.route.model,
                model_version=str(answer.route.version),
                parameters={**answer.numbers, "served_by": answer.served_by, "node": answer.node, "reason": answer.reason, **more},
                put=asked.put,
            )
            return joined(parts), answer
        finally:
            answer.release()

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """``ModelStreamInfer``: requests run side by side, those of one sequence one after the other; answers go in the requests' order."""
        room = asyncio.Semaphore(STREAM_REQUESTS)
        under_way: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_REQUESTS + 1)
        steps: Steps = {}

        async def take() -> None:
            async for body in requests:
                await room.acquire()
                under_way.put_nowait(tasks.create_task(self._streamed(body, context, steps), name="gateway.grpc_request"))
            under_way.put_nowait(None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(take(), name="gateway.grpc_stream")
            while (answer := await under_way.get()) is not None:
                await asyncio.wait([answer])  # awaited itself, it would be cancelled first, and the sequence's next step begin
                await context.write(answer.result())
                room.release()

    async def _streamed(self, body: bytes, context: Context, steps: Steps) -> bytes:
        """One request of a stream, answered or told why not. Those of one stream begin in its order."""
        started = time.perf_counter()
        model = version = request_id = ""
        try:
            received = grpc_codec.read_request(body)
            model, version, request_id = received.head.model_name, received.head.model_version, received.head.id
            asked = self._asked(received, context, started)
            async with _in_turn(steps, model, asked.request.sequence):
                return (await self._run(asked, context, {"triton_final_response": True}, grpc_codec.streamed))[0]
        except ERRORS as exc:
            return grpc_codec.streamed_error(str(exc), model_name=model, model_version=version, request_id=request_id)

    async def _live(self, _: bytes, _context: Context) -> bytes:
        return grpc_codec.of_json("ServerLiveResponse", {"live": True})

    async def _ready(self, _: bytes, _context: Context) -> bytes:
        return grpc_codec.of_json("ServerReadyResponse", {"ready": self._facts.is_ready()})

    async def _server(self, _: bytes, _context: Context) -> bytes:
        return grpc_codec.of_json("ServerMetadataResponse", self._facts.server_metadata())

    async def _model_ready(self, body: bytes, _: Context) -> bytes:
        """A model that is not served is not ready: clients that wait for one ask until it is."""
        request = grpc_codec.read("ModelReadyRequest", body)
        try:
            ready = self._facts.can_answer(self._service.find(request.name, request.version or None))
        except Unknown:
            ready = False
        return grpc_codec.of_json("ModelReadyResponse", {"ready": ready})

    async def _model(self, body: bytes, _: Context) -> bytes:
        request = grpc_codec.read("ModelMetadataRequest", body)
        served = self._service.find(request.name, request.version or None)
        return grpc_codec.of_json("ModelMetadataResponse", self._facts.model_metadata(served))

    async def _config(self, body: bytes, _: Context) -> bytes:
        request = grpc_codec.read("ModelConfigRequest", body)
        served = self._service.find(request.name, request.version or None)
        return grpc_codec.of_json("ModelConfigResponse", {"config": self._facts.model_config(served)})

    async def _statistics(self, body: bytes, _: Context) -> bytes:
        request = grpc_codec.read("ModelStatisticsRequest", body)
        counted = self._facts.statistics(request.name or None, request.version or None)
        return grpc_codec.of_json("ModelStatisticsResponse", counted)

    async def _index(self, body: bytes, _: Context) -> bytes:
        request = grpc_codec.read("RepositoryIndexRequest", body)
        return grpc_codec.of_json("RepositoryIndexResponse", {"models": self._facts.repository_index(ready_only=request.ready)})

    async def _region_status(self, body: bytes, context: Context) -> bytes:
        assert self._regions is not None  # noqa: S101 - else this call is not offered
        request = grpc_codec.read("SystemSharedMemoryStatusRequest", body)
        regions = self._regions.status(request.name or None, context.peer())
        return grpc_codec.of_json("SystemSharedMemoryStatusResponse", {"regions": {region["name"]: region for region in regions}})

    async def _register(self, body: bytes, context: Context) -> bytes:
        assert self._regions is not None  # noqa: S101 - else this call is not offered
        request = grpc_codec.read("SystemSharedMemoryRegisterRequest", body)
        self._regions.register(request.name, request.key, request.offset, request.byte_size, context.peer())
        return b""

    async def _unregister(self, body: bytes, context: Context) -> bytes:
        assert self._regions is not None  # noqa: S101 - else this call is not offered
        request = grpc_codec.read("SystemSharedMemoryUnregisterRequest", body)
        self._regions.unregister(request.name or None, context.peer())
        return b""


@asynccontextmanager
async def _in_turn(steps: Steps, model: str, step: oip.SequenceStep | None) -> AsyncIterator[None]:
    """Entered once the step before, of the same sequence on the same stream, is done; at once for what is of no sequence."""
    if step is None:
        yield
        return
    key, done = (model, step.id), asyncio.Event()
    before = steps.get(key)
    steps[key] = done
    try:
        if before is not None:
            await before.wait()
        yield
    finally:
        done.set()
        if steps.get(key) is done:
            del steps[key]


def _deadline_ms(asked: _Asked, served: Served, caller_left_s: float | None) -> float:
    """The request's own deadline, else the deployment's, and never later than the caller stops waiting."""
    own_ms = asked.request.timeout_us / 1000 if asked.request.timeout_us else float(served.route.deadline_ms)
    if caller_left_s is None:
        return own_ms
    return min(own_ms, (time.perf_counter() - asked.started + caller_left_s) * 1000)


def _failing_by_status(call: Call) -> Call:
    """``call``, with what went wrong told by gRPC's status."""

    async def answered(body: bytes, context: Context) -> bytes:
        try:
            return await call(body, context)
        except ERRORS as exc:
            if isinstance(exc, oip.BadRequest):
                refusals.count("request.malformed", str(exc))
            await context.abort(_status_of(exc), _details(str(exc)), _headers_of(exc))
            raise

    return answered


def _refusal(why: str) -> Call:
    async def refused(_: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
        raise AssertionError(why)

    return refused


def _status_of(exc: Exception) -> Any:
    match exc:
        case Unknown():
            return grpc.StatusCode.NOT_FOUND
        case Refused() | NotKnown():
            return grpc.StatusCode.UNAVAILABLE
        case Interrupted():
            return grpc.StatusCode.ABORTED
        case Failed():
            return grpc.StatusCode.INTERNAL
        case _:
            return grpc.StatusCode.INVALID_ARGUMENT


def _headers_of(exc: Exception) -> Metadata:
    if isinstance(exc, Refused):
        return (("retry-after", str(exc.retry_after_s)), ("skerry-reason", _header_text(str(exc))))
    return ()


def _told_of(answer: Answer) -> Metadata:
    """What is told about an answer in HTTP's headers too."""
    return (
        ("skerry-served-by", answer.served_by),
        ("skerry-node", _header_text(answer.node)),
        ("skerry-reason", _header_text(answer.reason)),
        ("server-timing", _header_text(answer.timing)),
    )


def _header_text(text: str) -> str:
    """Text that may stand in a header: printable ASCII, bounded."""
    text = text[:300]
    return text if text.isascii() and text.isprintable() else "".join(c if " " <= c <= "~" else "?" for c in text)


def _details(text: str) -> str:
    return text.encode()[:MAX_DETAILS_BYTES].decode(errors="ignore")

"""The REST API's calls. Each is listed once, in CALLS; the router and the OpenAPI document are both made from that list."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.accounts.directory import Caller
from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.bodies import json_body
from coordinator.commands import Commands
from coordinator.core.search import NotUnderstood, Search
from coordinator.core.search import parse as parse_search
from coordinator.model_store import ModelStore
from coordinator.news import News
from coordinator.registry import audit, models, nodes
from coordinator.registry.database import Database
from coordinator.views import Views
from coordinator.vouching import Vouching
from skerry.wire import codec, logs, topics
from skerry.wire.accounts import Role, may
from skerry.wire.api import (
    EventView,
    LoadView,
    LogsView,
    ModelView,
    NodeView,
    Pushed,
    ServeView,
    SignatureState,
    Signed,
    SplitView,
)
from skerry.wire.bundle import MAX_BUNDLE_BYTES, Bundle
from skerry.wire.fleet import Difference
from skerry.wire.messages import LogsRequest, ModelRef, StateTensor, WarmupTensor

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
STREAM_IDLE_S = 15.0
STREAM_PAUSE_S = 0.5


class Call(msgspec.Struct, frozen=True):
    """One call: where, who may, what it takes and gives."""

    method: str
    path: str
    handler: str
    summary: str
    answer: Any
    status: int = 200
    role: Role = "viewer"
    """Who may: users with this role, or one above it."""
    boxes: bool = False
    """Whether boxes may as well."""
    body: Any = ""
    """A media type, or the kind of a JSON body."""
    query: dict[str, str] = {}
    is_open: bool = False
    """Without a login: whoever asks proves itself in the body, or is told nothing that a stranger may not know."""


CALLS = [
    Call(
        "GET", "/v1/nodes", "list_nodes", "Boxes by name, every one unless something narrows it", list[NodeView],
        query={
            "q": "words that all must hold: part of a name, KEY=PATTERN of a label, state:lost, version:0.2*, tier:edge,"
            " deployment:NAME, model:NAME:VERSION",
            "after": "a name: only those behind it; an answer that is not the last has a Link to the next (RFC 8288)",
            "limit": "1 to 1000 of them; without it all",
        },
    ),
    Call("GET", "/v1/nodes/{id}", "show_node", "One box", NodeView),
    Call("GET", "/v1/nodes/{id}/difference", "show_difference", "What a box should be against what it says that it is", Difference),
    Call(
        "GET", "/v1/nodes/{id}/serve", "show_serve", "What a box answered lately, and how fast", ServeView,
        query={"window_s": "5 to 3600, default 60: the last seconds"},
    ),
    Call("GET", "/v1/nodes/{id}/load", "show_load", "A box's load over time", LoadView, query={"minutes": "1 to 2880, default 15"}),
    Call(
        "GET", "/v1/nodes/{id}/replicas/{replica}/logs", "read_logs", "What a replica's sandbox wrote, asked of its box now", LogsView,
        role="operator", query={"lines": "of the newest, 1 to 2000, default 100", "after": "a position: only what came since"},
    ),
    Call("GET", "/v1/models", "list_models", "Every model version", list[ModelView]),
    Call(
        "PUT", "/v1/models/{name}/versions/{version}", "push_model", "Push a model version", Pushed, 201,
        role="operator", body="application/octet-stream", query={
            "sha256": "the file's digest, checked",
            "warmup": "inputs of the warm-up run: JSON, [{name, shape, value}]",
            "state": "outputs that are the next request's inputs within a sequence: JSON, [{input, output}]",
        },
    ),
    Call(
        "PUT", "/v1/models/{name}/versions/{version}/signature", "sign_model", "Say who vouches for a version: an OpenSSF model signature",
        Signed, role="operator", body=Bundle,
    ),
    Call("GET", "/v1/artifacts/{sha256}", "fetch_artifact", "A model's bytes; ranges are served", bytes, role="operator", boxes=True),
    Call(
        "GET", "/v1/split", "show_split", "Who answered over time", SplitView,
        query={"minutes": "1 to 2880, default 15", "deployment": "only this one's", "node": "only this one's"},
    ),
    Call(
        "GET", "/v1/events", "list_events", "The newest events, newest first", list[EventView],
        query={
            "node": "only this one's", "subject": "only about this", "kind": "only of this kind", "except_kind": "none of this kind",
            "after": "an id", "limit": "1 to 1000, default 200",
        },
    ),
    Call("GET", "/v1/stream", "stream", "Server-sent events that name what changed", str),
]  # fmt: skip


CALLER = web.RequestKey("caller", Caller)
ACTOR = web.RequestKey("actor", audit.Actor)
"""Set on requests of those who were checked."""


def checked(access: Access, call: Call, method: Handler) -> Handler:
    """``method`` behind the check of who calls."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if not call.is_open:
            caller = access.caller_of(request)
            if caller is None:
                raise refuse(401, "not_logged_in", "a token is needed", hint="set SKERRY_TOKEN, or run 'skerry login'")
            if not (call.boxes if caller.role == "box" else may(caller.role, call.role)):
                wanted = f"{call.role}s and above" if call.role != "admin" else "admins"
                raise refuse(403, "not_allowed", f"this call is for {wanted}, and you are {caller.role}")
            request[CALLER], request[ACTOR] = caller, access.actor_of(request, caller)
        return await method(request)

    return handler


class Calls:
    """The handlers of CALLS."""

    def __init__(
        self,
        *,
        database: Database,
        views: Views,
        vouching: Vouching,
        store: ModelStore,
        news: News,
        access: Access,
        replan: Callable[[], None],
        commands: Commands,
    ) -> None:
        self._database = database
        self._views = views
        self._vouching = vouching
        self._store = store
        self._news = news
        self._access = access
        self._replan = replan
        self._commands = commands

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def list_nodes(self, request: web.Request) -> web.Response:
        """See CALLS."""
        limit = number(request, "limit", 0, least=1, most=1000) if "limit" in request.query else None
        found = await self._views.found(search_of(request), after=request.query.get("after", ""), limit=limit)
        answer = json_answer(found.nodes)
        if found.last:
            following = request.rel_url.update_query(after=found.last)
            answer.headers["Link"] = f'<{following}>; rel="next"'
        return answer

    async def show_node(self, request: web.Request) -> web.Response:
        """See CALLS."""
        node = await self._views.node(request.match_info["id"])
        if node is None:
            raise unknown("node", request.match_info["id"], "skerry node list")
        return json_answer(node)

    async def show_difference(self, request: web.Request) -> web.Response:
        """See CALLS."""
        found = await self._views.difference(request.match_info["id"])
        if found is None:
            raise unknown("node", request.match_info["id"], "skerry node list")
        return json_answer(found)

    async def show_serve(self, request: web.Request) -> web.Response:
        """See CALLS."""
        window_s = number(request, "window_s", 60, least=5, most=3600)
        return json_answer(await self._views.serve_of(request.match_info["id"], window_s=window_s))

    async def show_load(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._views.load(request.match_info["id"], minutes=number(request, "minutes", 15, most=2880)))

    async def read_logs(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name, replica, after = request.match_info["id"], request.match_info["replica"], request.query.get("after", "")
        lines = number(request, "lines", 100, most=logs.MAX_LINES)
        if len(after) > logs.MAX_POSITION or not after.isprintable():
            raise refuse(400, "invalid_query", "after: not a position of an earlier answer", field="after")
        node = await self._database.read(lambda tables: nodes.read_node(tables, name))
        if node is None:
            raise unknown("node", name, "skerry node list")
        if len(replica) > logs.MAX_REPLICA or not replica.isprintable():
            raise unknown("replica", replica, f"skerry node show {name}")
        if not node.online:
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(node.changed_at_ms / 1000))
            raise refuse(503, "box_silent", f"box {name} is silent since {since}: its logs can't be asked for now", hint="try again later")
        reply = await self._commands.read_logs(name, LogsRequest(replica, lines, after))
        match reply.error:
            case "":
                return json_answer(LogsView(name, replica, reply.lines, reply.position))
            case logs.UNKNOWN_REPLICA:
                raise unknown("replica", replica, f"skerry node show {name}")
            case logs.BUSY:
                raise refuse(503, "box_busy", f"box {name} is reading other logs", hint="try again in a second")
            case reason:
                raise refuse(502, "box_failed", f"box {name}: {reason}")

    async def list_models(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._views.models())

    async def push_model(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name, version = model_version(request)
        warmup, state = _tensors(request, "warmup", WarmupTensor), _tensors(request, "state", StateTensor)
        sha256, size = await self._store.receive(
            chunks(request),
            expected_sha256=request.query.get("sha256", "").lower(),
            expected_bytes=request.content_length,
            state=state,
        )
        ref = ModelRef(name, version, sha256, size, warmup, state)
        now_ms = time.time_ns() // 1_000_000

        def work(tables: Tables) -> bool:
            is_new = models.save_model(tables, ref, now_ms)
            if is_new:
                after = f"sha256 {sha256}, {size} bytes"
                audit.append(tables, request[ACTOR], "model.pushed", f"{name}:{version}", after=after, now_ms=now_ms)
            return is_new

        is_new = await self._database.write(work)
        self._replan()
        return json_answer(Pushed(name, version, sha256, size, is_new), status=201 if is_new else 200)

    async def sign_model(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name, version = model_version(request)
        signature = await json_body(request, Bundle)
        if len(codec.encode(signature)) > MAX_BUNDLE_BYTES:
            hint = "sign the model alone, not with all others of a repository"
            raise refuse(413, "too_large", f"the signature has more than {MAX_BUNDLE_BYTES} bytes", hint=hint)
        now_ms = time.time_ns() // 1_000_000

        def work(tables: Tables) -> SignatureState | None:
            model = models.read_model(tables, name, version)
            if model is None:
                return None
            self._vouching.check(model, signature)
            if models.save_signature(tables, model, signature):
                after = f"key {signature.verification_material.public_key.hint[:16]}"
                audit.append(tables, request[ACTOR], "model.signed", f"{name}:{version}", after=after, now_ms=now_ms)
            return self._vouching.state(msgspec.structs.replace(model, signature=signature))

        state = await self._database.write(work)
        if state is None:
            raise unknown("model", f"{name}:{version}", "skerry model list")
        self._replan()
        return json_answer(Signed(name, version, state))

    async def fetch_artifact(self, request: web.Request) -> web.StreamResponse:
        """See CALLS."""
        path = self._store.path(request.match_info["sha256"])
        if path is None:
            raise unknown("artifact", request.match_info["sha256"], "skerry model list")
        return web.FileResponse(path, chunk_size=CHUNK_BYTES)

    async def show_split(self, request: web.Request) -> web.Response:
        """See CALLS."""
        minutes = number(request, "minutes", 15, most=2880)
        return json_answer(
            await self._views.split(minutes=minutes, deployment=request.query.get("deployment", ""), node=request.query.get("node", ""))
        )

    async def list_events(self, request: web.Request) -> web.Response:
        """See CALLS."""
        limit, after = number(request, "limit", 200, most=1000), number(request, "after", 0, least=0, most=2**53)
        narrowed = {name: request.query.get(name, "") for name in ("node", "subject", "kind", "except_kind")}
        return json_answer(await self._views.events(**narrowed, after=after, limit=limit))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """See CALLS. WHATWG HTML 9.2: named events, a comment when nothing happens so that both ends notice a dead link. Who comes
        back with ``Last-Event-ID`` is told what changed meanwhile; ``hello`` says whether that is known."""
        since = self._news.since(request.headers.get("Last-Event-ID", ""))
        hello = 'data: {"resumed": true}' if since is not None else f'id: {self._news.place}\ndata: {{"resumed": false}}'
        since = self._news.version if since is None else since
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await response.write(f"retry: 2000\nevent: hello\n{hello}\n\n".encode())
            async for changed in self._news.follow(since=since, pause_s=STREAM_PAUSE_S, idle_s=STREAM_IDLE_S):
                told = [f"event: {topic}\ndata: {{}}\n" for topic in changed]
                # With the last one alone: whoever is cut off among them is told all of them again.
                text = "\n".join([*told[:-1], f"id: {self._news.place}\n{told[-1]}\n"]) if told else ": still here\n\n"
                await response.write(text.encode())
        return response


def model_version(request: web.Request) -> tuple[str, int]:
    """Name and version in the path. Raises Refused."""
    name, version = request.match_info["name"], request.match_info["version"]
    if not topics.is_name(name):
        raise refuse(422, "invalid_name", f"{name[:80]!r} is not a name: letters, digits, '_' and '-', at most 63", field="name")
    if not (version.isascii() and version.isdigit() and 0 < len(version) <= 9 and int(version)):
        raise refuse(422, "invalid_version", f"{version[:40]!r} is not a version: a whole number from 1", field="version")
    return name, int(version)


def unknown(kind: str, name: str, hint: str) -> Exception:
    """404, for something that is asked for by name."""
    return refuse(404, f"unknown_{kind}", f"there is no {kind} {name[:80]!r}", hint=f"see '{hint}'")


def search_of(request: web.Request) -> Search:
    """What boxes are looked for. Raises Refused."""
    try:
        return parse_search(request.query.get("q", ""))
    except NotUnderstood as exc:
        raise refuse(400, "invalid_query", f"q: {exc}", field="q") from exc


def number(request: web.Request, name: str, default: int, *, least: int = 1, most: int) -> int:
    """A whole number of the query. Raises Refused."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 17 and least <= int(text) <= most):
        raise refuse(400, "invalid_query", f"{name}: {text[:40]!r} is not a number from {least} to {most}", field=name)
    return int(text)


def _tensors(request: web.Request, name: str, kind: type[T]) -> list[T]:
    try:
        return codec.decode(request.query.get(name, "[]").encode(), list[kind])  # type: ignore[valid-type]  # a list of what is given
    except codec.Malformed as exc:
        raise refuse(422, f"invalid_{name}", str(exc), field=name) from exc


async def chunks(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes."""
    async for chunk in request.content.iter_chunked(CHUNK_BYTES):
        yield chunk

"""A model version, the network that is in its file, and what boxes' gateways answer and tell of requests."""

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.bodies import beginning
from coordinator.api.calls import Call, checked, model_version, number, unknown
from coordinator.gateways import MOST_TOLD_BYTES, NotAnswered
from coordinator.model_store import ModelStore, NotTaken
from coordinator.registry import deployments, glance
from coordinator.registry.database import Database
from coordinator.survey import Survey
from coordinator.views import Views
from skerry.wire import codec
from skerry.wire.api import ModelView, NodeView
from skerry.wire.decision import MOST_KEPT_MIN, Decision, WhatIf, changed
from skerry.wire.model_graph import ModelGraph
from skerry.wire.slowest import SlowestOfAll

MOST_BODY_BYTES = 16 * 2**20
MOST_LOOKED_AT = 12
ASKED = {"deadline_ms": (1, 600_000), "size_bytes": (0, MOST_BODY_BYTES)}
MOST_TRIED = 3
"""Boxes that are asked one after the other."""
CALLS = [
    Call("GET", "/v1/models/{name}/versions/{version}", "show_model", "One model version", ModelView),
    Call("GET", "/v1/models/{name}/versions/{version}/graph", "show_graph", "The network in its file", ModelGraph),
    Call(
        "POST", "/v1/deployments/{name}/infer", "try_deployment",
        "Have a box answer one request, as its own callers would have it: the body and the answer are the Open Inference Protocol's",
        "application/json", role="operator", body="application/json", query={"node": "that box; any that has it ready where none is named"},
    ),
    Call(
        "GET", "/v1/deployments/{name}/decision", "foresee_decision",
        "Ask a box what it would do with a request that came now, and by which numbers; the header Skerry-Asked names it", Decision,
        query={
            "node": "that box; any that has it ready where none is named", "deadline_ms": "1 to 600000: the time that the request has",
            "size_bytes": "0 to 16777216: the size of its inputs",
        },
    ),
    Call(
        "GET", "/v1/deployments/{name}/decisions", "replay_decisions",
        "Ask boxes what they would have done with the requests of the last hour, had things been otherwise", WhatIf,
        query={
            "node": "that box; those with the most requests where none is named", "minutes": "1 to 60, default 60",
            "deadline_ms": "1 to 600000: the deadline", "split": "edge, cloud or overflow",
            "cloud_requests_per_hour": "what each box may send to the cloud in a clock hour",
            "link_ms": "-60000 to 60000: what answers from other boxes take longer", "is_cut_off": "true: no other box is reached",
        },
    ),
    Call(
        "GET", "/v1/deployments/{name}/slowest", "list_slowest", "The requests that took longest, and where the time went", SlowestOfAll,
        query={"node": "of that box; of those with the most requests where none is named", "minutes": "1 to 60, default 60"},
    ),
]  # fmt: skip


class ModelCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, views: Views, store: ModelStore, survey: Survey, access: Access) -> None:
        self._database = database
        self._views = views
        self._store = store
        self._survey = survey
        self._gateways = survey.gateways
        self._access = access

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def show_model(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._model(request))

    async def show_graph(self, request: web.Request) -> web.Response:
        """See CALLS."""
        model = await self._model(request)
        try:
            answer = json_answer(await self._store.graph(model.sha256))
        except NotTaken as exc:
            raise refuse(409, exc.code, f"the network of {model.name}:{model.version} can't be shown: {exc}") from exc
        answer.enable_compression()
        return answer

    async def _model(self, request: web.Request) -> ModelView:
        name, version = model_version(request)
        found = next((one for one in await self._views.models() if (one.name, one.version) == (name, version)), None)
        if found is None:
            raise unknown("model", f"{name}:{version}", "skerry model list")
        return found

    async def try_deployment(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name = request.match_info["name"]
        body = await beginning(request, MOST_BODY_BYTES)
        if len(body) > MOST_BODY_BYTES:
            raise refuse(413, "too_large", f"the request has more than {MOST_BODY_BYTES} bytes")
        reasons = []
        for node in (await self._hosts(name, request.query.get("node", "")))[:MOST_TRIED]:
            try:
                asked = await self._gateways.infer(node.id, node.gateway_url, name, body, dict(request.headers))
            except NotAnswered as exc:
                reasons.append(str(exc))
                continue
            if asked.status >= 300:
                raise _refusal(node.id, asked.status, asked.body, asked.headers)
            return web.Response(body=asked.body, headers=asked.headers)
        raise refuse(502, "not_answered", "; ".join(reasons) or "no box answered")

    async def foresee_decision(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name = request.match_info["name"]
        query = {
            key: str(number(request, key, least, least=least, most=most)) for key, (least, most) in ASKED.items() if key in request.query
        }
        node = (await self._hosts(name, request.query.get("node", "")))[0]
        try:
            asked = await self._gateways.look(node.id, node.gateway_url, name, "decision", query)
        except NotAnswered as exc:
            raise refuse(502, "not_answered", str(exc)) from exc
        if asked.status >= 300:
            raise _refusal(node.id, asked.status, asked.body, asked.headers)
        try:
            answer = json_answer(codec.decode(asked.body, Decision, max_bytes=MOST_TOLD_BYTES))
        except codec.Malformed as exc:
            raise refuse(502, "not_answered", f"box {node.id} says what this version does not understand: {exc}") from exc
        answer.headers["Skerry-Asked"] = node.id
        return answer

    async def replay_decisions(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name, query, minutes = (
            request.match_info["name"],
            dict(request.query),
            number(request, "minutes", MOST_KEPT_MIN, most=MOST_KEPT_MIN),
        )
        try:
            changed(query)
        except codec.Malformed as exc:
            field = str(exc).rpartition("`$.")[2].rstrip("`")
            raise refuse(400, "invalid_query", str(exc), field=field) from exc
        stored = await self._known(name)
        if stored.spec.split == "edge" and query.get("split", "edge") != "edge":
            text = f"{name} has 'split.mode: edge', so its boxes know of no other box: what another split would do they can't tell"
            raise refuse(409, "split_is_edge", text, hint="set split.mode to overflow for an hour, and ask then")
        return json_answer(await self._survey.decisions(name, query, minutes=minutes, node=query.get("node", "")))

    async def list_slowest(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name, minutes = request.match_info["name"], number(request, "minutes", MOST_KEPT_MIN, most=MOST_KEPT_MIN)
        await self._known(name)
        return json_answer(await self._survey.slowest(name, minutes=minutes, node=request.query.get("node", "")))

    async def _known(self, name: str) -> deployments.Stored:
        stored = await self._database.read(lambda tables: deployments.read_deployment(tables, name))
        if stored is None:
            raise unknown("deployment", name, "skerry deployment list")
        return stored

    async def _hosts(self, name: str, wanted: str) -> list[NodeView]:
        """Boxes that have it ready and are heard, one that is named alone. Raises Refused."""

        def work(tables: Tables) -> list[str] | None:
            if deployments.read_deployment(tables, name) is None:
                return None
            ready = {node for node, _ in glance.read_running(tables, name)} - glance.read_silent(tables)
            return sorted(node for node in ready if wanted in ("", node))[:MOST_LOOKED_AT]

        ready = await self._database.read(work)
        if ready is None:
            raise unknown("deployment", name, "skerry deployment list")
        found = [node for node in await self._views.some(ready) if node.state == "online" and node.gateway_url]
        if not found:
            where = f"on box {wanted[:80]!r}" if wanted else "on any box that is heard"
            raise refuse(409, "not_ready", f"{name} is not ready {where}", hint=f"see 'skerry deployment show {name}'")
        return found


def _refusal(node: str, status: int, body: bytes, headers: dict[str, str]) -> Exception:
    """The box's own words."""
    try:
        words = str(codec.decode(body[: codec.MAX_MESSAGE_BYTES], dict[str, object]).get("error", ""))
    except codec.Malformed:
        words = ""
    hint = f"try again in {headers['Retry-After']} s" if headers.get("Retry-After", "").isdecimal() else ""
    kind = 422 if 400 <= status < 500 else 503
    return refuse(kind, "refused_by_box", f"box {node}: {words[:500] or f'status {status}'}", hint=hint)

"""HTTP: the Open Inference Protocol v2, Prometheus' page, and the agent's own socket.

Sources: kserve/open-inference-protocol inference_rest.md; Triton's extension_statistics.md and extension_model_repository.md.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from edge_agent.core.routing import local_ms
from edge_agent.gateway.dispatch import Pool
from edge_agent.gateway.ledger import Account, Ledger
from edge_agent.gateway.service import Answer, Arrival, Failed, Refused, Rejected, Service, Unknown
from edge_agent.gateway.upstream import FORWARDED, PASSED_ON, TIMEOUT
from skerry import __version__
from skerry.wire import codec, oip
from skerry.wire.box import Route
from skerry.wire.messages import Tier

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """The protocol's one error shape."""
    return _json({"error": message}, status, headers)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except (oip.BadRequest, Rejected) as exc:
        return _error(400, str(exc))
    except Unknown as exc:
        return _error(404, str(exc))
    except Refused as exc:
        return _error(503, str(exc), {"Retry-After": str(exc.retry_after_s), "Skerry-Reason": _header_text(str(exc))})
    except Failed as exc:
        return _error(500, str(exc))
    except web.HTTPRequestEntityTooLarge as exc:
        return _error(413, f"body: {exc.text}")
    except web.HTTPException as exc:
        return _error(exc.status, f"{request.method} {request.path[:200]}: {exc.reason}")


def _header_text(text: str) -> str:
    """Text that may stand in a header: printable ASCII, bounded."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:300])


class Endpoints:
    """The handlers; each reads what it needs from the service and the ledger."""

    def __init__(self, service: Service, ledger: Ledger, *, node: str, tier: Tier) -> None:
        self._service = service
        self._ledger = ledger
        self._node = node
        self._tier = tier
        self._registry = CollectorRegistry()
        self._registry.register(ledger)

    async def infer(self, request: web.Request) -> web.Response:
        """``POST v2/models/<m>[/versions/<v>]/infer``."""
        started = time.perf_counter()
        body = await request.read()
        parsed = oip.parse_infer(body, request.headers.get(oip.HEADER_LENGTH))
        route, pool, account = self._service.find(request.match_info["model"], request.match_info.get("version"))
        arrival = Arrival(
            request=parsed,
            headers={header: request.headers[header] for header in PASSED_ON if header in request.headers},
            body=body,
            started=started,
            deadline_ms=_deadline_ms(request, parsed, route),
            forwarded=FORWARDED in request.headers,
        )
        answer = await self._service.infer(arrival, route, pool, account)
        total_ms = (time.perf_counter() - started) * 1000
        return self._passed_back(answer, total_ms) if answer.outcome is None else self._computed(parsed, answer, total_ms)

    def _computed(self, request: oip.InferRequest, answer: Answer, total_ms: float) -> web.Response:
        outcome = answer.outcome
        assert outcome is not None  # noqa: S101 - for the type checker
        rendered = oip.render_infer(
            request,
            outcome.outputs,
            model_name=answer.route.model,
            model_version=str(answer.route.version),
            parameters={"served_by": answer.served_by, "node": answer.node, "reason": answer.reason},
        )
        compute_ms = outcome.answer.compute_us / 1000
        headers = {
            "Skerry-Served-By": answer.served_by,
            "Skerry-Node": answer.node,
            "Skerry-Reason": _header_text(answer.reason),
            "Server-Timing": f"queue;dur={outcome.queue_ms:.3f}, compute;dur={compute_ms:.3f}, total;dur={total_ms:.3f}",
        }
        if rendered.header_length is None:
            headers["Content-Type"] = "application/json"
        else:
            headers["Content-Type"] = oip.BINARY_CONTENT_TYPE
            headers[oip.HEADER_LENGTH] = str(rendered.header_length)
        return web.Response(body=b"".join(rendered.parts), headers=headers)

    def _passed_back(self, answer: Answer, total_ms: float) -> web.Response:
        reply = answer.reply
        assert reply is not None  # noqa: S101 - for the type checker
        timing = ", ".join(filter(None, [reply.headers.get("Server-Timing", ""), f"forward;dur={total_ms:.3f}"]))
        headers = {**reply.headers, "Skerry-Served-By": answer.served_by, "Skerry-Node": answer.node}
        headers |= {"Skerry-Reason": _header_text(answer.reason), "Server-Timing": timing}
        return web.Response(body=reply.body, status=reply.status, headers=headers)

    async def live(self, _: web.Request) -> web.Response:
        """``GET v2/health/live``."""
        return _json({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        """``GET v2/health/ready``: every route can be answered by somebody."""
        missing = [route.deployment for route, pool, _ in self._service.routes() if not _can_answer(route, pool)]
        return _json({"ready": not missing, "waiting_for": missing}, 503 if missing else 200)

    async def server(self, _: web.Request) -> web.Response:
        """``GET v2``."""
        return _json({"name": "skerry", "version": __version__, "extensions": oip.EXTENSIONS, "node": self._node, "tier": self._tier})

    async def model(self, request: web.Request) -> web.Response:
        """``GET v2/models/<m>[/versions/<v>]``: inputs and outputs as the worker reads them off the model."""
        name, version = request.match_info["model"], request.match_info.get("version")
        route, pool, _ = self._service.find(name, version)
        hello = pool.hello
        if hello is None:
            raise Refused("no replica of this model has been ready here yet, its inputs are not known", 1)
        versions = sorted({r.version for r, _, _ in self._service.routes() if r.model == route.model})
        return _json(
            {
                "name": route.model,
                "versions": [str(v) for v in versions],
                "platform": "onnxruntime_onnx",
                "inputs": [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in hello.inputs],
                "outputs": [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in hello.outputs],
            }
        )

    async def model_ready(self, request: web.Request) -> web.Response:
        """``GET v2/models/<m>[/versions/<v>]/ready``."""
        route, pool, _ = self._service.find(request.match_info["model"], request.match_info.get("version"))
        ready = _can_answer(route, pool)
        return _json({"name": route.model, "ready": ready}, 200 if ready else 503)

    async def statistics(self, request: web.Request) -> web.Response:
        """``GET v2/models[/<m>[/versions/<v>]]/stats``, Triton's statistics extension."""
        name = request.match_info.get("model")
        chosen = self._service.routes() if name is None else [self._service.find(name, request.match_info.get("version"))]
        return _json({"model_stats": [_statistics(route, account) for route, _, account in chosen]})

    async def index(self, _: web.Request) -> web.Response:
        """``POST v2/repository/index``, Triton's model repository extension."""
        return _json(
            [
                {"name": r.model, "version": str(r.version), "state": "READY" if _can_answer(r, pool) else "UNAVAILABLE", "reason": ""}
                for r, pool, _ in self._service.routes()
            ]
        )

    async def change_repository(self, _: web.Request) -> web.Response:
        """Loading and unloading are the coordinator's business."""
        return _error(400, "models are placed by the coordinator: use 'skerry deploy' and 'skerry deployment delete'")

    async def metrics(self, _request: web.Request) -> web.Response:
        """``GET /metrics`` for Prometheus."""
        for _, pool, account in self._service.routes():
            account.waiting = pool.view.waiting
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def totals(self, _: web.Request) -> web.Response:
        """``GET /totals`` on the agent's socket."""
        return web.Response(body=codec.encode(self._ledger.totals()), content_type="application/json")

    async def explain(self, _: web.Request) -> web.Response:
        """``GET /routes`` on the agent's socket: what the gateway believes now."""
        return _json(
            [
                {
                    "route": route,
                    "service": pool.service,
                    "slots": pool.view.slots,
                    "local_ms": local_ms(pool.view, now_s=time.monotonic()) if pool.view.slots else None,
                }
                for route, pool, _ in self._service.routes()
            ]
        )


def _can_answer(route: Route, pool: Pool) -> bool:
    return pool.view.slots > 0 or bool(route.upstreams)


def _deadline_ms(request: web.Request, parsed: oip.InferRequest, route: Route) -> float:
    """The request's own deadline, else the deployment's; of a forwarded request what its first box says is left."""
    own_ms = parsed.timeout_us / 1000 if parsed.timeout_us else float(route.deadline_ms)
    given = request.headers.get(TIMEOUT)
    if given is None:
        return own_ms
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise oip.BadRequest(f"{TIMEOUT}: {given[:40]!r} is not a number of milliseconds")
    return float(given)


def _statistics(route: Route, account: Account) -> dict[str, Any]:
    def part(count: int, total_ms: float) -> dict[str, int]:
        return {"count": count, "ns": int(total_ms * 1e6)}

    return {
        "name": route.model,
        "version": str(route.version),
        "last_inference": account.last_at_ms,
        "inference_count": account.answered,
        "execution_count": account.computed,
        "inference_stats": {
            "success": part(account.answered, account.total_ms),
            "fail": part(account.failed + account.refused, 0.0),
            "queue": part(account.computed, account.queue_ms),
            "compute_input": part(account.computed, 0.0),
            "compute_infer": part(account.computed, account.compute_ms),
            "compute_output": part(account.computed, 0.0),
        },
        "batch_stats": [],
    }


def make_app(endpoints: Endpoints, *, body_limit_bytes: int, for_agent: bool) -> web.Application:
    """The HTTP application; ``for_agent`` adds what only this box's programs may ask."""
    app = web.Application(client_max_size=body_limit_bytes, middlewares=[_errors])
    routes = [
        web.get("/v2/health/live", endpoints.live),
        web.get("/v2/health/ready", endpoints.ready),
        web.get("/v2", endpoints.server),
        web.get("/v2/", endpoints.server),
        web.get("/v2/models/stats", endpoints.statistics),
        web.post("/v2/repository/index", endpoints.index),
        web.post("/v2/repository/models/{model}/{verb:load|unload}", endpoints.change_repository),
        web.get("/metrics", endpoints.metrics),
    ]
    for base in ("/v2/models/{model}/versions/{version}", "/v2/models/{model}"):
        routes += [
            web.post(f"{base}/infer", endpoints.infer),
            web.get(base, endpoints.model),
            web.get(f"{base}/ready", endpoints.model_ready),
            web.get(f"{base}/stats", endpoints.statistics),
        ]
    if for_agent:
        routes += [web.get("/totals", endpoints.totals), web.get("/routes", endpoints.explain)]
    app.add_routes(routes)
    return app

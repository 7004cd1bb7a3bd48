"""BentoML with an ASGI application of its own: raw bytes in and out, as that is the fastest way through it."""

import os

import bentoml
import raw
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

models = raw.models()


async def infer(request: Request) -> Response:
    """One call."""
    answer = await run_in_threadpool(models[request.path_params["name"]], await request.body())
    return Response(answer, media_type="application/octet-stream")


app = Starlette(routes=[Route("/raw/{name}", infer, methods=["POST"])])


@bentoml.service(name="bench", workers=int(os.environ["SKERRY_BENCH_REPLICAS"]), traffic={"timeout": 60}, metrics={"enabled": False})
@bentoml.asgi_app(app, path="/")
class Service:
    """Carries the application."""

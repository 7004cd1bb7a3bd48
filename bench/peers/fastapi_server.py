"""Plain FastAPI with the model in its own process: raw bytes in and out, run in the loop or in a thread beside it."""

import raw
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

app = FastAPI()
models = raw.models()


@app.post("/inline/{name}")
async def inline(name: str, request: Request) -> Response:
    """The loop waits for the model: the least latency."""
    return Response(models[name](await request.body()), media_type="application/octet-stream")


@app.post("/threads/{name}")
async def threads(name: str, request: Request) -> Response:
    """A thread waits for the model: every core is used."""
    return Response(await run_in_threadpool(models[name], await request.body()), media_type="application/octet-stream")

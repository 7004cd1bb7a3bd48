"""Models fetched from a real HTTP server that misbehaves: broken off, altered, too long, refused, no room."""

import asyncio
import hashlib
from pathlib import Path

import pytest
from aiohttp import web

from edge_agent.link.artifacts import Artifacts
from skerry.wire.messages import ModelRef

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MODEL = ModelRef("m", 1, DIGEST, len(CONTENT))


class Store:
    """The coordinator's end; ``behave`` says how it fails, ``ranges`` what it was asked for."""

    def __init__(self) -> None:
        self.behave = ""
        self.ranges: list[str] = []
        self.tokens: set[str] = set()

    async def fetch(self, request: web.Request) -> web.StreamResponse:
        self.ranges.append(request.headers.get("Range", ""))
        self.tokens.add(request.headers.get("Authorization", ""))
        content = {"altered": CONTENT[:-1] + b"!", "long": CONTENT + b"more"}.get(self.behave, CONTENT)
        if self.behave == "refused":
            return web.Response(status=404)
        start = int(self.ranges[-1].removeprefix("bytes=").rstrip("-") or 0) if self.ranges[-1] and self.behave != "no ranges" else 0
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(content) - start
        await response.prepare(request)
        if self.behave == "cut":
            await response.write(content[start : start + 300_000])
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(content[start:])
        return response


def fetched(tmp_path: Path, script, *, reserve_bytes: int = 0) -> tuple[list[tuple[str, str]], Store, Path]:
    """Run a fetcher against the store; ``script(store, said)`` is called after each word to the warden and ends by returning true."""
    said: list[tuple[str, str]] = []
    store = Store()
    folder = tmp_path / "incoming"

    async def scene() -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/artifacts/{digest}", store.fetch)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stop = asyncio.Event()

        def arrived(digest: str, reason: str) -> None:
            said.append((digest, reason))
            if script(store, said):
                stop.set()

        artifacts = Artifacts(
            folder=folder,
            url=lambda: f"http://127.0.0.1:{runner.addresses[0][1]}",
            token="t",
            proxy="",
            arrived=arrived,
            reserve_bytes=reserve_bytes,
        )
        script(store, said)
        artifacts.need([MODEL])
        await asyncio.wait_for(artifacts.run(stop), 20)
        await runner.cleanup()

    asyncio.run(scene())
    return said, store, folder


def test_a_model_arrives_whole_and_verified_and_the_token_is_shown(tmp_path):
    said, store, folder = fetched(tmp_path, lambda _, said: bool(said))
    assert said == [(DIGEST, "")]
    assert (folder / DIGEST).read_bytes() == CONTENT
    assert store.tokens == {"Bearer t"}
    assert list(folder.iterdir()) == [folder / DIGEST]


def test_a_transfer_that_breaks_off_is_resumed_where_it_ended(tmp_path):
    def script(store: Store, said) -> bool:
        store.behave = "cut" if len(said) < 2 else ""
        return len(said) == 3

    said, store, folder = fetched(tmp_path, script)
    assert [bool(reason) for _, reason in said] == [True, True, False]
    assert store.ranges[0] == ""
    assert store.ranges[1] == "bytes=300000-"
    assert store.ranges[2] == "bytes=600000-"
    assert (folder / DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize(("behaviour", "words"), [("altered", "digest: "), ("long", "bytes came"), ("refused", "answered 404")])
def test_what_is_not_the_model_is_thrown_away_said_and_tried_again(tmp_path, behaviour, words):
    def script(store: Store, said) -> bool:
        store.behave = behaviour if not said else ""
        return len(said) == 2

    said, _, folder = fetched(tmp_path, script)
    assert words in said[0][1]
    assert said[1] == (DIGEST, "")
    assert (folder / DIGEST).read_bytes() == CONTENT


def test_a_server_that_does_not_resume_is_asked_for_all_of_it(tmp_path):
    def script(store: Store, said) -> bool:
        store.behave = "cut" if not said else "no ranges"
        return bool(said) and said[-1][1] == ""

    said, store, folder = fetched(tmp_path, script)
    assert "did not resume" in said[1][1]
    assert store.ranges == ["", "bytes=300000-", ""]
    assert (folder / DIGEST).read_bytes() == CONTENT


def test_a_disk_without_room_is_said_with_numbers_and_nothing_is_asked_for(tmp_path):
    said, store, _ = fetched(tmp_path, lambda _, said: bool(said), reserve_bytes=2**60)
    assert "bytes are to come" in said[0][1]
    assert store.ranges == []

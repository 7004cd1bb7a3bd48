"""Events are told to whoever is set for it: in order, at least once, signed so that a receiver can tell, over failures of either side."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from coordinator.config import Webhook
from coordinator.core import hook
from skerry.runtime.settings import SettingsError
from skerry.wire.api import EventView
from tests.e2e.world import World, running, wait_until

KEY = bytes(range(24))


class Receiver:
    """A real server; it answers as it is told, and keeps what it took."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.refused: list[str] = []
        self.status = 204
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.status < 300:
                    receiver.taken.append(({key.lower(): value for key, value in self.headers.items()}, body))
                else:
                    receiver.refused.append(self.headers["webhook-id"])
                self.send_response(receiver.status)
                if receiver.status == 302:
                    self.send_header("Location", f"http://127.0.0.1:{receiver.port}/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.taken]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running() as world:
        yield world


def told(world: World, receiver: Receiver, **more: object) -> None:
    """The coordinator is started anew with this webhook."""
    secret = world.fleet.folder / "webhook.secret"
    secret.write_text(f"whsec_{base64.b64encode(KEY).decode()}\n")
    path = world.fleet.folder / "coordinator" / "coordinator.toml"
    text = path.read_text().partition("\n[[webhooks]]")[0]
    keys = {"url": f"http://127.0.0.1:{receiver.port}/hook", "secret_file": str(secret), "title": "ours", **more}
    path.write_text(text + "\n[[webhooks]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    world.do(world.fleet.kill("coordinator"))
    world.do(world.fleet.start_process("coordinator"))
    wait_until(lambda: is_up(world), 30)


def is_up(world: World) -> bool:
    try:
        return world.status().broker_connected
    except Exception:  # noqa: BLE001 - not yet
        return False


def toggle(world: World, reason: str) -> None:
    world.api.call("PUT", "/v1/nodes/store-1/drain", type(None), body=json.dumps({"reason": reason}).encode())
    world.api.call("DELETE", "/v1/nodes/store-1/drain", type(None))


def test_events_come_in_order_once_and_signed_and_only_those_that_are_asked_for(world, receiver):
    told(world, receiver, kinds=["node.dr*", "node.undrained"])
    for number in range(3):
        toggle(world, f"reason {number}")
    wait_until(lambda: len(receiver.taken) == 6, 20, receiver.ids)
    said = [json.loads(body) for _, body in receiver.taken]
    assert [one["type"] for one in said] == ["node.drained", "node.undrained"] * 3
    assert [one["data"]["event"]["text"] for one in said[::2]] == ["reason 0", "reason 1", "reason 2"]
    known = {event.id: event for event in world.events(node="store-1")}
    for headers, body in receiver.taken:
        number, at = headers["webhook-id"], headers["webhook-timestamp"]
        assert abs(int(at) - time.time()) < 60
        expected = base64.b64encode(hmac.new(KEY, f"{number}.{at}.".encode() + body, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        event = json.loads(body)["data"]["event"]
        assert known[event["id"]] == msgspec.convert(event, EventView)
    assert receiver.ids() == sorted(set(receiver.ids()), key=lambda one: int(one.rpartition("-")[2]))


def test_what_is_not_taken_is_told_again_and_over_a_restart_nothing_is_missing(world, receiver):
    told(world, receiver, kinds=["node.drained"])
    toggle(world, "first")
    wait_until(lambda: len(receiver.taken) == 1, 20)
    receiver.status = 500
    toggle(world, "second")
    toggle(world, "third")
    wait_until(lambda: len(receiver.refused) >= 3, 30)
    assert len(set(receiver.refused)) == 1, "the next wait behind it"
    wait_until(lambda: world.events(kind="webhook.failed"), 20)
    failed = world.events(kind="webhook.failed")[0]
    assert (failed.subject, failed.text) == ("ours", "status 500")
    world.do(world.fleet.kill("coordinator"))
    receiver.status = 204
    world.do(world.fleet.start_process("coordinator"))
    wait_until(lambda: len(receiver.taken) == 3, 30, receiver.ids)
    assert [json.loads(body)["data"]["event"]["text"] for _, body in receiver.taken] == ["first", "second", "third"]
    assert len(set(receiver.ids())) == 3
    assert receiver.taken[1][0]["webhook-id"] == receiver.refused[0], "the same number at each try"


def test_a_redirect_is_no_answer_and_is_not_followed(world, receiver):
    told(world, receiver, kinds=["node.drained"])
    receiver.status = 302
    toggle(world, "away")
    wait_until(lambda: len(receiver.refused) >= 2, 30)
    assert receiver.taken == []


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"url": "http://example.org/"}, "not https"),
        ({"url": "ftp://127.0.0.1/"}, "not https"),
        ({"url": "https://e.org", "kinds": []}, "1 to 32"),
    ],
)
def test_a_webhook_that_can_not_be_is_refused(keys, why):
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(keys, Webhook)


@pytest.mark.parametrize(
    ("secret", "why"),
    [("", "begins with whsec_"), ("whsec_!!!", "not base64"), ("whsec_" + base64.b64encode(b"short").decode(), "16 bytes or more")],
)
def test_a_secret_that_is_none_is_refused_by_its_file(tmp_path, secret, why):
    (tmp_path / "s").write_text(secret)
    with pytest.raises(SettingsError, match=why):
        Webhook("https://e.org", tmp_path / "s").key()
    with pytest.raises(SettingsError, match=r"webhooks\.secret_file"):
        Webhook("https://e.org", tmp_path / "none").key()


def test_a_secret_as_the_specification_has_it_is_read():
    """The example of the specification's own libraries."""
    key = hook.secret_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    event = EventView(7, "store-1", 1_800_000_000_123, "node.drained", "store-1", "why")
    body = hook.body_of(event, "shops")
    assert json.loads(body)["timestamp"] == "2027-01-15T08:00:00.123Z"
    headers = hook.headers_of("shops", event, body, key, now_s=1_800_000_001)
    signed = b"shops-7.1800000001." + body
    expected = base64.b64encode(hmac.digest(base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert "webhook-signature" not in hook.headers_of("shops", event, body, None, now_s=1)

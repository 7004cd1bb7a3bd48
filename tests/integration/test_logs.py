"""What a sandbox wrote, on its way to whoever asks: over the warden's real socket, over real brokers, past hostile ends of each."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import aiomqtt
import pytest

from edge_agent.link.commands import MOST_AT_A_TIME, Commands
from edge_agent.link.outbox import Outbox
from edge_agent.link.session import Reach, Session
from edge_agent.link.warden import WARDEN_ABSENT, WardenLink
from edge_agent.warden.listener import MOST_READING, Listener
from skerry.demo.broker import find_mosquitto
from skerry.runtime import mqtt
from skerry.runtime.settings import Broker
from skerry.wire import codec, topics
from skerry.wire.box import Entries, LogsRead, ReadLogs, State
from skerry.wire.logs import BUSY, UNKNOWN_REPLICA
from skerry.wire.messages import Birth, LogsReply, LogsRequest, Presence, Reported
from tests.conftest import need
from tests.e2e.world import World, running, wait_until

ReadLogsOf = Callable[[LogsRequest], Awaitable[LogsReply]]


async def holds(what: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not what():
            await asyncio.sleep(0.01)


# -- agent and warden, over the socket


@contextlib.asynccontextmanager
async def warden(path: Path, read_logs: ReadLogsOf, applied: list[bytes] | None = None) -> AsyncIterator[None]:
    """The warden's end of the socket, around a pretended reconciler."""
    stop = asyncio.Event()

    async def apply(envelope: bytes) -> None:
        if applied is not None:
            applied.append(envelope)

    async def arrived(sha256: str, reason: str) -> None:
        pass

    listener = Listener(
        path,
        state=lambda: State(Reported(0)),
        apply=apply,
        arrived=arrived,
        entries_after=lambda _: Entries("j", []),
        forget=lambda _: None,
        linked=lambda who, is_up: None,
        read_logs=read_logs,
        journal_id="j",
    )
    serving = asyncio.create_task(listener.serve(stop))
    try:
        await holds(path.exists)
        yield
    finally:
        stop.set()
        await serving
        path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def agent_link(path: Path) -> AsyncIterator[WardenLink]:
    """The agent's end, connected."""
    stop, heard = asyncio.Event(), asyncio.Event()

    async def on_state(_: State) -> None:
        heard.set()

    link = WardenLink(path, on_state=on_state, on_entries=lambda _: None, position=lambda: ("j", 0))
    linking = asyncio.create_task(link.run(stop))
    try:
        async with asyncio.timeout(5):
            await heard.wait()
        yield link
    finally:
        stop.set()
        await linking


def test_a_question_reaches_the_warden_and_its_answer_comes_back_to_who_asked(tmp_path):
    async def read_logs(request: LogsRequest) -> LogsReply:
        await asyncio.sleep(0.05 if request.replica == "a" else 0)  # the second is answered first
        return LogsReply([f"{request.replica}/{request.lines}/{request.after}"], position=f"at {request.replica}")

    async def scene() -> None:
        async with warden(tmp_path / "w.sock", read_logs), agent_link(tmp_path / "w.sock") as link:
            answers = await asyncio.gather(link.read_logs(LogsRequest("a", 7, "p")), link.read_logs(LogsRequest("b")))
            assert answers == [LogsReply(["a/7/p"], position="at a"), LogsReply(["b/100/"], position="at b")]

    asyncio.run(scene())


def test_slow_logs_hold_up_nothing_else_and_too_many_are_told_so(tmp_path):
    go_on = asyncio.Event()
    applied: list[bytes] = []

    async def read_logs(request: LogsRequest) -> LogsReply:
        await go_on.wait()
        return LogsReply([request.replica])

    async def scene() -> None:
        async with warden(tmp_path / "w.sock", read_logs, applied), agent_link(tmp_path / "w.sock") as link:
            slow = [asyncio.create_task(link.read_logs(LogsRequest(f"r{i}"))) for i in range(MOST_READING)]
            await asyncio.sleep(0)
            assert await link.read_logs(LogsRequest("one too many")) == LogsReply(error=BUSY)
            link.apply(b"a document")
            await holds(lambda: applied == [b"a document"])
            assert not any(task.done() for task in slow)
            go_on.set()
            assert await asyncio.gather(*slow) == [LogsReply([f"r{i}"]) for i in range(MOST_READING)]
            assert await link.read_logs(LogsRequest("again")) == LogsReply(["again"])

    asyncio.run(scene())


def test_a_warden_that_goes_away_in_mid_answer_is_said_at_once(tmp_path):
    async def read_logs(request: LogsRequest) -> LogsReply:
        await asyncio.sleep(60)
        return LogsReply()

    async def scene() -> None:
        async with contextlib.AsyncExitStack() as up:
            await up.enter_async_context(warden(tmp_path / "w.sock", read_logs))
            async with agent_link(tmp_path / "w.sock") as link:
                waiting = asyncio.create_task(link.read_logs(LogsRequest("r")))
                await asyncio.sleep(0.1)
                await up.aclose()
                assert await asyncio.wait_for(waiting, 3) == LogsReply(error=WARDEN_ABSENT)
                await asyncio.sleep(0.2)
                assert await link.read_logs(LogsRequest("r")) == LogsReply(error=WARDEN_ABSENT)

    asyncio.run(scene())


def test_what_a_sandbox_wrote_is_short_and_harmless_when_it_leaves_the_warden(tmp_path):
    async def read_logs(request: LogsRequest) -> LogsReply:
        return LogsReply([b"\xff \x1b[31mred".decode(errors="surrogateescape"), *["x" * 100_000] * 100], position="p" * 5000)

    async def scene() -> None:
        async with warden(tmp_path / "w.sock", read_logs), agent_link(tmp_path / "w.sock") as link:
            reply = await link.read_logs(LogsRequest("r"))
            assert len(codec.encode(reply)) < codec.MAX_MESSAGE_BYTES
            assert reply.lines[0].endswith("earlier lines left out]")
            assert reply.position == ""

    asyncio.run(scene())


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"read_logs","call":"one","request":{"replica":"r"}}',
        b'{"type":"read_logs","call":%s,"request":{"replica":"r"}}' % (b"9" * 5000),
        b'{"type":"read_logs","call":1,"request":{"replica":"r","lines":1e300}}',
        b'{"type":"read_logs","call":1,"request":{"replica":"r","lines":99999}}',
        b'{"type":"read_logs","call":1,"request":{"replica":["r"]}}',
        b'{"type":"read_logs","call":1}',
    ],
)
def test_an_agent_in_an_enemys_hands_loses_its_connection_and_the_next_is_served(tmp_path, line):
    async def read_logs(request: LogsRequest) -> LogsReply:
        return LogsReply([request.replica])

    async def scene() -> None:
        async with warden(tmp_path / "w.sock", read_logs):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "w.sock"))
            writer.write(line + b"\n")
            while said := await asyncio.wait_for(reader.readline(), 5):
                assert b"logs_read" not in said
            writer.close()
            async with agent_link(tmp_path / "w.sock") as link:
                assert await link.read_logs(LogsRequest("r")) == LogsReply(["r"])

    asyncio.run(scene())


def test_an_answer_that_nobody_asked_for_changes_nothing_for_the_agent(tmp_path):
    async def scene() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(codec.encode(State(Reported(0))) + b"\n")
            while line := await reader.readline():
                with contextlib.suppress(codec.Malformed):
                    call = codec.decode(line, ReadLogs).call
                    for number, text in ((call + 1, "not asked"), (call, "asked"), (call, "twice")):
                        writer.write(codec.encode(LogsRead(number, LogsReply([text]))) + b"\n")
            writer.close()

        server = await asyncio.start_unix_server(serve, path=str(tmp_path / "w.sock"))
        async with server, agent_link(tmp_path / "w.sock") as link:
            assert await link.read_logs(LogsRequest("r")) == LogsReply(["asked"])
            assert await link.read_logs(LogsRequest("r")) == LogsReply(["asked"])

    asyncio.run(scene())


# -- a box and a coordinator, over a broker


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def world(request) -> Iterator[World]:
    """A broker and a coordinator."""
    need("mosquitto", "" if request.param == "embedded" or find_mosquitto() else "mosquitto is not installed")
    with running(broker_kind=request.param, wait=False) as world:
        for name in world.fleet.names():
            if "." in name:
                world.do(world.fleet.kill(name))
        yield world


def broker_of(world: World) -> Broker:
    return Broker("127.0.0.1", world.fleet.broker_port)


async def run_box(world: World, node: str, read_logs: ReadLogsOf, stop: asyncio.Event, parts: list[tuple[Session, Outbox]]) -> None:
    """The agent's own session and commands; what is behind them is pretended."""

    async def reply(correlation: bytes, message: LogsReply) -> None:
        await session.reply(correlation, message)

    outbox = Outbox(Path(":memory:"), most_bytes=2**23)
    commands = Commands(read_logs=read_logs, reply=reply)
    session = Session(
        reach=Reach(broker_of(world), 1, (0.1, 0.5)),
        fleet="demo",
        node=node,
        outbox=outbox,
        birth=lambda epoch: Birth("edge", {}, "http://127.0.0.1:9", "b", epoch, "v", 4, 2**34, outbox_epoch=outbox.epoch),
        on_desired=lambda _: None,
        on_command=commands.hear,
    )
    parts.append((session, outbox))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(commands.run(stop))
        tasks.create_task(session.run(stop))
    outbox.close()


class Box:
    """A box that runs in a loop of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, session: Session, outbox: Outbox) -> None:
        self._loop = loop
        self._session = session
        self._outbox = outbox

    def say_event(self, kind: str) -> None:
        self._loop.call_soon_threadsafe(self._session.say_event, kind)

    def unconfirmed(self) -> int:
        """Events that the coordinator did not acknowledge yet."""

        async def depth() -> int:
            return self._outbox.depth()[0]

        return asyncio.run_coroutine_threadsafe(depth(), self._loop).result(5)


@contextlib.contextmanager
def box(world: World, node: str, read_logs: ReadLogsOf) -> Iterator[Box]:
    """A box in a thread of its own, from when the coordinator knows it to its clean end."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    parts: list[tuple[Session, Outbox]] = []
    thread = threading.Thread(target=loop.run_until_complete, args=(run_box(world, node, read_logs, stop, parts),), name=node)
    thread.start()
    try:
        wait_until(lambda: any(n.id == node and n.state == "online" for n in world.nodes()), 15, world.log_tails)
        yield Box(loop, *parts[0])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


class Sandboxes:
    """Logs by replica, as a driver has them: a position is how many lines came before it."""

    def __init__(self, **logs: list[str]) -> None:
        self.logs = logs
        self.is_broken = False

    async def read(self, request: LogsRequest) -> LogsReply:
        if self.is_broken:
            return LogsReply(error="bubblewrap: the log is on a disk that \x1b[5mfailed")
        if request.replica not in self.logs:
            return LogsReply(error=UNKNOWN_REPLICA)
        lines = self.logs[request.replica]
        return LogsReply(lines[int(request.after or 0) :][-request.lines :], position=str(len(lines)))


def ask(world: World, path: str) -> tuple[int, dict]:
    request = Request(f"{world.fleet.url}/v1/nodes/{path}", headers={"Authorization": f"Bearer {world.fleet.token}"})
    try:
        with urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read())
    except HTTPError as exc:
        with exc:
            return exc.code, json.loads(exc.read())["error"]


def test_the_newest_lines_are_shown_and_then_only_what_came_since(world):
    sandboxes = Sandboxes(**{"scale-0": [f"line {i}" for i in range(150)], "quiet-0": []})
    with box(world, "good-1", sandboxes.read):
        status, view = ask(world, "good-1/replicas/scale-0/logs")
        assert (status, view["node"], view["replica"]) == (200, "good-1", "scale-0")
        assert view["lines"] == [f"line {i}" for i in range(50, 150)]
        sandboxes.logs["scale-0"].append("line 150")
        assert ask(world, f"good-1/replicas/scale-0/logs?after={view['position']}")[1]["lines"] == ["line 150"]
        assert ask(world, "good-1/replicas/scale-0/logs?lines=2")[1]["lines"] == ["line 149", "line 150"]
        assert ask(world, "good-1/replicas/quiet-0/logs")[1]["lines"] == []


WRONG = [
    ("nobody/replicas/r/logs", 404, "unknown_node"),
    ("+/replicas/r/logs", 404, "unknown_node"),
    ("good-2/replicas/r/logs", 404, "unknown_replica"),
    (f"good-2/replicas/{'r' * 5000}/logs", 404, "unknown_replica"),
    ("good-2/replicas/%00%0a/logs", 404, "unknown_replica"),
    ("good-2/replicas/%ff%fe/logs", 404, "unknown_replica"),
    ("good-2/replicas/..%2f..%2fetc/logs", 404, "unknown_replica"),
    ("good-2/replicas/%23%2b/logs", 404, "unknown_replica"),
    ("good-2/replicas/scale-0/logs?lines=0", 400, "invalid_query"),
    ("good-2/replicas/scale-0/logs?lines=2001", 400, "invalid_query"),
    ("good-2/replicas/scale-0/logs?lines=-1", 400, "invalid_query"),
    (f"good-2/replicas/scale-0/logs?after={'9' * 300}", 400, "invalid_query"),
    ("good-2/replicas/scale-0/logs?after=%1b", 400, "invalid_query"),
]


def test_a_question_that_is_wrong_is_refused_with_what_is_wrong(world):
    with box(world, "good-2", Sandboxes(**{"scale-0": ["fine"]}).read):
        for path, status, code in WRONG:
            got, problem = ask(world, path)
            assert (path, got, problem["code"]) == (path, status, code)
        assert ask(world, "good-2/replicas/scale-0/logs")[1]["lines"] == ["fine"]


def test_a_silent_box_a_broken_one_and_a_busy_one_say_so(world):
    sandboxes = Sandboxes(**{"scale-0": ["fine"]})
    slow = threading.Event()

    async def read_logs(request: LogsRequest) -> LogsReply:
        while slow.is_set():
            await asyncio.sleep(0.01)
        return await sandboxes.read(request)

    with box(world, "good-3", read_logs):
        sandboxes.is_broken = True
        status, problem = ask(world, "good-3/replicas/scale-0/logs")
        assert (status, problem["code"]) == (502, "box_failed")
        assert problem["message"] == "box good-3: bubblewrap: the log is on a disk that failed"
        sandboxes.is_broken = False
        slow.set()
        answers: list[int] = []
        asking = [
            threading.Thread(target=lambda: answers.append(ask(world, "good-3/replicas/scale-0/logs")[0]))
            for _ in range(MOST_AT_A_TIME + 2)
        ]
        for thread in asking:
            thread.start()
        wait_until(lambda: answers == [503, 503], 10, lambda: answers)
        slow.clear()
        for thread in asking:
            thread.join()
        assert sorted(answers) == [200] * MOST_AT_A_TIME + [503] * 2
    wait_until(lambda: world.node("good-3").state != "online", 15, world.log_tails)
    status, problem = ask(world, "good-3/replicas/scale-0/logs")
    assert (status, problem["code"]) == (503, "box_silent")
    assert problem["message"].startswith("box good-3 is silent since 20")


def test_asking_needs_an_operators_token(world):
    for token, status in (("nonsense", 401), ((world.fleet.folder / "coordinator" / "box.token").read_text().strip(), 403)):
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(f"{world.fleet.url}/v1/nodes/a/replicas/b/logs", headers={"Authorization": f"Bearer {token}"}), timeout=10)
        with refused.value:
            assert refused.value.code == status


def test_the_command_line_prints_lines_as_they_are_and_json_for_scripts(world):
    with box(world, "good-4", Sandboxes(**{"scale-0": ["one", "[red]two[/]", "\x1b[2Jthree", "x" * 300]}).read):
        done = world.cli("logs", "good-4", "scale-0", "--lines", "3")
        assert (done.returncode, done.stdout.decode()) == (0, "[red]two[/]\nthree\n" + "x" * 300 + "\n")
        view = json.loads(world.cli("logs", "good-4", "scale-0", "--json").stdout)
        assert view["lines"][:3] == ["one", "[red]two[/]", "three"]
        gone = world.cli("logs", "good-4", "nothing-0")
        assert gone.returncode == 5
        assert b"there is no replica 'nothing-0'" in gone.stderr


def test_following_prints_each_line_once_over_a_loss_and_ends_with_ctrl_c(world, monkeypatch):
    sandboxes = Sandboxes(**{"scale-0": ["one"]})
    monkeypatch.setenv("SKERRY_URL", world.fleet.url)
    monkeypatch.setenv("SKERRY_TOKEN", world.fleet.token)
    with box(world, "good-5", sandboxes.read):
        # A shell that starts us in the background has us, and what we start, ignore Ctrl-C; and a fork that runs Python is none that
        # threads allow.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "skerry", "logs", "good-5", "scale-0", "-f"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
            assert following.stdout is not None
            assert (first := following.stdout.readline()) == b"one\n", following.communicate(timeout=10) if not first else ""
            sandboxes.logs["scale-0"] += ["two", "three"]
            assert [following.stdout.readline() for _ in range(2)] == [b"two\n", b"three\n"]
            sandboxes.is_broken = True
            time.sleep(2.5)
            sandboxes.logs["scale-0"].append("four")
            sandboxes.is_broken = False
            assert following.stdout.readline() == b"four\n"
            following.send_signal(signal.SIGINT)
            rest, said = following.communicate(timeout=10)
    assert following.returncode == 130
    assert rest == b""
    assert [line.split(b":")[0] for line in said.splitlines()] == [b"note", b"note"]
    assert b"asking on" in said
    assert b"answers again" in said


# -- ends in an enemy's hands


def test_only_the_box_that_was_asked_is_believed_and_what_is_no_answer_is_passed_over(world):
    """A pretended box and a stranger on the wire: the stranger knows the number and answers first, in the wrong name."""

    async def scene() -> tuple[int, dict]:
        async with (
            mqtt.connected(broker_of(world), "test-evil-1", last_will=None, queue=10) as evil,
            mqtt.connected(broker_of(world), "test-evil-2", last_will=None, queue=10) as stranger,
        ):
            await evil.subscribe(topics.command("demo", "evil-1", "logs"), qos=1)
            await evil.publish(topics.up("demo", "evil-1", "presence"), codec.encode(Presence(True, "b", 1)), qos=1)
            await asyncio.to_thread(wait_until, lambda: any(n.id == "evil-1" for n in world.nodes()), 10)
            asking = asyncio.create_task(asyncio.to_thread(ask, world, "evil-1/replicas/r/logs?lines=5&after=p"))
            command = await asyncio.wait_for(anext(aiter(evil.messages)), 10)
            assert codec.decode(bytes(command.payload), LogsRequest) == LogsRequest("r", 5, "p")
            assert mqtt.response_topic_of(command) == topics.up("demo", "evil-1", "reply")
            correlation = mqtt.correlation_of(command)

            async def reply(client: aiomqtt.Client, node: str, payload: bytes, number: bytes) -> None:
                await client.publish(topics.up("demo", node, "reply"), payload, qos=1, properties=mqtt.stamped(correlation=number))

            await reply(stranger, "evil-2", codec.encode(LogsReply(["lies"])), correlation)
            await reply(evil, "evil-1", codec.encode(LogsReply(["guess"])), b"\x00" * 16)
            await reply(evil, "evil-1", codec.encode(LogsReply(["no number"])), b"")
            for garbage in (b"", b"[]", b'{"lines":{}}', b'{"lines":[1e400]}', b"\xff" * 1000, b"[" * 100_000):
                await reply(evil, "evil-1", garbage, correlation)
            await reply(evil, "evil-1", codec.encode(LogsReply(["\x1b[2Jtruth"])), correlation)
            return await asking

    status, view = asyncio.run(scene())
    assert (status, view["lines"]) == (200, ["truth"])
    assert world.status().broker_connected


def test_a_box_that_never_answers_costs_who_asks_ten_seconds_and_nobody_else_anything(world):
    async def scene() -> None:
        async with mqtt.connected(broker_of(world), "test-mute-1", last_will=None, queue=10) as mute:
            await mute.publish(topics.up("demo", "mute-1", "presence"), codec.encode(Presence(True, "b", 1)), qos=1)
            await asyncio.to_thread(wait_until, lambda: any(n.id == "mute-1" for n in world.nodes()), 10)
            started = time.monotonic()
            asking = asyncio.create_task(asyncio.to_thread(ask, world, "mute-1/replicas/r/logs"))
            await asyncio.sleep(0.5)
            assert (await asyncio.to_thread(ask, world, "mute-1"))[0] == 200
            status, problem = await asking
            assert (status, problem["code"]) == (504, "no_answer")
            assert 9 < time.monotonic() - started < 15

    asyncio.run(scene())


def test_a_box_answers_nowhere_but_on_its_own_branch_and_hears_acknowledgements_meanwhile(world):
    """Commands from an enemy who may publish to the box: other topics for the answer, no number, garbage, a flood."""
    go_on = threading.Event()

    async def read_logs(request: LogsRequest) -> LogsReply:
        while request.replica == "slow" and not go_on.is_set():
            await asyncio.sleep(0.01)
        return LogsReply([request.replica])

    async def scene() -> None:
        own = topics.up("demo", "good-6", "reply")
        async with mqtt.connected(broker_of(world), "test-enemy", last_will=None, queue=100) as enemy:
            for topic in (own, "elsewhere/+", topics.up("demo", "good-7", "reply")):
                await enemy.subscribe(topic, qos=1)

            async def command(payload: bytes, response_topic: str, correlation: bytes) -> None:
                properties = mqtt.stamped(expiry_s=30, response_topic=response_topic, correlation=correlation)
                await enemy.publish(topics.command("demo", "good-6", "logs"), payload, qos=1, properties=properties)

            async def answer() -> tuple[str, bytes, LogsReply]:
                message = await asyncio.wait_for(anext(aiter(enemy.messages)), 10)
                return str(message.topic), mqtt.correlation_of(message), codec.decode(bytes(message.payload), LogsReply)

            good = codec.encode(LogsRequest("r"))
            for topic in ("elsewhere/x", topics.up("demo", "good-7", "reply"), topics.up("demo", "good-6", "events"), ""):
                await command(good, topic, b"1")
            await command(good, own, b"")
            await command(good, own, b"n" * 65)
            await command(b'{"replica":7}', own, b"2")
            topic, number, said = await answer()
            assert (topic, number) == (own, b"2")
            assert "does not understand the request" in said.error
            await command(b'{"replica":"r","lines":1000000000000}', own, b"3")
            assert "lines" in (await answer())[2].error
            await command(codec.encode(LogsRequest("r" * 10_000)), own, b"4")
            assert (await answer())[1:] == (b"4", LogsReply(error=UNKNOWN_REPLICA))

            slow = codec.encode(LogsRequest("slow"))
            for index in range(MOST_AT_A_TIME + 3):
                await command(slow, own, b"s%d" % index)
            assert [(await answer())[2].error for _ in range(3)] == [BUSY] * 3
            running_box.say_event("test.meanwhile")
            await asyncio.to_thread(wait_until, lambda: any(e.kind == "test.meanwhile" for e in world.events(node="good-6")), 10)
            await asyncio.to_thread(wait_until, lambda: running_box.unconfirmed() == 0, 5)
            go_on.set()
            assert sorted([(await answer())[1] for _ in range(MOST_AT_A_TIME)]) == [b"s%d" % i for i in range(MOST_AT_A_TIME)]

    with box(world, "good-6", read_logs) as running_box:
        asyncio.run(scene())

"""A hostile worker against the box's own programs: the gateway's connection code and the warden's first look, on real sockets."""

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import cast

from coordinator.model_store import ModelStore
from edge_agent.core.queueing import Place
from edge_agent.gateway import calls
from edge_agent.gateway.connection import HELLO_TIMEOUT_S, ReplicaLost, WorkerConnection
from edge_agent.warden import launch
from edge_agent.warden.store import Store, StoreFailed
from skerry.wire import codec, ipc, oip
from skerry.wire.messages import ModelRef
from tests.escape.inside import hostile
from tests.escape.inside.verdict import Attempt, Verdict
from tests.escape.scenes import Broken
from tests.escape.stage import Stage, peak_memory

CALL_S = 1.0
"""The deadline that a caller has; the gateway ends the wait at it."""
IDLE_S = 1.0
MEMORY_BYTES = 64 * 2**20
WARDEN_S = 8.0
INPUT = oip.Tensor("x", "FP32", (1, 16384), memoryview(bytes(65536)))
ARENA_BYTES = 2**20
LINKS = {
    "link-to-the-host": "Replaces its socket by a link to a socket of the host; held where gateway and warden do not follow it.",
    "link-to-a-neighbour": "Replaces its socket by a link to a neighbour's; held where gateway and warden do not follow it.",
}
NO_SOCKETS = ("folder", "pipe", "file")


def _attempts() -> dict[str, Attempt]:
    def never(_: object) -> Verdict:
        raise AssertionError("this attempt is judged from outside")

    tries = {name: (way.__doc__ or "").splitlines()[0] for name, way in hostile.WAYS.items()} | LINKS
    tries["no-socket-at-all"] = "Has a folder, a pipe or a plain file where its socket should be."
    tries["stalling-the-warden"] = (
        "Does all of this while the warden asks whether it is ready; held where each answer comes in bounded time."
    )
    return {name: Attempt(name, "protocol", what, never, killed_ok=False) for name, what in tries.items()}


ATTEMPTS = _attempts()


async def _deal(path: Path) -> str:
    """Open a connection as the gateway does, wait a little, and make one call; how it was got rid of, or empty where it was believed."""
    try:
        connection, _ = await WorkerConnection.open(path, arena_bytes=ARENA_BYTES)
    except ReplicaLost as exc:
        return f"no connection: {_plain(str(exc), path)}"
    try:
        await asyncio.wait([connection.closed], timeout=IDLE_S)
        async with asyncio.timeout(CALL_S):
            outcome = await _called(connection)
        return await _unchanged(outcome.outputs)
    except (ReplicaLost, codec.Malformed) as exc:
        return f"{type(exc).__name__}: {_plain(str(exc), path)}"
    except TimeoutError:
        return "the caller's deadline"
    finally:
        connection.close()


async def _called(connection: WorkerConnection) -> calls.Outcome:
    """One call as the gateway makes it, its input in shared memory where there is any, with room for its outputs there."""
    arena, body = connection.arena, list[oip.Bytes]()
    job = calls.Job([INPUT], [], Place(0, 0.0, 0.0, 1), memory=[], sequence=None)
    sent = calls.Batch([job], 1, 0.0)
    heads = [calls.placed(INPUT, job, arena, sent, body)]
    room = arena.take(4096) if arena is not None else None
    sent.rooms.append(room)

    def on_answers(answers: list[ipc.Answer], inline: memoryview) -> None:
        try:
            calls.deliver("hostile", sent, answers, inline, arena.view if arena is not None else None)
        except codec.Malformed as exc:
            job.fail(exc)

    connection.send([ipc.Call(1, heads, [], ipc.Room(room.at, 4096) if room is not None else None)], body, on_answers, job.fail)
    return await job.future


async def _unchanged(outputs: list[oip.Tensor]) -> str:
    """Empty, unless there is text whose lengths were checked: then whether they stay as they were."""
    texts = [output for output in outputs if output.datatype == "BYTES"]
    before = [bytes(text.data) for text in texts]
    for _ in range(200):
        await asyncio.sleep(0.001)
        if before != [bytes(text.data) for text in texts]:
            return ""
    return "what was checked stays as it was" if texts else ""


def _plain(text: str, path: Path) -> str:
    """Without paths of this machine."""
    return text.replace(str(path), "its socket").replace(f"{path.parent.name}: ", "")[:90]


async def _contained(stage: Stage, name: str) -> Verdict:
    """Held where the caller got an error, in bounded time and memory."""
    path = stage.socket_dir("hostile") / name / "worker.sock"
    if not path.exists():
        raise Broken("the hostile worker has no such socket")
    began = time.monotonic()
    with peak_memory() as grown:
        how = await _deal(path)
    took_s = time.monotonic() - began
    if grown[0] > MEMORY_BYTES:
        return Verdict(False, f"the gateway took {grown[0] // 2**20} MiB; {how or 'answered'}")
    if took_s > HELLO_TIMEOUT_S + IDLE_S + CALL_S + 1:
        return Verdict(False, f"it took {took_s:.0f} s")
    return Verdict(bool(how), how or "the answer was believed")


async def _not_followed(stage: Stage, name: str, refused: dict[str, str]) -> Verdict:
    """Held where neither program went to what the link points at."""
    path = stage.socket_dir("hostile") / name / "worker.sock"
    if name in refused:
        return Verdict(True, f"{refused[name]} from symlink")
    if not path.is_symlink():
        raise Broken("there is no link")
    before = await _visits(stage)
    _, writer = await asyncio.open_unix_connection(str(path))
    writer.close()
    if await _visits(stage) == before:
        raise Broken("what the link points at can't be reached even by who follows it")
    followed = []
    for program, ask in (("gateway", _deal), ("warden", lambda path: _answers(path.parent))):
        before = await _visits(stage)
        await ask(path)
        if await _visits(stage) > before:
            followed.append(program)
    return Verdict(not followed, f"followed by the {' and the '.join(followed)}" if followed else "neither follows it")


async def _answers(folder: Path) -> bool:
    """The warden's first look at a worker."""
    line = await launch.connect(folder)
    if line is not None:
        line.close()
    return line is not None


async def _visits(stage: Stage) -> int:
    """How often somebody came to the host's socket or to the neighbour's."""
    await asyncio.sleep(0.3)
    return stage.listeners.visits + max((int(str(line["visits"])) for line in await stage.said("neighbour") if "visits" in line), default=0)


async def _no_socket(stage: Stage, refused: dict[str, str]) -> Verdict:
    reasons = [f"{refused[name]} from making a {name}" for name in NO_SOCKETS if name in refused]
    for name in NO_SOCKETS:
        if name in refused:
            continue
        path = stage.socket_dir("hostile") / name / "worker.sock"
        how = await asyncio.wait_for(_deal(path), 5)
        if not how or await asyncio.wait_for(_answers(path.parent), 5):
            return Verdict(False, f"a {name} was taken for a socket")
        reasons.append(how)
    return Verdict(True, "; ".join(dict.fromkeys(reasons)))


async def _stalling(stage: Stage) -> Verdict:
    folder = stage.socket_dir("hostile")
    began = time.monotonic()
    await asyncio.gather(*(_answers(folder / name) for name in hostile.WAYS))
    took_s = time.monotonic() - began
    return Verdict(took_s < WARDEN_S, "all asked at once, each within its time" if took_s < WARDEN_S else f"{took_s:.0f} s")


async def deal(stage: Stage) -> dict[str, Verdict | Exception]:
    """All dealings with one hostile worker, which runs in a sandbox beside the neighbour."""
    found: dict[str, Verdict | Exception] = {}
    slow = ("silent", "trickle")
    async with stage.sandbox("hostile", "hostile"):
        ready = [line for line in await stage.wait_said("hostile", "ready") if "ready" in line]
        if not ready:
            broken = Broken(f"the hostile worker said nothing: {await stage.ended('hostile')}")
            return dict.fromkeys(ATTEMPTS, broken)
        refused = cast(dict[str, str], ready[0]["refused"])
        plays: dict[str, Callable[[], Awaitable[Verdict]]] = {n: partial(_contained, stage, n) for n in hostile.WAYS if n not in slow}
        plays |= {name: partial(_not_followed, stage, name, refused) for name in LINKS}
        plays |= {"no-socket-at-all": lambda: _no_socket(stage, refused), "stalling-the-warden": lambda: _stalling(stage)}
        waiting = {
            name: asyncio.create_task(_deal(stage.socket_dir("hostile") / name / "worker.sock"), name=f"escape.{name}") for name in slow
        }
        for name, play in plays.items():
            try:
                found[name] = await play()
            except (Broken, OSError, TimeoutError) as exc:
                found[name] = exc
        for name, how in zip(waiting, await asyncio.gather(*waiting.values(), return_exceptions=True), strict=True):
            if isinstance(how, BaseException):  # a keeper of connections waits for ReplicaLost and ends with anything else
                found[name] = Verdict(False, f"{type(how).__name__} ends the keeper of the connection")
            else:
                found[name] = Verdict(bool(how), how or "believed")
    return found


# -- what reaches the box from elsewhere, whatever the rung

CONTENT = b"model" * 1000
MODEL = ModelRef("m", 1, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def _refused(store: Store, incoming: Path) -> Verdict:
    try:
        store.admit(incoming, MODEL)
    except StoreFailed as exc:
        return Verdict(not store.models(), str(exc).split(": ", 1)[-1])
    return Verdict(False, "it was admitted")


def incoming_link(folder: Path) -> Verdict:
    """Puts a link into the folder for fetched models, to a file elsewhere with the right bytes."""
    (folder / "elsewhere").write_bytes(CONTENT)
    (folder / "in").symlink_to(folder / "elsewhere")
    return _refused(Store(folder / "warden"), folder / "in")


def incoming_pipe(folder: Path) -> Verdict:
    """Puts a pipe into the folder for fetched models, which would hold a reader for ever."""
    os.mkfifo(folder / "in")
    return _refused(Store(folder / "warden"), folder / "in")


def incoming_other_bytes(folder: Path) -> Verdict:
    """Puts other bytes than the pinned ones into the folder for fetched models."""
    (folder / "in").write_bytes(CONTENT[:-1] + b"!")
    return _refused(Store(folder / "warden"), folder / "in")


def digest_with_a_path_in_it(folder: Path) -> Verdict:
    """Asks the coordinator's store for a model whose digest is a path out of it."""
    (folder / "secret").write_text("secret")
    store = ModelStore(folder / "models", limit_bytes=1)
    names = ["../secret", "/etc/passwd", "..", "", "A" * 64, "../" * 20 + "etc/", "0" * 63 + "/"]
    found = [name for name in names if store.path(name) is not None]
    return Verdict(not found, f"{found} was found" if found else "no such model")


BOX = {run.__name__.replace("_", "-"): run for run in (incoming_link, incoming_pipe, incoming_other_bytes, digest_with_a_path_in_it)}

"""What an inference becomes between here and a worker: where its tensors lie on the way there, and what came back.

Tensors that are small travel in the frame. Larger ones lie in the memory that both map: a request's body is received there to begin
with, and its outputs are written there by the worker and sent to the caller from there.
"""

import asyncio
import itertools

import msgspec

from edge_agent.core import queueing
from edge_agent.core.queueing import Place
from edge_agent.gateway.arena import Arena, Region
from skerry.wire import codec, ipc, oip

SHARED_FROM_BYTES = 16 * 1024
"""Tensors smaller than that are sent along: it costs less than looking after shared memory."""


class Outcome(msgspec.Struct, frozen=True):
    """A worker's answer and how long its parts took, in milliseconds. ``room`` holds outputs: give it back when they are written."""

    answer: ipc.Answer
    outputs: list[oip.Tensor]
    replica: str
    queue_ms: float
    service_ms: float
    room: Region | None = None


class Job:
    """One inference on this box. ``future`` becomes an Outcome, ReplicaLost or TooLate."""

    __slots__ = (
        "call", "future", "inputs", "kind", "memory", "pin", "place", "rank", "sent_to", "sequence", "wanted",
    )  # fmt: skip
    _numbers = itertools.count()

    def __init__(
        self, inputs: list[oip.Tensor], wanted: list[str], place: Place, *, memory: list[Region], sequence: oip.SequenceStep | None
    ) -> None:
        self.inputs = inputs
        self.wanted = wanted
        self.place = place
        self.memory = memory
        self.sequence = sequence
        self.pin = ""
        """The one replica that may run it; empty where any may."""
        self.rank = (*queueing.rank(place), next(Job._numbers))
        self.kind: object = None
        """Equal for jobs that may share a run; None for one that goes alone."""
        self.sent_to = ""
        """The replica that has it; empty while it waits."""
        self.call = -1
        """Its number on the connection by which it was sent."""
        self.future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def fail(self, exc: Exception) -> None:
        """End it, unless it is over."""
        if not self.future.done():
            self.future.set_exception(exc)
            self.future.exception()  # nobody may be waiting any more


class Batch:
    """Calls that were sent together."""

    __slots__ = ("at_s", "held", "jobs", "rooms", "rows", "service_ms", "until_s")

    def __init__(self, jobs: list[Job], rows: int, at_s: float) -> None:
        self.jobs = jobs
        self.rows = rows
        self.at_s = at_s
        self.until_s = max(job.place.until_s for job in jobs)
        self.held: list[Region] = []
        """Shared memory that its inputs lie in."""
        self.rooms: list[Region | None] = []
        """Shared memory for each call's outputs."""
        self.service_ms = 0.0


def placed(tensor: oip.Tensor, job: Job, arena: Arena | None, sent: Batch, body: list[oip.Bytes]) -> ipc.TensorHead:
    """Where the worker finds a tensor: in the memory that it shares with us, into which it is copied if need be, or in the frame."""
    size = len(tensor.data)
    at = -1
    if arena is not None and size >= SHARED_FROM_BYTES:
        at = arena.offset_of(tensor.data)
        if at >= 0:
            sent.held += [region.hold() for region in job.memory if region.arena is arena]
        else:
            region = arena.take(size)
            if region is not None:
                region.view[:] = tensor.data
                sent.held.append(region)
                at = region.at
    if at < 0:
        body.append(tensor.data)
    return ipc.TensorHead(tensor.name, tensor.datatype, tensor.shape, size, at)


def deliver(replica: str, sent: Batch, answers: list[ipc.Answer], inline: memoryview, memory: memoryview | None) -> None:
    """Give each job its answer. Raises codec.Malformed where one does not hold what it says; rooms are given back in any case."""
    offset, rooms = 0, sent.rooms
    try:
        for index, (job, answer) in enumerate(zip(sent.jobs, answers, strict=True)):
            room = rooms[index]
            _check_room(answer, room)
            outputs, offset = ipc.tensors_of(answer.outputs, inline, offset, memory)
            if job.future.done():
                continue
            kept = room if room is not None and any(head.at >= 0 for head in answer.outputs) else None
            if kept is not None:
                rooms[index] = None
            queue_ms = (sent.at_s - job.place.arrived_s) * 1000
            job.future.set_result(Outcome(answer, outputs, replica, queue_ms, sent.service_ms, kept))
        ipc.check_end(inline, offset)
    finally:
        for room in rooms:
            if room is not None:
                room.release()


def _check_room(answer: ipc.Answer, room: Region | None) -> None:
    """An answer may lie in the room that it was given and nowhere else. Raises codec.Malformed."""
    for head in answer.outputs:
        if head.at >= 0 and (room is None or not room.at <= head.at <= head.at + head.size_bytes <= room.at + len(room.view)):
            raise codec.Malformed(f"output {head.name[:80]!r} at {head.at} does not lie where it should")

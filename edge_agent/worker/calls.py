"""A batch of calls in, its answers out: which of them run together, what a sequence remembers, and where the outputs are put.

One run at a time, whoever asks: it has all the threads that this worker may use.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from edge_agent.worker.memory import Memory, Room
from edge_agent.worker.sequences import MOST_BYTES, Sequences, State
from edge_agent.worker.session import Arrays, Places, Refused, Session
from skerry.wire import codec, ipc, oip

MAX_CALLS = 1024
ROOM_FROM_BYTES = 8 * 1024
"""Smaller outputs go with the frame even where there is room: measured, that is as fast at 4 KiB and slower at 16."""

_batches = msgspec.json.Decoder(ipc.Batch)


class StateTooLarge(Exception):
    """A sequence's state is more than is held of all."""


class TooLate(Exception):
    """A step of a sequence that nobody waits for any more."""


class _Asked:
    """A call on its way to its answer: checked, then run, then rendered; or with an answer that says why not."""

    __slots__ = ("answer", "arrays", "by", "call", "came_at", "feeds", "names", "placed", "room", "rows", "tensors", "together", "took_us")

    def __init__(self, call: ipc.Call, tensors: list[oip.Tensor], room: Room | None, by: object, came_at: float) -> None:
        self.call = call
        self.by = by
        self.came_at = came_at
        self.tensors = tensors
        self.room = room
        self.feeds: Arrays = {}
        self.names: list[str] = []
        self.rows = 0
        self.placed: dict[str, ipc.TensorHead] = {}
        self.arrays: list[Any] = []
        self.took_us = 0
        self.together = 1
        self.answer: ipc.Answer | None = None

    def fail(self, exc: Exception, *, words: str = "") -> None:
        is_refused = isinstance(exc, Refused)
        text = str(exc) if is_refused else f"{type(exc).__name__}: {str(exc)[:500]}"
        self.answer = ipc.Answer(self.call.call, error=text + words, refused=is_refused)


def batch_of(header: memoryview) -> ipc.Batch:
    """A frame's batch; raises codec.Malformed."""
    try:
        batch = _batches.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise codec.Malformed(f"Batch: {exc}") from exc
    if max(len(batch.calls), len(batch.forget)) > MAX_CALLS:
        raise codec.Malformed(f"batch: {len(batch.calls)} calls and {len(batch.forget)} to forget, at most {MAX_CALLS} are taken")
    return batch


class Calls:
    """A session, its sequences, and the right to run."""

    def __init__(self, session: Session, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = session
        self._clock = clock
        self._sequences = Sequences()
        self._running = threading.Lock()
        self._joins = session.batches
        self._state_inputs = frozenset(pair.input for pair in session.state)

    def answer(
        self, header: memoryview, body: memoryview, memory: Memory | None, *, by: object = None
    ) -> tuple[ipc.Answers, list[oip.Bytes]]:
        """The answers to a frame's calls, in their order, and what of them goes into the body; ``by`` is the connection that it came by.

        Raises codec.Malformed for no such frame.
        """
        came_at = self._clock()
        view = memory.view if memory is not None else None
        batch, offset = [], 0
        asked_for = batch_of(header)
        for call in asked_for.calls:
            tensors, offset = ipc.tensors_of(call.inputs, body, offset, view)
            batch.append(_Asked(call, tensors, Room(memory, call.room) if call.room is not None else None, (by, call.call), came_at))
        ipc.check_end(body, offset)
        for asked in batch:
            self._check(asked)
        with self._running:
            for number in asked_for.forget:
                self._sequences.forget_what((by, number))
            for group in self._groups([asked for asked in batch if asked.answer is None]):
                if len(group) == 1 or not self._run_together(group):
                    for asked in group:
                        self._run_alone(asked)
        parts: list[oip.Bytes] = []
        return ipc.Answers([asked.answer or self._rendered(asked, parts) for asked in batch]), parts

    def _check(self, asked: _Asked) -> None:
        try:
            asked.names = self._session.names_of(asked.call.outputs)
            asked.feeds = self._session.feeds_of(asked.tensors, left_out=self._state_inputs if asked.call.sequence is not None else ())
        except (Refused, oip.BadRequest) as exc:
            asked.fail(Refused(str(exc)))

    def _groups(self, batch: list[_Asked]) -> list[list[_Asked]]:
        """Those that can be run together, and those that must run alone, by themselves and in their order."""
        if len(batch) < 2 or not self._joins:
            return [[asked] for asked in batch]
        groups: dict[object, list[_Asked]] = {}
        for asked in batch:
            shapes = [asked.feeds[spec.name].shape for spec in self._session.inputs]
            asked.rows = shapes[0][0]
            fits = asked.rows > 0 and all(shape[0] == asked.rows for shape in shapes)
            key = (tuple(asked.names), tuple(shape[1:] for shape in shapes)) if fits else id(asked)
            groups.setdefault(key, []).append(asked)
        return list(groups.values())

    def _run_together(self, group: list[_Asked]) -> bool:
        """One run for all; false where it failed or made no sense, so that each must be run alone: one call's fault is not the others'."""
        started = time.perf_counter_ns()
        try:
            feeds = {name: np.concatenate([asked.feeds[name] for asked in group]) for name in group[0].feeds}
            arrays = self._session.compute(feeds, group[0].names)
        except Exception:  # noqa: BLE001 - whatever it was, each call's own run will tell whose
            return False
        if any(array.shape[:1] != (sum(asked.rows for asked in group),) for array in arrays):
            self._joins = False  # the model's word for its outputs' first axis was wrong
            return False
        took_us = (time.perf_counter_ns() - started) // 1000
        row = 0
        for asked in group:
            asked.arrays = [array[row : row + asked.rows] for array in arrays]
            asked.took_us, asked.together = took_us, len(group)
            row += asked.rows
        return True

    def _run_alone(self, asked: _Asked) -> None:
        started = time.perf_counter_ns()
        step = asked.call.sequence
        try:
            if step is not None and self._state_inputs:
                self._run_step(asked, step)
            else:
                asked.arrays = self._session.compute(asked.feeds, asked.names, self._places(asked))
        except Exception as exc:  # noqa: BLE001 - whatever a model does in its run must become an answer, not a silent socket
            asked.fail(exc)
        asked.took_us = (time.perf_counter_ns() - started) // 1000

    def _places(self, asked: _Asked) -> Places:
        """Where in the call's room ONNX Runtime itself shall write outputs."""
        places: dict[str, tuple[tuple[int, ...], int]] = {}
        if asked.room is None:
            return places
        for name in asked.names:
            shape = self._session.shape_ahead(name, asked.feeds)
            if shape is None:
                continue
            datatype = self._session.datatype_of(name)
            size = math.prod(shape) * oip.ITEM_BYTES[datatype]
            at = asked.room.part(size)
            if at >= 0:
                asked.placed[name] = ipc.TensorHead(name, datatype, shape, size, at)
                places[name] = (shape, asked.room.address(at))
        return places

    def _run_step(self, asked: _Asked, step: oip.SequenceStep) -> None:
        """The next call of a sequence. Its state is gone after a failure: what the model would have remembered is not known."""
        if step.start:
            self._sequences.forget(step.id)
        held = self._session.zeros_of_state() if step.start else self._sequences.state(step.id, self._clock())
        if held is None:
            text = f"sequence {step.id[:80]!r} is interrupted: nothing is held of it here, start it anew"
            asked.answer = ipc.Answer(asked.call.call, error=text, no_sequence=True)
            return
        try:
            state = self._advance(asked, held)
            now = self._clock()
            if 0 < asked.call.within_us < (now - asked.came_at) * 1e6:
                raise TooLate(f"the step was not done within {asked.call.within_us} us")
            if step.end:
                self._sequences.forget(step.id)
            elif not self._sequences.keep(step.id, state, now, by=asked.by):
                raise StateTooLarge(f"the state has more than the {MOST_BYTES} bytes that are held")
        except Exception as exc:  # noqa: BLE001 - as in every run
            self._sequences.forget(step.id)
            asked.fail(exc, words=f"; sequence {step.id[:80]!r} is interrupted, start it anew")

    def _advance(self, asked: _Asked, held: State) -> State:
        """Run a call with the state that is held, and return the state after it."""
        session = self._session
        feeds = held | asked.feeds
        names = asked.names + [pair.output for pair in session.state if pair.output not in asked.names]
        arrays = session.compute(feeds, names)
        outputs = dict(zip(names, arrays, strict=True))
        for pair in session.state:
            before, after = feeds[pair.input].shape, outputs[pair.output].shape
            if before != after:
                raise Refused(f"state: {pair.output!r} has shape {list(after)}, the call had {pair.input!r} with {list(before)}")
        asked.arrays = arrays[: len(asked.names)]
        return {pair.input: outputs[pair.output] for pair in session.state}

    def _rendered(self, asked: _Asked, parts: list[oip.Bytes]) -> ipc.Answer:
        """What is said of a run, its outputs in the room or in ``parts``."""
        heads = []
        for name, array in zip(asked.names, asked.arrays, strict=True):
            if array is None:
                heads.append(asked.placed[name])
                continue
            tensor = self._session.tensor_of(name, array)
            size, at = len(tensor.data), -1
            if asked.room is not None and size >= ROOM_FROM_BYTES and tensor.datatype != "BYTES":
                at = asked.room.part(size)
            if asked.room is not None and at >= 0:
                asked.room.put(at, memoryview(tensor.data))
            else:
                parts.append(tensor.data)
            heads.append(ipc.TensorHead(name, tensor.datatype, tensor.shape, size, at))
        return ipc.Answer(asked.call.call, heads, asked.took_us, batch=asked.together)

"""What a model remembers between the calls of a sequence, kept by the sequence's id. Bounded; the time is an argument.

What is forgotten here is gone: the next call of that sequence is answered with an error that says so, never with a fresh state.
"""

from typing import Any

MOST_SEQUENCES = 1024
MOST_BYTES = 64 * 2**20
IDLE_S = 60.0

State = dict[str, Any]
"""Arrays by the names of the inputs that they become."""


class Sequences:
    """States by sequence, the longest unused first."""

    def __init__(self, *, most: int = MOST_SEQUENCES, most_bytes: int = MOST_BYTES, idle_s: float = IDLE_S) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._idle_s = idle_s
        self._held: dict[str, tuple[State, int, float, object]] = {}
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def state(self, sequence: str, now: float) -> State | None:
        """What ``sequence`` left; None where nothing is held of it (any more)."""
        self._forget_idle(now)
        held = self._held.get(sequence)
        return held[0] if held is not None else None

    def keep(self, sequence: str, state: State, now: float, *, by: object = None) -> bool:
        """Hold ``state``, which the call ``by`` left, for the next one, and forget others for it, the longest unused first.

        False where it alone is too large.
        """
        self.forget(sequence)
        self._forget_idle(now)
        size = sum(array.nbytes for array in state.values()) + len(sequence.encode(errors="replace"))
        if size > self._most_bytes:
            return False
        while self._held and (len(self._held) >= self._most or self.held_bytes + size > self._most_bytes):
            self.forget(next(iter(self._held)))
        self._held[sequence] = (state, size, now, by)
        self.held_bytes += size
        return True

    def forget_what(self, by: object) -> None:
        """Hold nothing that the call ``by`` left and that no other has gone on from."""
        for sequence in [sequence for sequence, held in self._held.items() if held[3] == by]:
            self.forget(sequence)

    def forget(self, sequence: str) -> None:
        """Hold nothing of ``sequence``."""
        held = self._held.pop(sequence, None)
        if held is not None:
            self.held_bytes -= held[1]

    def _forget_idle(self, now: float) -> None:
        while self._held:
            sequence, (_, _, used, _) = next(iter(self._held.items()))
            if now - used <= self._idle_s:
                return
            self.forget(sequence)

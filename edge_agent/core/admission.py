"""What a box's memory is given to: everything that holds memory is counted, and nothing is granted that is not there. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from skerry.wire.messages import ReplicaSpec
from skerry.wire.units import format_bytes


class Limits(msgspec.Struct, frozen=True):
    """What this box may give to sandboxes, in bytes. ``gpus`` has each GPU's, or MIG instance's, by uuid."""

    memory_bytes: int
    gpus: dict[str, int] = {}


class Holding(msgspec.Struct, frozen=True):
    """What one sandbox holds, be it running, draining or warm.

    GPU memory with no ``gpu`` named lies nobody knows where: it counts against every GPU.
    """

    memory_bytes: int
    gpu: str = ""
    gpu_memory_bytes: int = 0


class Free(msgspec.Struct, frozen=True):
    """What is left; below zero where more is held than may be, as after limits were lowered."""

    memory_bytes: int
    gpus: dict[str, int] = {}

    def less(self, held: Holding) -> "Free":
        """What is left once ``held`` is held too."""
        return self._moved(held, -1)

    def plus(self, held: Holding) -> "Free":
        """What is left once ``held`` is no longer held."""
        return self._moved(held, 1)

    def has(self, held: Holding) -> bool:
        """Whether ``held`` fits, on the GPU that it names."""
        if held.memory_bytes > self.memory_bytes:
            return False
        return held.gpu_memory_bytes == 0 or held.gpu_memory_bytes <= self.gpus.get(held.gpu, -1)

    def _moved(self, held: Holding, sign: int) -> "Free":
        gpus = {
            uuid: size_bytes + sign * held.gpu_memory_bytes if held.gpu in ("", uuid) else size_bytes
            for uuid, size_bytes in self.gpus.items()
        }
        return Free(self.memory_bytes + sign * held.memory_bytes, gpus)


class Grant(msgspec.Struct, frozen=True):
    """It fits; ``gpu`` is the GPU to run on, empty where none is needed."""

    gpu: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """It does not fit; ``reason`` names what is short."""

    reason: str


def free(limits: Limits, holdings: Iterable[Holding]) -> Free:
    """What is left of ``limits``. What is held on a GPU that the box no longer has is not counted."""
    left = Free(limits.memory_bytes, limits.gpus)
    for held in holdings:
        left = left.less(held)
    return left


def holding_of(spec: ReplicaSpec, gpu: str) -> Holding:
    """What a sandbox of ``spec`` on ``gpu`` holds."""
    return Holding(spec.memory_bytes, gpu, spec.gpu_memory_bytes)


def place(spec: ReplicaSpec, left: Free) -> Grant | Refusal:
    """Whether a sandbox of ``spec`` fits into ``left``, and on which GPU: the fullest that still has room (best fit), ties by uuid."""
    short = []
    if spec.memory_bytes > left.memory_bytes:
        short.append(f"{_needs(spec.memory_bytes, 'memory', left.memory_bytes)} free")
    if spec.gpu_memory_bytes == 0:
        return Refusal(f"needs {short[0]}") if short else Grant()
    fitting = min(((size_bytes, uuid) for uuid, size_bytes in left.gpus.items() if size_bytes >= spec.gpu_memory_bytes), default=None)
    if fitting is None and left.gpus:
        short.append(f"{_needs(spec.gpu_memory_bytes, 'GPU memory', max(left.gpus.values()))} free on the emptiest GPU")
    elif fitting is None:
        short.append(f"{format_bytes(spec.gpu_memory_bytes)} of GPU memory, there is no GPU")
    if short or fitting is None:
        return Refusal("needs " + " and ".join(short))
    return Grant(fitting[1])


def _needs(needed_bytes: int, what: str, left_bytes: int) -> str:
    needed, left = format_bytes(needed_bytes), format_bytes(max(0, left_bytes))
    if needed == left:  # three digits do not tell them apart
        needed, left = f"{needed_bytes} B", f"{left_bytes} B"
    return f"{needed} of {what}, {left} is"


def give_back(spec: ReplicaSpec, left: Free, warm: Mapping[str, Holding]) -> list[str]:
    """Which warm sandboxes must stop so that ``spec`` fits: few of them, the largest first; none where it fits or never would."""
    chosen: list[str] = []
    for name in sorted(warm, key=lambda name: (-warm[name].memory_bytes, -warm[name].gpu_memory_bytes, name)):
        chosen.append(name)
        left = left.plus(warm[name])
        if isinstance(place(spec, left), Grant):
            break
    else:
        return []
    for name in list(chosen):  # all of them where it fits anyway; one that holds memory where none is short
        if isinstance(place(spec, left.less(warm[name])), Grant):
            left = left.less(warm[name])
            chosen.remove(name)
    return chosen

"""What an outbox gives up first when it is full: readings become those of whole minutes, then of whole hours, before any is dropped, and
events go last. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from skerry.wire import latency
from skerry.wire.messages import GpuSample, Sample, ServeSample

Class = Literal["events", "samples", "minutes", "hours"]
Step = Literal["roll samples", "roll minutes", "drop hours", "drop events"]

LEVELS: tuple[Class, ...] = ("samples", "minutes", "hours")
WIDTH_MS = (0, 60_000, 3_600_000)
"""Of a reading of each level."""
_COUNTS = ("edge", "peer", "cloud", "refused", "failed", "late", "compared", "differed")


def steps(held: Mapping[Class, int], most_bytes: int) -> list[Step]:
    """What to do about an outbox that holds so many bytes of each class and is over ``most_bytes``: the first of these that can be done.

    Newer readings keep a quarter for themselves, minutes another, hours an eighth, so that old coarse ones do not push out all that is
    fine; events may take all of it.
    """
    shares: list[tuple[Step, Class, int]] = [
        ("roll samples", "samples", most_bytes // 4),
        ("roll minutes", "minutes", most_bytes // 4),
        ("drop hours", "hours", most_bytes // 8),
    ]  # fmt: skip
    over: list[Step] = [step for step, name, share in shares if held.get(name, 0) > share]
    rest: list[Step] = [step for step, name, _ in shares if held.get(name, 0) and step not in over]
    last: list[Step] = ["drop events"] if held.get("events", 0) else []
    return [*over, *rest, *last]


class Row(NamedTuple):
    """A reading as it is stored: the numbers that it stands for, when it began, and its bytes."""

    first_seq: int
    seq: int
    at_ms: int
    payload: bytes


def run_of(rows: Iterable[Row], width_ms: int) -> list[Row]:
    """The first rows that make one reading of ``width_ms``: those of one such stretch of the clock that follow each other without a gap.
    No more are read than are needed."""
    run: list[Row] = []
    for row in rows:
        if run and (row.at_ms // width_ms != run[0].at_ms // width_ms or row.first_seq != run[-1].seq + 1):
            break
        run.append(row)
    return run


def merged(samples: Sequence[Sample]) -> Sample:
    """One reading for several that follow each other: counts add up, levels are averaged over all that was read."""
    first, last = samples[0], samples[-1]
    total = sum(sample.readings for sample in samples)

    def mean(value: Callable[[Sample], float]) -> float:
        return sum(value(sample) * sample.readings for sample in samples) / total

    return Sample(
        epoch=last.epoch,
        seq=last.seq,
        at_ms=first.at_ms,
        cpu_ratio=round(mean(lambda sample: sample.cpu_ratio), 4),
        memory_used_bytes=int(mean(lambda sample: sample.memory_used_bytes)),
        gpus=_gpus(samples),
        serve=_serve([one for sample in samples for one in sample.serve]),
        outbox_events=last.outbox_events,
        outbox_samples=last.outbox_samples,
        first_seq=first.first,
        readings=total,
        width_ms=max(0, last.at_ms + last.width_ms - first.at_ms),
        network_received_bytes_per_s=round(mean(lambda sample: sample.network_received_bytes_per_s), 1),
        network_sent_bytes_per_s=round(mean(lambda sample: sample.network_sent_bytes_per_s), 1),
        link_rtt_ms=round(mean(lambda sample: sample.link_rtt_ms), 2),
    )


def _gpus(samples: Sequence[Sample]) -> list[GpuSample]:
    found: dict[str, list[tuple[int, GpuSample]]] = {}
    for sample in samples:
        for gpu in sample.gpus:
            found.setdefault(gpu.uuid, []).append((sample.readings, gpu))
    return [_gpu(uuid, readings) for uuid, readings in found.items()]


def _gpu(uuid: str, readings: list[tuple[int, GpuSample]]) -> GpuSample:
    total = sum(weight for weight, _ in readings)
    means = [sum(weight * getattr(gpu, name) for weight, gpu in readings) / total for name in GpuSample.__struct_fields__[1:]]
    return GpuSample(uuid, round(means[0], 4), int(means[1]), round(means[2], 1), round(means[3], 1))


def _serve(samples: Iterable[ServeSample]) -> list[ServeSample]:
    found: dict[str, ServeSample] = {}
    for one in samples:
        held = found.get(one.deployment)
        if held is None:
            found[one.deployment] = one
            continue
        counts = {name: getattr(held, name) + getattr(one, name) for name in _COUNTS}
        found[one.deployment] = msgspec.structs.replace(held, latency=latency.merged([held.latency, one.latency]), **counts)
    return list(found.values())

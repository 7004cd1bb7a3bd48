"""Whether a fleet kept its promises through what befell it, judged from what was written down alone. Pure.

It is fed by real fleets (tests/chaos) and by those on a virtual clock (sim/virtual_fleet.py), and knows of neither.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from sim.faults import LINK, Fault


class Request(msgspec.Struct, frozen=True):
    """One question and what came of it. ``endpoints`` are the boxes that its caller knows; ``is_local`` says that the caller is on the
    first of them, and reaches it without the link."""

    sent_s: float
    ended_s: float
    endpoints: list[str]
    is_local: bool
    is_answered: bool
    is_right: bool = True
    error: str = ""


class Kept(msgspec.Struct, frozen=True, order=True):
    """An event as a box wrote it down."""

    node: str
    seq: int
    at_ms: int
    kind: str
    subject: str
    text: str


class BoxState(msgspec.Struct, frozen=True):
    """How a box stands at the end: what it was told last and what it says of itself."""

    node: str
    is_online: bool
    told: int
    reported: int
    refused: str
    wanted: list[str]
    """Replicas that it is to run."""
    ready: list[str]
    running: int
    """Sandboxes that exist on it, those that are held ready left out."""


def disturbances(faults: Sequence[Fault], recovery_s: Mapping[str, float]) -> list[tuple[str, bool, float, float]]:
    """Box, whether only from outside, from when, until when: times in which a box need not answer. ``recovery_s`` is how long a kind
    may take to be over, by kind, or by part for those that are killed or frozen; what is not in it costs no answer. A warden that is away
    while it would bring a box back has the same time again."""
    found = []
    for fault in faults:
        over_s = recovery_s.get(fault.kind, recovery_s.get(fault.part))
        if fault.box and over_s is not None:
            ends_s = fault.until_s + over_s
            for other in sorted((one for one in faults if one.box == fault.box and one.part == "warden"), key=lambda one: one.at_s):
                if fault.kind not in LINK and fault.until_s <= other.at_s < ends_s:
                    ends_s = max(ends_s, other.until_s + over_s)
            found.append((fault.box, fault.kind in LINK, fault.at_s, ends_s))
    return found


def unanswered(requests: Iterable[Request], away: Iterable[tuple[str, bool, float, float]]) -> list[str]:
    """Requests without an answer although one of the boxes that the caller knows was there all the time, and wrong answers."""
    spans = defaultdict(list)
    for box, is_outside, begun_s, over_s in away:
        spans[box].append((is_outside, begun_s, over_s))
    found = []
    for request in requests:
        if request.is_answered:
            if not request.is_right:
                found.append(f"a wrong answer at {request.sent_s:.2f} s: {request.error}")
            continue
        for index, box in enumerate(request.endpoints):
            is_near = request.is_local and index == 0
            if not any(
                begun_s < request.ended_s and over_s > request.sent_s and not (is_near and is_outside)
                for is_outside, begun_s, over_s in spans[box]
            ):
                where = "beside it" if is_near else "over the link"
                found.append(f"no answer from {box} {where}, {request.sent_s:.2f} to {request.ended_s:.2f} s: {request.error}")
                break
    return found


def events_wrong(kept: Iterable[Kept], arrived: Iterable[Kept], *, lost: Mapping[str, int]) -> list[str]:
    """Events that are missing, doubled or altered in the registry. ``lost`` is how many each box says that it gave up."""
    there, wrong = Counter(arrived), []
    missing: dict[str, list[Kept]] = defaultdict(list)
    for event, count in sorted(Counter(kept).items()):
        if not there[event]:
            missing[event.node].append(event)
        elif there[event] > count:
            wrong.append(f"{event.node}: event {event.seq} {event.kind} is there {there[event]} times, and was kept {count} times")
    for node, events in missing.items():
        if len(events) > lost.get(node, 0):
            first, told = events[0], lost.get(node, 0)
            wrong.append(f"{node}: {len(events)} events are missing, and it told of {told}: first {first.seq} {first.kind} {first.subject}")
    return wrong


def unconverged(boxes: Iterable[BoxState]) -> list[str]:
    """What is not as it was told last."""
    found = []
    for box in boxes:
        if not box.is_online:
            found.append(f"{box.node}: is not online")
        if box.told != box.reported or box.refused:
            found.append(f"{box.node}: was told {box.told}, reports {box.reported} {box.refused}".rstrip())
        if sorted(box.wanted) != sorted(box.ready):
            found.append(f"{box.node}: is to run {sorted(box.wanted)}, and {sorted(box.ready)} are ready")
        if box.running != len(box.wanted):
            found.append(f"{box.node}: {box.running} sandboxes for {len(box.wanted)} replicas")
    return found

"""Decisions made anew: what would have become of requests, had a deadline, a budget, a link or the split been another. Pure.

Each request is decided by itself, as the box found things when it came. What other decisions would have made of queues, estimates and
circuit breakers meanwhile is not followed; what they would have spent of a budget is.
"""

import msgspec

from edge_agent.core import routing
from edge_agent.core.estimate import Link
from edge_agent.core.routing import FIRST_FORWARD_MS, FORGET_S, Decision, Forward, Here, LocalView, UpstreamView
from skerry.wire.decision import MOST_TEXT, Changed, Moved, Tally, Who
from skerry.wire.messages import SplitMode, Tier

HOUR_MS = 3_600_000


class Case(msgspec.Struct, frozen=True):
    """A request as it was decided when it came: the arguments of ``routing.decide``, its deadline, and
    when that was (``at_ms``, wall clock)."""

    at_ms: int
    deadline_ms: float
    split: SplitMode
    remaining_ms: float
    local: LocalView
    upstreams: tuple[UpstreamView, ...]
    size_bytes: int
    may_leave: bool
    now_s: float


def decided(case: Case, *, forwarded: bool = False) -> Decision:
    """What became of it, unless what was asked first failed. One that was ``forwarded`` is not forwarded again."""
    return routing.decide(
        split=case.split,
        remaining_ms=case.remaining_ms,
        local=case.local,
        upstreams=case.upstreams,
        size_bytes=case.size_bytes,
        forwarded=forwarded,
        may_leave=case.may_leave,
        now_s=case.now_s,
    )


def changed(case: Case, change: Changed, *, has_budget: bool | None = None) -> Case:
    """The case as it would have been. ``has_budget`` says whether it might go to the cloud; None: as it was."""
    remaining_ms = case.remaining_ms if change.deadline_ms is None else case.remaining_ms + change.deadline_ms - case.deadline_ms
    views = () if change.is_cut_off else case.upstreams
    if change.link_ms:
        views = tuple(_farther(view, change.link_ms, case) for view in views)
    if has_budget is not None:
        views = tuple(msgspec.structs.replace(view, has_budget=has_budget) for view in views)
    return msgspec.structs.replace(case, split=change.split or case.split, remaining_ms=remaining_ms, upstreams=views)


def _farther(view: UpstreamView, by_ms: float, case: Case) -> UpstreamView:
    """An upstream whose answers take so much longer on their way; what is assumed of a link that was not measured counts as measured."""
    link = view.link
    if link.count == 0 or case.now_s - link.at_s > FORGET_S:
        link = Link(FIRST_FORWARD_MS, count=1, at_s=case.now_s, typical_bytes=float(case.size_bytes))
    return msgspec.structs.replace(view, link=msgspec.structs.replace(link, round_trip_ms=max(0.0, link.round_trip_ms + by_ms)))


class Replay:
    """Cases, the oldest first, decided as they were and as they would have been. ``moved`` holds those that another would have answered.

    A budget of requests is for each clock hour, as boxes have it; a case spends of it for all the requests that it stands for.
    """

    def __init__(self, change: Changed, *, own_tier: Tier) -> None:
        self._change = change
        self._own_tier: Tier = own_tier
        self._hour = -1
        self._spent = 0
        self.before = Tally()
        self.after = Tally()
        self.moved: list[Moved] = []

    def add(self, case: Case, count: int) -> None:
        """One more, that stands for ``count`` requests of about its time, itself among them."""
        who_was = self._who(decided(case), case)
        self.before = _plus(self.before, who_was, count)
        most = self._change.cloud_requests_per_hour
        if most is None:
            self._would(case, who_was, count, decided(changed(case, self._change)))
            return
        if (hour := case.at_ms // HOUR_MS) != self._hour:
            self._hour, self._spent = hour, 0
        would = decided(changed(case, self._change, has_budget=True))
        within = count
        if isinstance(would, Forward) and self._who(would, case) == "cloud":
            within = min(count, max(0, most - self._spent))
            self._spent += within
        self._would(case, who_was, within, would)
        if within < count:
            self._would(case, who_was, count - within, decided(changed(case, self._change, has_budget=False)))

    def _would(self, case: Case, who_was: Who, count: int, would: Decision) -> None:
        who_would = self._who(would, case)
        if not count:
            return
        self.after = _plus(self.after, who_would, count)
        if who_was != who_would:
            self.moved.append(Moved(case.at_ms, count, who_was, who_would, routing.in_words(would)[:MOST_TEXT]))

    def _who(self, decision: Decision, case: Case) -> Who:
        match decision:
            case Here():
                return "cloud" if self._own_tier == "cloud" else "edge"
            case Forward(node=node):
                return "cloud" if any(view.node == node and view.tier == "cloud" for view in case.upstreams) else "peer"
        return "refused"


def _plus(tally: Tally, who: Who, count: int) -> Tally:
    return msgspec.structs.replace(tally, **{who: getattr(tally, who) + count})

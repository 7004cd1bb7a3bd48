"""The decisions together, closed loop on a virtual clock: what a box gets done when five times too much comes or when the cloud fails."""

import heapq
import itertools
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core import breaker
from edge_agent.core.batching import Send, next_batch
from edge_agent.core.breaker import Breaker
from edge_agent.core.estimate import CostCurve, Estimate, Link, updated_curve
from edge_agent.core.queueing import Place, ahead_of, hopeless, rank, to_shed
from edge_agent.core.routing import Forward, Here, LocalView, UpstreamView, decide

DEADLINE_S = 0.1
MARGIN_S = 0.002
"""Kept back for the way to the caller, as the gateway does."""
QUEUE_LIMIT = 64


class Asked(msgspec.Struct, eq=False):
    """A request and what became of it: ``done_s`` is when its caller had an answer, ``shed`` that it was told that there is none."""

    number: int
    place: Place
    work: float
    """Its part in how long its run takes: 1 is usual."""
    done_s: float | None = None
    shed: bool = False
    kept: bool = False
    here: bool = False

    @property
    def is_made(self) -> bool:
        return self.done_s is not None and self.done_s <= self.place.arrived_s + DEADLINE_S


class Box:
    """A box whose runs take 4 ms and 1 ms for each row, and an upstream that answers as ``cloud`` says, or never where that is None."""

    def __init__(self, *, slots: int, max_rows: int, rate_per_s: float, split: str = "edge", cloud: Callable | None = None) -> None:
        self.slots, self.max_rows, self.rate_per_s, self.split, self.cloud = slots, max_rows, rate_per_s, split, cloud
        self.now_s = 0.0
        self.waiting: list[Asked] = []
        self.running: dict[int, int] = {}
        self.kept = 0
        self.events: list[tuple[float, int, Callable, tuple]] = []
        self.counter = itertools.count()
        self.breaker = Breaker()
        self.forwarded = 0
        self.busy_s = 0.0
        self.curve = CostCurve()
        for _ in range(9):
            self.curve = updated_curve(self.curve, 1, 5.0, now_s=0.0)

    def at(self, at_s: float, call: Callable, *arguments) -> None:
        heapq.heappush(self.events, (at_s, next(self.counter), call, arguments))

    def run(self) -> None:
        while self.events:
            self.now_s, _, call, arguments = heapq.heappop(self.events)
            call(*arguments)

    def view(self, asked: Asked) -> LocalView:
        places = [one.place for one in self.waiting]
        ahead, rows = ahead_of(places, asked.place.priority)
        shed = to_shed(places, asked.place, limit=QUEUE_LIMIT)
        return LocalView(
            self.slots,
            len(self.running),
            len(places),
            QUEUE_LIMIT,
            self.curve,
            running_rows=sum(self.running.values()),
            ahead=ahead,
            ahead_rows=rows,
            kept=self.kept,
            max_rows=self.max_rows,
            makes_way=shed is not None and shed >= 0,
            pushed_by=self.pushed_by(asked.place.priority),
        )

    def pushed_by(self, priority: int) -> float:
        """The part of the time that those of higher priority take, of whom a tenth is of priority 1 and three of 2."""
        higher = {1: 0.0, 2: 0.1, 0: 0.4}[priority]
        return higher * self.rate_per_s * self.curve.mean_ms(self.max_rows) / self.max_rows / 1000 / self.slots

    def arrive(self, asked: Asked) -> None:
        self.sweep()
        link, service = Link(10.0, 0.0, 0.5, 99, self.now_s, 1e9, 10.0), Estimate(5.0, 0.5, 99, self.now_s)
        state = {"is_open": breaker.is_open(self.breaker, now_s=self.now_s), "is_trial": breaker.is_trial(self.breaker, now_s=self.now_s)}
        decision = decide(
            split=self.split,
            remaining_ms=(asked.place.until_s - self.now_s) * 1000,
            local=self.view(asked),
            upstreams=[UpstreamView("cloud", "cloud", link, service, **state)] if self.cloud else [],
            forwarded=False,
            now_s=self.now_s,
        )
        if isinstance(decision, Here):
            self.join(asked)
        elif isinstance(decision, Forward):
            self.forward(asked, decision)
        else:
            asked.shed = True

    def join(self, asked: Asked) -> None:
        places = [one.place for one in self.waiting]
        shed = to_shed(places, asked.place, limit=QUEUE_LIMIT)
        if shed == -1:
            asked.shed = True
            return
        if shed is not None:
            self.waiting.pop(shed).shed = True
        asked.here = True
        self.waiting.append(asked)
        self.waiting.sort(key=lambda one: rank(one.place))
        self.dispatch()

    def forward(self, asked: Asked, decision: Forward) -> None:
        self.forwarded += 1
        self.breaker = breaker.begun(self.breaker, now_s=self.now_s)
        asked.kept = decision.is_kept
        self.kept += asked.kept
        took_s, is_right = self.cloud(self.now_s)
        if took_s is not None:
            self.at(self.now_s + took_s, self.answered, asked, is_right)
        if decision.hedge_in_ms is not None:
            self.at(self.now_s + decision.hedge_in_ms / 1000, self.overdue, asked)

    def give_back(self, asked: Asked) -> None:
        self.kept -= asked.kept
        asked.kept = False

    def answered(self, asked: Asked, is_right: bool) -> None:
        if asked.here or asked.done_s is not None:
            return
        self.give_back(asked)
        if is_right:
            self.breaker = breaker.succeeded(self.breaker, now_s=self.now_s)
            asked.done_s = self.now_s
        else:
            self.breaker = breaker.failed(self.breaker, now_s=self.now_s, chance=0.5)
            self.join(asked)

    def overdue(self, asked: Asked) -> None:
        if asked.here or asked.done_s is not None:
            return
        self.give_back(asked)
        self.breaker = breaker.failed(self.breaker, now_s=self.now_s, chance=0.5)
        self.join(asked)

    def sweep(self) -> None:
        gone = set(hopeless([one.place for one in self.waiting], service_ms=self.curve.careful_ms(1), now_s=self.now_s))
        for index in gone:
            self.waiting[index].shed = True
        self.waiting = [one for index, one in enumerate(self.waiting) if index not in gone]

    def dispatch(self) -> None:
        self.sweep()
        while self.waiting and len(self.running) < self.slots:
            step = next_batch(
                [one.place for one in self.waiting],
                max_rows=self.max_rows,
                max_wait_ms=5.0,
                curve=self.curve,
                arrivals_per_s=self.rate_per_s,
                now_s=self.now_s,
            )
            if not isinstance(step, Send):
                self.at(step.at_s, self.dispatch)
                return
            batch, self.waiting = self.waiting[: step.count], self.waiting[step.count :]
            rows = sum(one.place.rows for one in batch)
            took_s = (4 + rows) * batch[0].work / 1000
            number = next(self.counter)
            self.running[number] = rows
            self.busy_s += took_s
            self.at(self.now_s + took_s, self.ended, number, batch, took_s)

    def ended(self, number: int, batch: list[Asked], took_s: float) -> None:
        self.curve = updated_curve(self.curve, self.running.pop(number), took_s * 1000, now_s=self.now_s)
        for one in batch:
            one.done_s = self.now_s
        self.dispatch()


def arrivals(rate_per_s: float, seconds: float, seed: int) -> list[Asked]:
    """At random: a tenth of priority 1, three of 2, the rest of none."""
    rnd, at_s, all_asked = random.Random(seed), 0.0, []
    while (at_s := at_s + rnd.expovariate(rate_per_s)) < seconds:
        priority = rnd.choices([1, 2, 0], [1, 3, 6])[0]
        all_asked.append(Asked(len(all_asked), Place(priority, at_s, at_s + DEADLINE_S - MARGIN_S, 1), rnd.uniform(0.9, 1.1)))
    return all_asked


def played(box: Box, all_asked: list[Asked]) -> list[Asked]:
    for asked in all_asked:
        box.at(asked.place.arrived_s, box.arrive, asked)
    box.run()
    return all_asked


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("slots", "max_rows"), [(1, 1), (2, 1), (1, 8), (2, 8)])
def test_at_five_times_the_load_nine_tenths_of_the_capacity_is_answered_in_time_and_the_highest_priority_first(slots, max_rows, seed):
    seconds, capacity_per_s = 5.0, slots * max_rows / (4 + max_rows) * 1000
    box = Box(slots=slots, max_rows=max_rows, rate_per_s=5 * capacity_per_s)
    all_asked = played(box, arrivals(5 * capacity_per_s, seconds, seed))
    assert all(asked.shed or asked.done_s is not None for asked in all_asked), "everyone is told"
    made = [asked for asked in all_asked if asked.is_made]
    late = [asked for asked in all_asked if asked.done_s is not None and not asked.is_made]
    assert not late
    assert len(made) >= 0.9 * capacity_per_s * seconds
    share = {p: sum(a.place.priority == p for a in made) / sum(a.place.priority == p for a in all_asked) for p in (0, 1, 2)}
    assert share[1] >= 0.99, "there is room for all of them"
    assert 0.2 <= share[2] <= 0.5, "these get what is left of a fifth of all"
    assert share[0] <= 0.05


def hangs(_: float) -> tuple[float | None, bool]:
    return None, False


def answers(_: float) -> tuple[float | None, bool]:
    return 0.015, True


def breaks(rnd: random.Random, since_s: float, until_s: float, kinds: list[str]) -> Callable:
    """A cloud that answers in 15 ms, and between two moments hangs, answers slowly, wrongly or not at all."""

    def cloud(now_s: float) -> tuple[float | None, bool]:
        if not since_s <= now_s < until_s:
            return answers(now_s)
        match rnd.choice(kinds):
            case "hangs":
                return hangs(now_s)
            case "slow":
                return rnd.uniform(0.015, 0.3), True
            case _:
                return rnd.uniform(0.0, 0.3), False

    return cloud


@given(
    st.integers(0, 2**32),
    st.sampled_from([["hangs"], ["slow"], ["wrong"], ["hangs", "slow", "wrong"]]),
    st.sampled_from([30.0, 100.0, 120.0]),
    st.sampled_from(["cloud", "cloud", "overflow"]),
)
@settings(max_examples=40, deadline=None)
def test_a_cloud_that_fails_costs_no_request_its_deadline_that_this_box_alone_would_have_made(seed, kinds, rate_per_s, split):
    """At up to six tenths of what the box can do. Nearer to all of it others are unlucky than without the cloud, but no more."""
    alone = played(Box(slots=1, max_rows=1, rate_per_s=rate_per_s), arrivals(rate_per_s, 4.0, seed))
    box = Box(slots=1, max_rows=1, rate_per_s=rate_per_s, split=split, cloud=breaks(random.Random(seed), 1.0, 3.0, kinds))
    helped = played(box, arrivals(rate_per_s, 4.0, seed))
    lost = [one.number for one, other in zip(alone, helped, strict=True) if one.is_made and not other.is_made]
    assert not lost
    assert split == "overflow" or box.forwarded > 0.1 * len(helped), "or nothing was shown"
    assert box.kept == 0


def test_near_its_capacity_a_box_loses_no_more_requests_with_a_cloud_that_fails_than_alone():
    rate_per_s, lost_alone, lost = 160.0, 0, 0
    for seed in range(12):
        kinds = [["hangs"], ["slow"], ["wrong"], ["hangs", "slow", "wrong"]][seed % 4]
        cloud = breaks(random.Random(seed), 1.0, 3.0, kinds)
        alone = Box(slots=1, max_rows=1, rate_per_s=rate_per_s)
        helped = Box(slots=1, max_rows=1, rate_per_s=rate_per_s, split="cloud", cloud=cloud)
        lost_alone += sum(not asked.is_made for asked in played(alone, arrivals(rate_per_s, 4.0, seed)))
        lost += sum(not asked.is_made for asked in played(helped, arrivals(rate_per_s, 4.0, seed)))
    assert lost_alone > 0
    assert lost <= lost_alone


def test_without_failures_the_cloud_answers_and_this_box_is_idle():
    box = Box(slots=1, max_rows=1, rate_per_s=100.0, split="cloud", cloud=answers)
    assert all(asked.is_made for asked in played(box, arrivals(100.0, 2.0, 1)))
    assert box.busy_s == 0

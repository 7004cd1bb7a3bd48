"""Boxes fall silent, come back, flap and die: replicas are replaced where that was asked for, nothing is stopped that may be the only one,
and in the end each runs once, where the policy says."""

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.deployment import Deployment, Policy, Replicas
from coordinator.core.fit import Node
from coordinator.core.liveness import STEADY_MS, Contact, Ear
from coordinator.core.outlook import outlook
from coordinator.core.planner import BoxPlan, Plan, Wanted, is_doubled, plan
from edge_agent.core.cut_off import keep_every_s, stopped
from skerry.wire.messages import ModelRef, ReplicaSpec

LOST_MS = 60_000
BOXES = ("a", "b", "c", "d")
MODEL = ModelRef("m", 1, "x", 1)


def deployment(*, count: int = 3, **policy) -> Deployment:
    return Deployment(
        "m", "m", 1, Replicas(count=count), {}, ["edge"], "any", 1, 1.0, 0, "process", 50, 0.99, "edge",
        disconnect=Policy(**{"lost_after_ms": LOST_MS, "replace": True, **policy}),
    )  # fmt: skip


class World:
    """What is true of the boxes, and what they were told."""

    def __init__(self, spec: Deployment, *, memory_bytes: int = 100) -> None:
        self.spec, self.memory_bytes = spec, memory_bytes
        self.silent_ms = dict.fromkeys(BOXES, 0)
        self.told: dict[str, BoxPlan] = {}
        self.ready: dict[str, set[str]] = {box: set() for box in BOXES}

    def plan(self) -> Plan:
        nodes = [
            Node(
                box, "edge", {}, f"http://{box}", self.silent_ms[box] == 0, self.memory_bytes, 0, ["process"],
                silent_ms=self.silent_ms[box], ready=frozenset(self.ready[box]),
            )
            for box in BOXES
        ]  # fmt: skip
        made = plan(nodes, [Wanted(self.spec, 1, MODEL)], self.told)
        self.told = made.boxes
        return made

    def report(self) -> None:
        """Every box that is there does what it was told, and says so."""
        for box in BOXES:
            if self.silent_ms[box] == 0:
                self.ready[box] = self.names(box)

    def names(self, box: str) -> set[str]:
        return {replica.name for replica in self.told.get(box, BoxPlan()).replicas}

    def homes(self, name: str) -> set[str]:
        return {box for box in BOXES if name in self.names(box)}

    def is_lost(self, box: str) -> bool:
        return self.silent_ms[box] >= self.spec.disconnect.lost_after_ms


policies = st.fixed_dictionaries(
    {"replace": st.sampled_from([True, True, False]), "reconcile": st.sampled_from(["keep_original", "keep_replacement"])}
)
happenings = st.lists(
    st.tuples(st.sampled_from(BOXES), st.sampled_from([0, 0, 1, LOST_MS - 1, LOST_MS, 9 * LOST_MS]), st.booleans()), max_size=24
)


@given(policies, st.integers(1, 5), happenings)
@settings(max_examples=200, deadline=None)
def test_a_replica_is_never_stopped_where_it_may_be_the_only_one_and_is_replaced_where_it_was_lost(policy, count, happened):
    world = World(deployment(count=count, **policy))
    world.plan()
    world.report()
    for box, silent_ms, reports in happened:
        world.silent_ms[box] = silent_ms
        before = {f"m-{index}": world.homes(f"m-{index}") for index in range(count)}
        made = world.plan()
        there = [one for one in BOXES if world.silent_ms[one] == 0]
        for name, homes in before.items():
            after = world.homes(name)
            if not any(not world.is_lost(home) and name in world.ready[home] for home in after):
                assert homes <= after, "nobody is told to stop while no other is known to serve"
            if policy["replace"] and there:
                assert any(not world.is_lost(home) for home in after), "a lost one is replaced while there is a box for it"
            if not policy["replace"]:
                assert after == homes, "without `replace` silence moves nothing"
            for home in after - homes:
                assert world.silent_ms[home] == 0, "it is started where somebody is known to be"
        assert {placement.replica for placement in made.outcomes["m"].placements} == set(before)
        again = msgspec.json.encode(world.plan())
        assert msgspec.json.encode(world.plan()) == again, "the same facts move nothing further"
        if reports:
            world.report()


@given(policies, st.integers(1, 5), happenings)
@settings(max_examples=150, deadline=None)
def test_once_all_are_back_each_runs_once_where_the_policy_says(policy, count, happened):
    world = World(deployment(count=count, **policy))
    world.plan()
    world.report()
    originals = {f"m-{index}": world.homes(f"m-{index}") for index in range(count)}
    was_replaced: set[str] = set()
    for box, silent_ms, reports in happened:
        world.silent_ms[box] = silent_ms
        world.plan()
        was_replaced |= {name for name in originals if len(world.homes(name)) > 1}
        if reports:
            world.report()
    ever = {name: world.homes(name) for name in originals}
    replaces = {name: {box: r.replaces for box in BOXES for r in world.told[box].replicas if r.name == name} for name in originals}
    ready = {box: set(names) for box, names in world.ready.items()}
    world.silent_ms = dict.fromkeys(BOXES, 0)
    for _ in range(3):
        made = world.plan()
        world.report()
    assert not is_doubled(made.outcomes["m"])
    for name, at_first in originals.items():
        (home,) = world.homes(name)
        assert home in ever[name], "it ends where it ran"
        moved = {box for box in ever[name] if replaces[name][box] in ever[name]}
        if policy["reconcile"] == "keep_replacement" and any(name in ready[box] for box in moved):
            assert home in moved, "not the first of those that were left"
        if policy["reconcile"] == "keep_original" and at_first <= ever[name]:
            assert {home} == at_first
        if name not in was_replaced:
            assert {home} == at_first


@given(st.lists(st.tuples(st.sampled_from(BOXES), st.integers(0, LOST_MS - 1)), max_size=12), policies)
def test_a_link_that_is_cut_for_less_than_it_takes_to_be_lost_moves_nothing(happened, policy):
    world = World(deployment(**policy))
    world.plan()
    world.report()
    told = world.told
    for box, silent_ms in happened:
        world.silent_ms[box] = silent_ms
        world.plan()
        assert world.told == told


def test_a_replacement_is_kept_where_the_policy_says_so_and_only_once_it_is_ready():
    world = World(deployment(count=1, reconcile="keep_replacement"))
    world.plan()
    world.report()
    (original,) = world.homes("m-0")
    world.silent_ms[original] = LOST_MS
    made = world.plan()
    (replacement,) = world.homes("m-0") - {original}
    placed = {placement.node: placement for placement in made.outcomes["m"].placements}
    assert (placed[original].is_lost, placed[replacement].replaces) == (True, original)
    world.silent_ms[original] = 0
    world.plan()
    assert world.homes("m-0") == {original}, "the replacement never was ready, and what runs is kept"

    world.silent_ms[original] = LOST_MS
    world.plan()
    world.report()
    world.silent_ms[original] = 0
    world.plan()
    assert world.homes("m-0") == {replacement}


@pytest.mark.parametrize("reconcile", ["keep_original", "keep_replacement"])
@pytest.mark.parametrize("path", list(itertools.permutations(BOXES, 3)))
def test_what_was_a_replacement_once_is_an_original_to_the_next(reconcile, path):
    """From the first box to the second, which is kept; from there to the third."""
    first, second, third = path
    world = World(deployment(count=1))
    for box in BOXES:
        world.told[box] = BoxPlan()
    spec = ReplicaSpec("m-0", "m", 1, MODEL, 1, 1.0)
    world.told[second] = BoxPlan([msgspec.structs.replace(spec, replaces=first)])
    world.told[third] = BoxPlan([msgspec.structs.replace(spec, replaces=second)])
    world.report()
    world.spec = deployment(count=1, reconcile=reconcile)
    world.plan()
    assert world.homes("m-0") == {second if reconcile == "keep_original" else third}


def test_without_room_elsewhere_the_outcome_says_so():
    world = World(deployment(count=4), memory_bytes=2)  # four fifths of it: one replica fits on each box
    world.plan()
    world.report()
    world.silent_ms["b"] = LOST_MS
    made = world.plan()
    assert world.homes("m-0") | world.homes("m-1") | world.homes("m-2") | world.homes("m-3") == set(BOXES)
    assert made.outcomes["m"].problem == "1 of 4 replicas run on boxes that are lost, and no other box has room"


# -- silence


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * STEADY_MS)), min_size=1, max_size=30))
def test_silence_ends_only_once_a_box_was_there_for_long_enough(happened):
    """The oracle walks through the whole past anew each time."""
    now_ms, contact, past = 1_000_000, Contact(True, 1_000_000), [(1_000_000, True)]
    for online, lapse_ms in happened:
        now_ms += lapse_ms
        contact = contact.after(online=online, now_ms=now_ms)
        past.append((now_ms, online))
        for look_ms in (now_ms, now_ms + STEADY_MS - 1, now_ms + STEADY_MS, now_ms + 5 * STEADY_MS):
            assert contact.silent_ms(look_ms) == silence_of(past, look_ms), (past, look_ms)


def silence_of(past: list[tuple[int, bool]], look_ms: int) -> int:
    runs: list[tuple[bool, int, int]] = []
    for (at_ms, online), (until_ms, _) in zip(past, [*past[1:], (look_ms, False)], strict=True):
        if runs and runs[-1][0] == online:
            runs[-1] = (online, runs[-1][1], until_ms)
        else:
            runs.append((online, at_ms, until_ms))
    began = None
    for number, (online, at_ms, until_ms) in enumerate(runs):
        if not online:
            began = at_ms if began is None else began
        elif until_ms - at_ms >= STEADY_MS:
            began = None
        elif number == len(runs) - 1 and began is not None:
            return at_ms - began
    return 0 if began is None else look_ms - began


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.lists(st.integers(1, 10**6), max_size=4))
def test_the_next_change_is_when_something_changes_and_not_before(now_ms, silent_ms, limits):
    contact = Contact(False, now_ms, now_ms)
    at_ms = contact.next_change_ms(now_ms + silent_ms, limits)
    later = [limit for limit in limits if limit > silent_ms]
    assert (at_ms is None) == (not later)
    if at_ms is not None:
        crossed = [limit for limit in limits if contact.silent_ms(now_ms + silent_ms) < limit <= contact.silent_ms(at_ms)]
        assert crossed == [min(later)] * later.count(min(later))


def test_while_the_coordinator_hears_nobody_silence_does_not_go_on_and_never_goes_back():
    ear = Ear().after(listening_since_ms=1000, now_ms=7000)
    assert ear.heard_until_ms == 7000
    assert ear.after(listening_since_ms=0, now_ms=900_000) == ear, "without a broker"
    assert ear.after(listening_since_ms=899_000, now_ms=900_000) == ear, "and until everybody could be heard"
    assert ear.after(listening_since_ms=890_000, now_ms=900_000).heard_until_ms == 900_000
    assert ear.after(listening_since_ms=1000, now_ms=6500) == ear, "a clock that was set back"


# -- what is told, and what the box does itself


@given(policies, st.integers(0, 10**12), st.sampled_from([0, 5000, 7_200_000]))
def test_what_will_become_of_a_silent_box_is_told_in_order_with_every_replica(policy, since_ms, stop_ms):
    spec = deployment(**policy, stop_on_box_after_ms=stop_ms)
    steps = outlook(since_ms, [(spec, ["m-1", "m-0"]), (deployment(), [])])
    assert all("m-0, m-1" in step.text for step in steps)
    times = [step.at_ms for step in steps if step.at_ms]
    assert times == sorted(times)
    assert since_ms + LOST_MS in times
    assert (since_ms + stop_ms in times) == bool(stop_ms)
    told = " ".join(step.text for step in steps)
    assert ("started on another box" in told) == policy["replace"]
    assert ("what runs here stays" in told) == (policy["replace"] and policy["reconcile"] == "keep_original")


@given(st.lists(st.integers(0, 10**6), max_size=6), st.integers(0, 10**6))
def test_a_box_stops_what_has_a_limit_and_nothing_else(limits, cut_off_ms):
    specs = [ReplicaSpec(f"r-{index}", "d", 1, MODEL, 1, 1.0, stop_after_ms=limit) for index, limit in enumerate(limits)]
    assert set(stopped(specs, cut_off_ms)) == {f"r-{i}" for i, limit in enumerate(limits) if limit and cut_off_ms >= limit}
    every_s = keep_every_s(specs, least_s=5, most_s=600)
    assert 5 <= every_s <= 600
    assert all(every_s <= max(5, limit / 1000 / 10) for limit in limits if limit)

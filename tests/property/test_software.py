"""A release spreads over a fleet wave by wave, and a bad one comes back from every box that had it."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import rollout, software
from coordinator.core.rollout import Baseline, Counts, Rules, State
from coordinator.core.software import Release, Spread
from skerry.wire.messages import Birth, Software, SoftwareReport

NEW = "2.0"
RULES = Rules([1, 0.5], observe_ms=3_000, deadline_ms=60_000)
RELEASES = {(NEW, "3.11", "x86_64"): Release(NEW, "3.11", "x86_64", "ab" * 32, 1, 0)}


class Temper(msgspec.Struct, frozen=True):
    """What becomes of the new release on a box: it runs, or fails, or fails to reach the coordinator so many times first; how long it
    takes; and whether there is a build for it at all."""

    fails: bool = False
    unreached: int = 0
    takes_s: int = 2
    machine: str = "x86_64"


class Box:
    """As an agent, a warden and an updater would do it."""

    def __init__(self, name: str, version: str, temper: Temper) -> None:
        self.name, self.version, self.before, self.temper = name, version, version, temper
        self.said = SoftwareReport()
        self.told: Software | None = None
        self.busy_s = 0
        self.is_online, self.since_ms = True, 0
        self.told_new = 0
        self.gave_up: dict[str, SoftwareReport] = {}

    @property
    def birth(self) -> Birth:
        return Birth("edge", {}, "u", "b", 1, self.version, 1, 1, machine=self.temper.machine, python="3.11")

    def hear(self, told: Software | None) -> None:
        if told == self.told:
            return
        self.told, self.busy_s = told, 0
        self.told_new += told is not None and told.version == NEW
        if told is None:
            self.said = SoftwareReport()

    def comes_or_goes(self, now_ms: int) -> None:
        """Its agent starts anew from the release on trial, and from the one before."""
        is_online = self.said.phase != "trial"
        if is_online != self.is_online:
            self.is_online, self.since_ms = is_online, now_ms

    def passes(self) -> None:
        told = self.told
        if told is None:
            return
        if told.version == self.version:
            self.said = SoftwareReport(told.version, told.attempt, "done")
        elif told.version in self.gave_up and self.gave_up[told.version].attempt >= told.attempt:
            self.said = msgspec.structs.replace(self.gave_up[told.version], attempt=told.attempt)
        elif self.busy_s < self.temper.takes_s:
            self.busy_s += 1
            self.said = SoftwareReport(told.version, told.attempt, "trial")
        elif told.version != NEW or (not self.temper.fails and told.attempt % software.MOST_TRIES >= self.temper.unreached):
            self.version = told.version
            self.said = SoftwareReport(told.version, told.attempt, "done")
        else:
            self.said = SoftwareReport(told.version, told.attempt, "failed", "no good", is_unreached=not self.temper.fails)
            self.gave_up[told.version] = self.said


class Fleet:
    def __init__(self, boxes: list[Box], *, earlier: str = "", attempt: int = 0) -> None:
        self.boxes = boxes
        self.now_ms = 1_000_000
        self.spread = Spread(NEW, earlier, RULES, State("rolling", [], self.now_ms, self.now_ms), {}, attempt, self.now_ms)

    def plan(self) -> None:
        for box in self.boxes:
            box.hear(software.wanted(box.name, box.birth, box.said, box.told, self.spread, RELEASES))
        self.spread = msgspec.structs.replace(self.spread, planned=len(self.spread.state.waves))

    def unit(self, box: Box) -> rollout.Unit:
        is_there = software.is_there(box.name, self.spread, is_online=box.is_online, since_ms=box.since_ms)
        return software.unit_of(box.birth, box.said, box.told, self.spread, RELEASES, is_there=is_there, asked=0)

    def look(self) -> None:
        spread = self.spread
        units = {box.name: self.unit(box) for box in self.boxes}
        if spread.planned < len(spread.state.waves):
            for name in spread.state.waves[-1]:
                units[name] = msgspec.structs.replace(units[name], ready=False)
        if not spread.state.waves:
            state = rollout.begin(spread.rules, units, Baseline(), seed=NEW, now_ms=self.now_ms)
        else:
            state = rollout.step(spread.state, spread.rules, units, Counts(), seed=NEW, now_ms=self.now_ms)
        ran = {box.name: box.version for box in self.boxes if box.name in state.admitted - spread.state.admitted and box.version != NEW}
        self.spread = msgspec.structs.replace(spread, state=state, ran=spread.ran | ran)

    def goes_on(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now_ms += 1000
            self.look()
            self.plan()
            for box in self.boxes:
                box.passes()
                box.comes_or_goes(self.now_ms)
                assert box.told is None or box.told.version != NEW or box.name in self.spread.state.admitted | self.done_for(box)
            if self.spread.state.is_over and not any(box.told and box.told.version != box.version for box in self.boxes):
                break

    def done_for(self, box: Box) -> set[str]:
        """After it is done every box has it."""
        return {box.name} if self.spread.state.phase == "done" else set()


tempers = st.builds(
    Temper, fails=st.sampled_from([False] * 9 + [True]), unreached=st.sampled_from([0] * 8 + [1, 2, 3]), takes_s=st.integers(0, 6)
)
fleets = st.lists(tempers, min_size=1, max_size=9)


def made(tempers: list[Temper], versions: list[str]) -> Fleet:
    return Fleet([Box(f"b{number}", versions[number % len(versions)], temper) for number, temper in enumerate(tempers)])


@settings(max_examples=300)
@given(tempers=fleets, versions=st.lists(st.sampled_from(["1.0", "1.1", NEW]), min_size=1, max_size=3))
def test_a_release_ends_up_everywhere_or_nowhere(tempers, versions):
    fleet = made(tempers, versions)
    fleet.goes_on(400)
    assert fleet.spread.state.is_over
    fleet.goes_on(20)
    if fleet.spread.state.phase == "done":
        stuck = [box for box in fleet.boxes if box.temper.fails or box.temper.unreached >= software.MOST_TRIES]
        assert {box.version for box in fleet.boxes if box not in stuck} <= {NEW}
    else:
        assert [box.version for box in fleet.boxes] == [box.before for box in fleet.boxes], "each runs what it ran before"
        assert "no good" in fleet.spread.state.reason


@given(tempers=fleets)
def test_a_canary_that_fails_is_the_only_box_that_ever_heard_of_it(tempers):
    fleet = made([msgspec.structs.replace(temper, fails=True) for temper in tempers], ["1.0"])
    fleet.goes_on(400)
    assert fleet.spread.state.phase == "failed"
    assert sum(box.told_new > 0 for box in fleet.boxes) == 1
    assert {box.version for box in fleet.boxes} == {"1.0"}


@given(unreached=st.integers(0, 5))
def test_a_box_that_did_not_reach_the_coordinator_tries_again_a_few_times(unreached):
    fleet = made([Temper(unreached=unreached)], ["1.0"])
    fleet.goes_on(400)
    comes_through = unreached < software.MOST_TRIES
    assert (fleet.spread.state.phase == "done") == comes_through
    assert fleet.boxes[0].told_new == min(unreached + 1, software.MOST_TRIES)


def test_a_box_for_which_there_is_no_build_says_so_and_is_told_nothing():
    fleet = made([Temper(machine="riscv64")], ["1.0"])
    fleet.goes_on(10)
    assert fleet.spread.state.phase == "failed"
    assert "no build of 2.0 for Python 3.11 on riscv64" in fleet.spread.state.reason
    assert fleet.boxes[0].told_new == 0


def test_one_that_is_rolled_out_again_is_tried_again_where_it_failed():
    fleet = made([Temper(fails=True)], ["1.0"])
    fleet.goes_on(100)
    [box] = fleet.boxes
    box.temper = Temper()
    again = Fleet([box], attempt=software.MOST_TRIES)
    again.goes_on(100)
    assert (again.spread.state.phase, box.version) == ("done", NEW)


def test_what_was_wanted_before_is_wanted_again_of_boxes_that_were_not_let_in():
    spread = Spread(NEW, "1.5", RULES, State("failed", [["b0"]], 0, 0), {"b0": "1.0"}, 0, 0)
    birth = Box("x", "1.5", Temper()).birth
    told = {name: software.wanted(name, birth, SoftwareReport(), None, spread, RELEASES) for name in ("b0", "b1")}
    assert told["b0"] == Software("1.0")
    assert told["b1"] == Software("1.5")


def test_what_a_box_said_of_an_earlier_try_is_no_word_on_this_one():
    spread = Spread(NEW, "", RULES, State("rolling", [["x"]], 0, 0), {}, software.MOST_TRIES, 0)
    birth, stale = Box("x", "1.0", Temper()).birth, SoftwareReport(NEW, 0, "failed", "no good")
    assert software.unit_of(birth, stale, None, spread, RELEASES, is_there=True, asked=0).failure == ""
    now = msgspec.structs.replace(stale, attempt=software.MOST_TRIES)
    assert software.unit_of(birth, now, None, spread, RELEASES, is_there=True, asked=0).failure == "no good"

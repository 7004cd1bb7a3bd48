"""A box that changes its own programs ends with ones that serve, whatever the release is like and wherever power is cut."""

from collections.abc import Mapping

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core import update
from edge_agent.core.update import Limits, Point, Restart, Seen, Settle, TurnBack, Unit, Wait, Watch
from skerry.wire.box import Outcome, Update, UpdateRecord
from skerry.wire.messages import Software

UNITS = ("warden", "agent", "gateway")
LIMITS = Limits(observe_s=5, trial_s=60, back_s=20, settle_s=3, most_ends=3, most_begun=4)
NEW, OLD = "2.0", "1.0"


class Nature(msgspec.Struct, frozen=True):
    """What the new release is like: which programs come up, whether they end again and again, whether it reaches the coordinator and
    answers for what was answered for; and from when on, in seconds after its start."""

    comes_up: bool = True
    ends_every_s: int = 0
    is_heard: bool = True
    serves: bool = True
    answers: bool = True
    after_s: int = 1

    @property
    def is_good(self) -> bool:
        """It is well at a stretch, in time."""
        in_time = self.after_s + LIMITS.observe_s + LIMITS.settle_s + 2 <= LIMITS.trial_s
        return self.comes_up and not self.ends_every_s and self.is_heard and self.serves and self.answers and in_time

    @property
    def is_bad(self) -> bool:
        """It never is. One that ends every now and then, but not that often, may be either."""
        is_steady = not self.ends_every_s or self.ends_every_s > LIMITS.observe_s
        return not (self.comes_up and is_steady and self.is_heard and self.serves and self.answers) or self.after_s > LIMITS.trial_s


class World:
    """A machine whose service manager starts what ``current`` names, and the updater's file; all else is lost with the power."""

    def __init__(self, nature: Nature, changed: tuple[str, ...]) -> None:
        is_other = "gateway" in changed  # else it is the same code, and serves as before
        self.nature = nature if is_other else msgspec.structs.replace(nature, serves=True, answers=True)
        self.changed = changed
        self.current, self.record, self.now = OLD, UpdateRecord(), 0
        self.running: dict[str, tuple[str, int]] = {}
        self.ends: dict[str, int] = {}
        self.boot()

    def boot(self) -> None:
        self.running = dict.fromkeys(UNITS, (self.current, self.now))
        self.ends = dict.fromkeys(UNITS, 0)

    def restart(self, units: tuple[str, ...]) -> None:
        for unit in units:
            self.running[unit], self.ends[unit] = (self.current, self.now), 0

    def passes(self) -> None:
        self.now += 1
        every = self.nature.ends_every_s
        for unit, (version, since) in self.running.items():
            if version == NEW and every and self.now > since and (self.now - since) % every == 0:
                self.running[unit], self.ends[unit] = (self.current, self.now), self.ends[unit] + 1

    def units(self) -> Mapping[str, Unit]:
        def up(version: str) -> bool:
            return version == OLD or self.nature.comes_up

        return {unit: Unit(version if up(version) else "", up(version), self.ends[unit]) for unit, (version, _) in self.running.items()}

    def is_in_order(self, quality: bool, unit: str) -> bool:
        version, since = self.running[unit]
        return version == OLD or (quality and self.now - since >= self.nature.after_s)

    def seen(self) -> Seen:
        version, _ = self.running["agent"]
        held = self.record.under_way
        is_heard = held is not None and version == update.aim(held) and self.is_in_order(self.nature.is_heard, "agent")
        answers, serves = self.is_in_order(self.nature.answers, "gateway"), self.is_in_order(self.nature.serves, "gateway")
        waiting = None if not answers else frozenset({"lost"} if serves else {"lost", "served"})
        return Seen(self.current, self.units(), is_heard, waiting)

    def keep(self, held: Update | None) -> None:
        self.record = msgspec.structs.replace(self.record, under_way=held)

    def take(self, step: update.Step, held: Update) -> None:
        match step:
            case Point(version):
                self.current = version
            case Restart(units):
                self.restart(units)
            case TurnBack(reason, is_unreached):
                self.keep(msgspec.structs.replace(held, stage="returning", reason=reason, is_unreached=is_unreached))
            case Settle(is_good):
                self.record = update.settled(self.record, is_good=is_good)
            case Wait():
                self.passes()

    def live(self, wanted: Software, steps: int) -> bool:
        """One life of the updater, ``steps`` steps long at the most; says whether it came to its end."""
        held = self.record.under_way
        if held is not None:
            self.keep(msgspec.structs.replace(held, begun=held.begun + 1))
        watch = Watch()
        for _ in range(steps):
            held = self.record.under_way
            if held is None:
                following = update.wanted_next(self.record, wanted, self.current)
                if following is None:
                    return True
                self.keep(update.begun(following, self.current))
                continue
            if held.stage == "preparing":
                self.keep(msgspec.structs.replace(held, stage="trial", units=list(self.changed), waiting_for=["lost"]))
                continue
            seen = self.seen()
            watch = update.watched(watch, held, seen, self.now)
            step = update.next_step(held, seen, watch, self.now, LIMITS)
            if isinstance(step, Restart):
                watch = msgspec.structs.replace(watch, restarted_s=self.now)
            self.take(step, held)
        return False


ENOUGH = 400
WANTED = Software(NEW, "ab" * 32, 1)
natures = st.builds(
    Nature,
    comes_up=st.booleans(),
    ends_every_s=st.sampled_from([0, 0, 0, 1, 2, 7, 200]),
    is_heard=st.booleans(),
    serves=st.booleans(),
    answers=st.booleans(),
    after_s=st.sampled_from([0, 1, 10, 40, 100]),
)
good = st.builds(Nature, after_s=st.sampled_from([0, 1, 10, 40]))
nearly = st.one_of(
    st.sampled_from([1, 2, 3, 4, 5]).map(lambda every_s: Nature(ends_every_s=every_s, after_s=0)),
    st.sampled_from(["comes_up", "is_heard", "serves", "answers"]).map(lambda name: Nature(**{name: False})),
)
"""Good but for one thing."""
changed = st.sampled_from([("warden", "agent"), UNITS])
cuts = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=3)


def through(world: World, cuts: list[tuple[int, int]]) -> None:
    """Each cut after so many steps, and power back after so many seconds, until a life comes to its end."""
    for steps, off_s in cuts:
        world.live(WANTED, steps)
        world.now += off_s
        world.boot()
    assert world.live(WANTED, ENOUGH), f"never came to an end: {world.record}"


@settings(max_examples=400)
@given(nature=natures | good | nearly, changed=changed, cuts=cuts)
def test_a_good_release_runs_at_the_end_and_a_bad_one_does_not_wherever_power_is_cut(nature, changed, cuts):
    world = World(nature, changed)
    through(world, cuts)
    [outcome] = world.record.outcomes
    assert world.record.under_way is None
    assert outcome.is_good == (world.current == NEW)
    if world.nature.is_good:
        assert world.current == NEW
    if world.nature.is_bad:
        assert world.current == OLD
        assert outcome.reason
    running = {unit: version for unit, (version, _) in world.running.items()}
    assert {running[unit] for unit in changed} == {world.current}, "what changes runs from what starts"
    assert set(running.values()) <= {world.current, OLD}


@settings(max_examples=200)
@given(nature=natures, changed=changed, cuts=cuts)
def test_what_went_back_is_tried_again_when_somebody_says_so_and_not_before(nature, changed, cuts):
    world = World(nature, changed)
    through(world, cuts)
    before, at = world.record, world.now
    assert world.live(WANTED, ENOUGH)
    assert (world.record, world.now) == (before, at), "nothing happens any more"
    again = msgspec.structs.replace(WANTED, attempt=1)
    following = update.wanted_next(world.record, again, world.current)
    assert (following is None) == (world.current == NEW)


@given(nature=natures, changed=changed)
def test_a_bad_release_is_left_in_time(nature, changed):
    world = World(nature, changed)
    assert world.live(WANTED, ENOUGH)
    assert world.now <= LIMITS.trial_s + LIMITS.back_s + 2


def test_one_that_ends_again_and_again_is_left_at_once():
    world = World(Nature(ends_every_s=2), UNITS)
    assert world.live(WANTED, ENOUGH)
    assert world.now < 15
    assert "ended 3 times" in world.record.outcomes[0].reason


def test_a_release_whose_only_fault_is_that_nobody_could_be_reached_says_so():
    world = World(Nature(is_heard=False), UNITS)
    through(world, [])
    [outcome] = world.record.outcomes
    assert (outcome.is_good, outcome.is_unreached) == (False, True)
    assert update.NOT_HEARD in outcome.reason


def test_a_box_that_is_cut_off_over_and_over_in_a_trial_goes_back():
    world = World(Nature(), UNITS)
    for _ in range(10):
        world.live(WANTED, 4)
        world.boot()
    assert world.live(WANTED, ENOUGH)
    assert world.current == OLD
    assert "never came through" in world.record.outcomes[0].reason


def test_what_is_reported_at_each_stage():
    held = update.begun(WANTED, OLD)
    said = [
        update.report(None, None, running=OLD, is_here=False),
        update.report(WANTED, None, running=OLD, is_here=False),
        update.report(WANTED, UpdateRecord(), running=OLD, is_here=False, waiting="404"),
        update.report(WANTED, UpdateRecord(), running=OLD, is_here=True),
        update.report(WANTED, UpdateRecord(held), running=OLD, is_here=True),
        update.report(WANTED, UpdateRecord(msgspec.structs.replace(held, stage="trial")), running=NEW, is_here=False),
        update.report(WANTED, UpdateRecord(outcomes=[Outcome(NEW, WANTED.sha256, 0, True)]), running=NEW, is_here=False),
        update.report(WANTED, UpdateRecord(outcomes=[Outcome(NEW, WANTED.sha256, 0, False, "bad")]), running=OLD, is_here=False),
        update.report(
            msgspec.structs.replace(WANTED, attempt=1),
            UpdateRecord(outcomes=[Outcome(NEW, WANTED.sha256, 0, False, "bad")]),
            running=OLD,
            is_here=False,
        ),
    ]
    assert [(one.phase, one.reason) for one in said] == [
        ("", ""),
        ("failed", update.NO_UPDATER),
        ("fetching", "404"),
        ("preparing", ""),
        ("preparing", ""),
        ("trial", ""),
        ("done", ""),
        ("failed", "bad"),
        ("fetching", ""),
    ]


def test_a_gateway_that_did_not_answer_before_is_not_asked_to_answer_now():
    held = update.begun(WANTED, OLD)
    seen = Seen(NEW, {"agent": Unit(NEW, True)}, True, None)
    assert update.faults(held, seen) == []
    assert update.faults(msgspec.structs.replace(held, waiting_for=[]), seen) == ["the gateway does not answer"]

"""Waves begin only after what was before them was seen to be good, a bad change is taken back, and a good one arrives everywhere."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import rollout, sequential
from coordinator.core.rollout import Baseline, Counts, Rules, State, Unit
from skerry.wire.messages import Shadow

NONE = Counts()


def rules():
    wave = st.one_of(st.integers(1, 8), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
    return st.builds(
        Rules,
        waves=st.lists(wave, max_size=4),
        success=st.sampled_from([0.5, 0.5, 0.8, 1.0]),
        observe_ms=st.sampled_from([0, 1000, 5000]),
        deadline_ms=st.sampled_from([3000, 10_000]),
        most_restarts=st.sampled_from([0, 0, 2]),
        approve=st.booleans(),
    )


def unit():
    """Mostly well: one that fails ends it all."""
    return st.builds(
        Unit,
        is_there=st.sampled_from([True, True, True, False]),
        ready=st.sampled_from([True, True, False]),
        failure=st.sampled_from([""] * 15 + ["it ended"]),
        restarts=st.sampled_from([0] * 12 + [1, 3]),
        asked=st.sampled_from([0, 5]),
    )


def units():
    return st.dictionaries(st.sampled_from("abcdefgh"), unit(), max_size=8)


class Past:
    """What was seen of each wave, kept apart from the state: since when enough of those that were there were ready, without a break."""

    def __init__(self) -> None:
        self.wave, self.since_ms = (0, 0), None

    def see(self, state: State, seen: dict[str, Unit], rules: Rules, now_ms: int) -> None:
        if (wave := (len(state.waves), len(state.waves[-1]))) != self.wave:
            self.wave, self.since_ms = wave, None
        there = [seen[name] for name in state.waves[-1] if name in seen and seen[name].is_there]
        there = there or [seen[name] for wave in state.waves for name in wave if name in seen and seen[name].is_there]
        enough = there and len([unit for unit in there if unit.ready]) * 1000 >= round(rules.success * 1000) * len(there)
        self.since_ms = (now_ms if self.since_ms is None else self.since_ms) if enough else None


def judge_step(before: State, state: State, given_rules: Rules, seen: dict[str, Unit], now_ms: int, past: Past, allowed: int) -> None:
    assert before.admitted <= state.admitted, "nobody is put out while it goes on"
    if before.is_over:
        assert state == before
        return
    if len(state.waves) > len(before.waves):
        assert len(state.waves) == len(before.waves) + 1
        assert past.since_ms is not None
        assert now_ms - past.since_ms >= given_rules.observe_ms
        assert not before.is_paused
        assert not given_rules.approve or allowed >= len(state.waves)
    elif state.admitted != before.admitted:
        assert not [name for name in before.waves[-1] if name in seen and seen[name].is_there], "there was somebody to be judged"
    if state.phase == "done":
        assert set(seen) <= state.admitted
        assert not before.is_paused
    if state.phase == "failed":
        assert blame(before, given_rules, seen) or now_ms - before.wave_since_ms >= given_rules.deadline_ms
        assert state.reason


@settings(max_examples=400)
@given(st.data(), rules())
def test_no_wave_begins_before_the_one_before_it_was_good_for_as_long_as_was_asked(data, given_rules):
    seen = data.draw(units())
    now_ms = 1_000_000
    state = rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=now_ms)
    past, allowed = Past(), 1
    for _ in range(data.draw(st.integers(3, 20))):
        now_ms += data.draw(st.sampled_from([0, 500, 1000, 4000]))
        word = data.draw(st.sampled_from(["look", "look", "change", "change", "fleet", "pause", "resume", "approve"]))
        if word == "change" and seen:
            seen = {**seen, data.draw(st.sampled_from(sorted(seen))): data.draw(unit())}
        elif word == "fleet":
            seen = data.draw(units())
        elif word in ("pause", "resume"):
            state = rollout.paused(state, is_paused=word == "pause")
        elif word == "approve":
            state, allowed = rollout.approved(state), len(state.waves) + 1
        before = state
        if state.waves and not state.is_over:
            past.see(state, seen, given_rules, now_ms)
        state = rollout.step(state, given_rules, seen, NONE, seed="s", now_ms=now_ms)
        judge_step(before, state, given_rules, seen, now_ms, past, allowed)


def blame(state: State, given_rules: Rules, seen: dict[str, Unit]) -> bool:
    """Whether some unit that was let in, and is there, can be blamed at all."""
    there = [name for name in state.admitted if name in seen and seen[name].is_there]
    return any(seen[name].failure or seen[name].restarts > given_rules.most_restarts for name in there)


@given(rules(), st.sets(st.sampled_from("abcdefghijkl"), min_size=1), st.sets(st.sampled_from("abcdefghijkl")))
def test_a_good_change_arrives_everywhere_in_as_many_waves_as_were_asked_for(given_rules, names, away):
    given_rules = msgspec.structs.replace(given_rules, approve=False)
    seen = {name: Unit(name not in away, ready=True) for name in names}
    now_ms, sizes = 0, []
    state = rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=now_ms)
    while not state.is_over and now_ms < 10**6:
        if len(state.waves) > len(sizes):
            sizes.append(len(state.admitted))
        now_ms += 500
        state = rollout.step(state, given_rules, seen, NONE, seed="s", now_ms=now_ms)
    if names <= away:
        assert state.phase == "rolling", "it waits for somebody who is there, and blames nobody"
        return
    assert (state.phase, state.admitted) == ("done", names)
    wanted, total = [], len(names)
    for wave in [*given_rules.waves, 1.0]:
        size = min(total, wave if isinstance(wave, int) else math.ceil(wave * total))
        if not wanted or size > wanted[-1]:
            wanted.append(size)
    assert sizes == wanted
    assert now_ms <= len(wanted) * (given_rules.observe_ms + 1000)


@given(st.sets(st.sampled_from("abcdefghijkl"), min_size=2), st.data())
def test_the_first_to_go_is_one_that_is_there_and_is_asked_where_there_is_such_a_one(names, data):
    seen = {name: Unit(data.draw(st.booleans()), asked=data.draw(st.sampled_from([0, 9]))) for name in names}
    first = rollout.begin(Rules([1]), seen, Baseline(), seed=data.draw(st.text(max_size=3)), now_ms=0).waves[0]
    assert len(first) == 1
    best = max((unit.is_there, unit.asked > 0) for unit in seen.values())
    assert (seen[first[0]].is_there, seen[first[0]].asked > 0) == best


def test_a_canary_that_fails_is_the_only_one_that_ever_had_the_change():
    given_rules = Rules([1, 0.5, 1.0])
    seen = {name: Unit(True) for name in "abcdef"}
    state = rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=0)
    (canary,) = state.admitted
    seen[canary] = Unit(True, failure="crash loop: exit status 1")
    state = rollout.step(state, given_rules, seen, NONE, seed="s", now_ms=1000)
    assert (state.phase, state.admitted) == ("failed", {canary})
    assert state.reason == f"1 of 1 failed: {canary}: crash loop: exit status 1"


def test_what_is_started_again_after_it_was_ready_is_a_failure():
    given_rules = Rules([1], most_restarts=1)
    seen = {"a": Unit(True, ready=True, restarts=7), "b": Unit(True)}
    state = rollout.begin(given_rules, {"a": seen["a"]}, Baseline(), seed="s", now_ms=0)
    state = rollout.step(state, given_rules, seen, NONE, seed="s", now_ms=10)
    for restarts, phase in ((8, "rolling"), (9, "failed")):
        seen["a"] = Unit(True, ready=True, restarts=restarts)
        state = rollout.step(state, given_rules, seen, NONE, seed="s", now_ms=20)
        assert state.phase == phase


@pytest.mark.parametrize(
    ("counts", "phase"),
    [
        (Counts(2000, failed=20), "rolling"),
        (Counts(2000, failed=120), "failed"),
        (Counts(2000, slow=20), "rolling"),
        (Counts(2000, slow=120), "failed"),
        (Counts(12, failed=1, slow=1), "rolling"),
    ],
)
def test_requests_that_fail_or_are_slow_stop_it(counts, phase):
    given_rules = Rules([1, 1.0])
    seen = {"a": Unit(True, ready=True), "b": Unit(True)}
    state = rollout.begin(given_rules, seen, Baseline(5000, 25, 8.0), seed="s", now_ms=0)
    assert rollout.step(state, given_rules, seen, counts, seed="s", now_ms=1).phase == phase


def test_how_slow_is_too_slow_comes_from_before_where_enough_was_asked_then():
    assert rollout.slow_ms(Rules([1], slower=1.5), Baseline(1000, 0, 10.0), 50.0) == 15.0
    assert rollout.slow_ms(Rules([1], slower=1.5), Baseline(10, 0, 10.0), 50.0) == 50.0


# -- the sequential test


def ever_alarmed(share: float, most: float, false_alarm: float, looks: int) -> float:
    """The exact chance that the test ever says so within ``looks`` requests, each looked at: over all ways in which they may come."""
    alive = {0: 1.0}
    alarmed = 0.0
    for asked in range(1, looks + 1):
        following: dict[int, float] = {}
        for bad, chance in alive.items():
            following[bad + 1] = following.get(bad + 1, 0.0) + chance * share
            following[bad] = following.get(bad, 0.0) + chance * (1 - share)
        alive = {}
        for bad, chance in following.items():
            if sequential.is_too_many(bad, asked, most, false_alarm):
                alarmed += chance
            else:
                alive[bad] = chance
    return alarmed


@pytest.mark.parametrize("most", [0.002, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("false_alarm", [0.1, 0.01])
def test_a_share_that_is_borne_raises_an_alarm_no_more_often_than_stated(most, false_alarm):
    for share in (most, most / 2):
        assert ever_alarmed(share, most, false_alarm, 400) <= false_alarm


@pytest.mark.parametrize(("share", "within"), [(0.05, 400), (0.2, 100), (1.0, 6)])
def test_a_share_that_is_not_borne_is_found_out(share, within):
    assert ever_alarmed(share, 0.01, 0.01, within) > 0.9


@given(st.integers(0, 2000), st.integers(0, 2000), st.floats(0, 1))
def test_more_that_are_bad_are_never_weaker_evidence(bad, good, most):
    assert sequential.evidence(bad + 1, bad + good + 1, most) >= sequential.evidence(bad, bad + good + 1, most) - 1e-9
    assert sequential.evidence(0, good, most) <= 1e-9


COMPARED = rollout.Compared(Shadow(0.1), most_differing=0.02)


@settings(max_examples=200)
@given(st.data(), rules())
def test_nobody_has_a_change_before_its_answers_were_compared_for_as_long_as_was_asked(data, given_rules):
    given_rules = msgspec.structs.replace(given_rules, compared=COMPARED)
    seen = data.draw(units())
    now_ms = 1_000_000
    state = rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=now_ms, can_compare=True)
    assert state.admitted == frozenset()
    assert bool(state.shadowing) == bool(seen)
    past = Past()
    for _ in range(data.draw(st.integers(3, 20))):
        now_ms += data.draw(st.sampled_from([0, 500, 1000, 4000]))
        if seen and data.draw(st.booleans()):
            seen = {**seen, data.draw(st.sampled_from(sorted(seen))): data.draw(unit())}
        compared = data.draw(st.integers(0, 2000))
        counts = Counts(compared=compared, differed=data.draw(st.integers(0, compared // 25)))
        before = state
        if state.waves and not state.is_over:
            past.see(state, seen, given_rules, now_ms)
        state = rollout.step(state, given_rules, seen, counts, seed="s", now_ms=now_ms)
        assert not (state.admitted and state.shadowing)
        if state.admitted and not before.admitted:
            assert state.admitted == before.shadowing, "the same units, and no others"
            assert past.since_ms is not None
            assert now_ms - past.since_ms >= given_rules.observe_ms
            assert state.ready_since_ms == 0, "now it is watched anew, serving"
            break


def test_answers_that_differ_more_often_than_is_borne_end_it_before_anybody_had_one():
    seen = {"a": Unit(True, ready=True), "b": Unit(True, ready=True)}
    given_rules = Rules([1], observe_ms=10_000, compared=COMPARED)
    state = rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=0, can_compare=True)
    state = rollout.step(state, given_rules, seen, Counts(compared=400, differed=60), seed="s", now_ms=1000)
    assert (state.phase, state.admitted) == ("failed", frozenset())
    assert "60 of 400 answers were others" in state.reason
    assert state.shadowing == frozenset(), "what is over is asked no more"
    fine = rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=0, can_compare=True)
    fine = rollout.step(fine, given_rules, seen, Counts(compared=400, differed=8), seed="s", now_ms=1000)
    assert fine.phase == "rolling"


def test_what_can_not_be_compared_is_not_waited_for():
    seen = {"a": Unit(True, ready=True)}
    given_rules = Rules([1], observe_ms=0, compared=COMPARED)
    assert rollout.begin(given_rules, seen, Baseline(), seed="s", now_ms=0, can_compare=False).admitted == {"a"}
    plain = Rules([1], observe_ms=0)
    assert rollout.begin(plain, seen, Baseline(), seed="s", now_ms=0, can_compare=True).admitted == {"a"}

"""The warden's diff converges from any state, whatever the order and wherever a batch is cut, overcommits nothing, and leaves no gap."""

import math
import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.admission import Holding, Limits
from edge_agent.core.diff import Drain, Fetch, GiveBack, Remove, Seen, Start, next_steps
from skerry.wire.messages import ModelRef, ReplicaSpec

MEMORY = 8
GPUS = {"GPU-a": 4, "GPU-b": 4}
LIMITS = Limits(MEMORY, GPUS)
AMPLE = Limits(1000, {"GPU-a": 500, "GPU-b": 500})
ROUNDS = 150
"""More than any of these worlds needs to come to rest."""


def spec_of(name: str, digest: str, memory: int = 1, gpu: int = 0, update: str = "hand_over_if_room") -> ReplicaSpec:
    model = ModelRef(name="m", version=1, sha256=digest, size_bytes=1)
    generation = int(digest[1:])
    return ReplicaSpec(name, "d", generation, model, memory, cpus=1.0, gpu_memory_bytes=gpu, update=update)


names = st.sampled_from("abcd")
updates = st.sampled_from(["hand_over_if_room", "hand_over_if_room", "hand_over", "recreate"])
yielding = st.sampled_from(["hand_over_if_room", "recreate"])
serving = st.sampled_from(["hand_over_if_room", "hand_over"])
phases = st.sampled_from(["fetched", "running", "running", "running", "draining", "dead"])
seeds = st.integers(0, 2**32).map(random.Random)


def specs(updates=updates, digests=("v1", "v2", "v3")):
    return st.builds(spec_of, names, st.sampled_from(digests), st.integers(0, 5), st.sampled_from([0, 0, 1, 2]), updates)


@st.composite
def wants(draw, updates=updates):
    """Replicas that fit, whichever GPUs those before them were given."""
    want = {spec.name: spec for spec in draw(st.lists(specs(updates), max_size=4))}
    while not surely_fits(want.values()):
        want.popitem()
    return want


def surely_fits(wanted) -> bool:
    total = sum(spec.gpu_memory_bytes for spec in wanted)
    blocked = [
        s for s in wanted if s.gpu_memory_bytes and total - s.gpu_memory_bytes >= sum(c - s.gpu_memory_bytes + 1 for c in GPUS.values())
    ]
    return sum(spec.memory_bytes for spec in wanted) <= MEMORY and not blocked


@st.composite
def sights(draw, want, most=5):
    """Any sandboxes, most of them of wanted replicas: independent draws almost never are."""
    seen = {}
    for number in range(draw(st.integers(0, most))):
        spec = draw(specs(digests=("v0", "v1", "v2")))
        if want and draw(st.integers(0, 3)):
            spec = draw(st.sampled_from(sorted(want.values(), key=lambda spec: spec.name)))
            if draw(st.booleans()):
                spec = spec_of(spec.name, "v0", draw(st.integers(0, 5)), draw(st.integers(0, 2)))
        phase = draw(phases)
        seen[f"s{number}"] = Seen(
            spec,
            phase,
            retry_at=draw(st.sampled_from([0, 3])),
            drained_at=draw(st.integers(0, 3)),
            gpu=draw(st.sampled_from(sorted(GPUS))) if spec.gpu_memory_bytes and phase in ("running", "draining") else "",
            is_ready=phase == "running" and draw(st.booleans()),
        )
    return seen


holdings = st.builds(Holding, st.integers(1, 3), st.sampled_from(["GPU-a", "GPU-b"]), st.sampled_from([0, 0, 1]))
warms = st.dictionaries(st.sampled_from(["w1", "w2", "w3"]), holdings, max_size=3)


class Box:
    """What a box would do with the steps, with every precondition spelled out. It calls nothing of what it judges."""

    def __init__(self, want, seen, warm, *, limits, rnd: random.Random) -> None:
        self.want, self.seen, self.warm, self.limits, self.rnd = want, dict(seen), dict(warm), limits, rnd
        self.now = 0
        self.names = 0
        self.dying: set[str] = set()
        self.takes: dict[str, list[str]] = {}
        self.over_from_the_start = not self.fits()
        self.crowded_from_the_start = {name for name in "abcd" if self.alive(name) > 2}

    def fits(self) -> bool:
        holding = [
            Holding(s.spec.memory_bytes, s.gpu, s.spec.gpu_memory_bytes) for s in self.seen.values() if s.phase in ("running", "draining")
        ]
        holding += self.warm.values()
        per_gpu = [sum(h.gpu_memory_bytes for h in holding if h.gpu == gpu) <= size for gpu, size in self.limits.gpus.items()]
        return sum(h.memory_bytes for h in holding) <= self.limits.memory_bytes and all(per_gpu)

    def alive(self, name: str) -> int:
        return sum(s.phase in ("running", "draining") and s.spec.name == name for s in self.seen.values())

    def ready(self, name: str) -> list[ReplicaSpec]:
        return [s.spec for s in self.seen.values() if s.phase == "running" and s.is_ready and s.spec.name == name]

    def look(self):
        return next_steps(self.want, self.seen, warm=self.warm, limits=self.limits, now=self.now, takes=self.takes)

    def apply(self, step) -> None:
        match step:
            case Fetch(spec):
                assert spec not in [s.spec for s in self.seen.values()]
                self.names += 1
                self.seen[f"n{self.names}"] = Seen(spec, "fetched")
            case Start(spec, gpu, warm):
                self._start(spec, gpu, warm)
            case Drain(name):
                assert self.seen[name].phase == "running"
                self.seen[name] = Seen(
                    self.seen[name].spec, "draining", drained_at=self.now + self.rnd.randint(0, 2), gpu=self.seen[name].gpu
                )
            case Remove(name):
                gone = self.seen.pop(name)
                assert gone.phase != "running", "removed without draining"
                assert gone.phase != "draining" or self.now >= gone.drained_at, "cut off while draining"
            case GiveBack(name):
                del self.warm[name]

    def _start(self, spec: ReplicaSpec, gpu: str, warm: str) -> None:
        fetched = sorted(name for name, s in self.seen.items() if s.spec == spec and s.phase == "fetched")
        assert fetched, "started without its model"
        assert spec == self.want.get(spec.name), "started what is not wanted"
        assert gpu in GPUS if spec.gpu_memory_bytes else not gpu or warm
        if warm:
            assert self.warm.pop(warm).gpu == gpu, "a sandbox keeps the GPU that it was given"
            assert warm in self.takes[spec.name]
        assert self.alive(spec.name) < (1 if spec.update == "recreate" else 2), "too many sandboxes of one replica"
        assert not any(s.spec == spec and s.phase == "dead" and self.now < s.retry_at for s in self.seen.values()), "tried again too early"
        name = self.rnd.choice(fetched)
        self.seen[name] = Seen(spec, "running", gpu=gpu)
        if self.rnd.random() < 0.3:
            self.dying.add(name)
        assert self.over_from_the_start or self.fits(), "more memory was granted than there is"

    def tick(self, *, deaths: bool) -> None:
        """Time passes: what starts becomes ready, or ends."""
        self.now += 1
        for name, s in sorted(self.seen.items()):
            if s.phase == "running" and not s.is_ready and self.rnd.random() < 0.5:
                if deaths and name in self.dying:
                    self.seen[name] = Seen(s.spec, "dead", retry_at=self.now + 2)
                else:
                    self.seen[name] = msgspec.structs.replace(s, is_ready=True)

    def round(self, *, rough: bool, check=lambda: None) -> None:
        """One look and, if ``rough``, any part of what follows from it; in any order."""
        steps = self.look().steps
        self.rnd.shuffle(steps)
        for step in steps[: self.rnd.randint(0, len(steps))] if rough else steps:
            self.apply(step)
            check()
        self.tick(deaths=rough)
        check()

    def is_at_rest(self) -> bool:
        moving = [s for s in self.seen.values() if s.phase in ("draining", "dead") or (s.phase == "running" and not s.is_ready)]
        return not moving and not self.look().steps

    def settle(self, *, rough_rounds: int, check=lambda: None) -> None:
        for number in range(rough_rounds + ROUNDS):
            self.round(rough=number < rough_rounds, check=check)
            if number > rough_rounds and self.is_at_rest():
                return
        raise AssertionError(f"no rest: {self.look()}")

    def serves_what_is_wanted(self) -> bool:
        return {name: [spec] for name, spec in self.want.items()} == {
            name: self.ready(name) for name in "abcd" if self.alive(name) or name in self.want
        }


@st.composite
def boxes(draw, updates=updates, limits=LIMITS):
    want = draw(wants(updates))
    box = Box(want, draw(sights(want)), draw(warms), limits=limits, rnd=draw(seeds))
    if draw(st.booleans()):
        box.takes = {name: draw(st.permutations(sorted(box.warm))) for name in want}
    return box


@given(boxes(yielding), st.integers(0, 12))
@settings(max_examples=500, deadline=None)
def test_it_ends_with_what_is_wanted_from_any_state_whatever_order_or_crash(box, rough_rounds):
    box.settle(rough_rounds=rough_rounds)
    assert box.serves_what_is_wanted()
    assert box.look().waiting == {}
    assert len(box.seen) == len(box.want)


@given(boxes(), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_what_is_not_running_in_the_end_has_a_reason_and_it_is_that_an_old_version_may_not_go(box, rough_rounds):
    box.settle(rough_rounds=rough_rounds)
    waiting = box.look().waiting
    assert set(waiting) == {name for name, spec in box.want.items() if box.ready(name) != [spec]}
    keeping = [name for name in waiting if box.want[name].update == "hand_over" and box.ready(name)]
    assert bool(keeping) == bool(waiting)
    assert all("beside the old version: update.no_room is refuse" in waiting[name] for name in keeping)


@given(boxes(serving, AMPLE), st.lists(wants(serving), max_size=3), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_a_replica_that_is_handed_over_with_room_always_has_one_that_is_ready(box, later, rough_rounds):
    served = {name for name in box.want if box.ready(name)}

    def check() -> None:
        nonlocal served
        assert all(box.ready(name) for name in served & set(box.want)), "nobody answered"
        served = {name for name in box.want if box.ready(name)}

    for want in later:
        for _ in range(box.rnd.randint(0, 6)):
            box.round(rough=True, check=check)
        box.want = want
        served &= set(want)
    box.settle(rough_rounds=rough_rounds, check=check)
    assert box.serves_what_is_wanted()


@given(boxes(st.just("hand_over")), st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_an_old_version_that_must_serve_on_does_so_whatever_room_there_is(box, rough_rounds):
    served = {name for name in box.want if box.ready(name)}

    def check() -> None:
        assert all(box.ready(name) for name in served), "nobody answered"

    box.settle(rough_rounds=rough_rounds, check=check)


@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 4),
    st.integers(0, 9),
    st.sampled_from(["hand_over", "hand_over_if_room", "recreate"]),
)
@settings(max_examples=300, deadline=None)
def test_the_old_version_goes_first_only_where_both_do_not_fit_and_only_if_that_helps(old_memory, new_memory, warm_memory, limit, update):
    new = spec_of("a", "v2", new_memory, update=update)
    seen = {"s1": Seen(spec_of("a", "v1", old_memory), "running", is_ready=True), "s2": Seen(new, "fetched")}
    result = next_steps({"a": new}, seen, warm={"w": Holding(warm_memory)}, limits=Limits(limit), now=0)
    steps = [step for step in result.steps if not isinstance(step, GiveBack)]
    if update == "recreate":
        assert steps == [Drain("s1")]
    elif old_memory + new_memory + warm_memory <= limit:
        assert result.steps == [Start(new)]
    elif old_memory + new_memory <= limit:
        assert result.steps == [GiveBack("w")]
    elif update == "hand_over_if_room" and new_memory <= limit:
        assert result.steps == [Drain("s1")]
    else:
        assert result.steps == []
    assert ("a" in result.waiting) == (Start(new) not in result.steps)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 6), max_size=3), st.integers(0, 4), seeds)
def test_memory_goes_by_name_whatever_has_to_leave_first(needs, leaving, warm_memory, rnd):
    want = {name: spec_of(name, "v1", memory) for name, memory in zip("abcd", needs, strict=False)}
    seen = {f"s{name}": Seen(spec, "fetched") for name, spec in want.items()}
    seen |= {f"x{number}": Seen(spec_of("x", "v0", memory), "running", is_ready=True) for number, memory in enumerate(leaving)}
    box = Box(want, seen, {"w": Holding(warm_memory)}, limits=LIMITS, rnd=rnd)
    for _ in range(30):
        box.round(rough=False)
    left, granted = MEMORY, set()
    for name, memory in zip("abcd", needs, strict=False):
        if memory <= left:
            left, granted = left - memory, granted | {name}
    assert {name for name in want if box.alive(name)} == granted
    assert set(box.look().waiting) == set(want) - granted


@given(boxes())
def test_nothing_is_given_back_but_for_a_replica_that_fits_then_and_starts_later(box):
    steps = box.look().steps
    given = {step.sandbox for step in steps if isinstance(step, GiveBack)}
    if not given:
        return
    assert not given & {step.warm for step in steps if isinstance(step, Start)}
    for step in [step for step in steps if isinstance(step, Drain | GiveBack | Start)]:
        box.apply(step)
    box.seen = {name: s for name, s in box.seen.items() if s.phase != "draining"}
    after = [step for step in box.look().steps if isinstance(step, Start | GiveBack)]
    assert any(isinstance(step, Start) for step in after), "it was given back for nothing"


@given(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_fewest_warm_ones_are_given_back_and_only_where_memory_is_short(needed, sizes):
    warm = {f"w{number}": Holding(size) for number, size in enumerate(sizes)}
    limits = Limits(max(needed, sum(sizes)) + 1)
    spec = spec_of("a", "v1", needed)
    steps = next_steps({"a": spec}, {"s": Seen(spec, "fetched")}, warm=warm, limits=limits, now=0).steps
    short = needed + sum(sizes) - limits.memory_bytes
    fewest = next(count for count in range(len(sizes) + 1) if sum(sorted(sizes, reverse=True)[:count]) >= short)
    assert len(steps) == max(1, fewest)
    assert steps == [Start(spec)] if short <= 0 else all(isinstance(step, GiveBack) for step in steps)


def test_a_warm_sandbox_becomes_the_replica_where_there_is_room_for_one_of_them_only():
    spec = spec_of("a", "v1", 5)
    seen, warm = {"s": Seen(spec, "fetched")}, {"w1": Holding(6), "w2": Holding(4)}
    taken = next_steps({"a": spec}, seen, warm=warm, limits=Limits(11), now=0, takes={"a": ["gone", "w2"]})
    assert (taken.steps, taken.waiting) == ([Start(spec, warm="w2")], {})


def test_of_two_that_are_fetched_one_is_forgotten_before_the_other_is_started():
    spec = spec_of("a", "v1")
    seen = {"s2": Seen(spec, "fetched"), "s1": Seen(spec, "fetched")}
    assert next_steps({"a": spec}, seen, warm={}, limits=LIMITS, now=0).steps == [Remove("s2")]


@given(boxes())
def test_the_same_world_gives_the_same_steps(box):
    first = box.look()
    box.want, box.seen, box.warm = (dict(reversed(side.items())) for side in (box.want, box.seen, box.warm))
    assert box.look() == first


@given(boxes())
def test_a_healthy_replica_that_is_still_wanted_is_never_touched(box):
    touched = {step.sandbox for step in box.look().steps if isinstance(step, Drain | Remove)}
    for name, spec in box.want.items():
        healthy = {sandbox for sandbox, s in box.seen.items() if s.spec == spec and s.phase == "running"}
        assert not healthy or healthy - touched
        ready = {sandbox for sandbox in healthy if box.seen[sandbox].is_ready}
        assert not ready or len(ready - touched) == 1, name


@given(boxes(), st.lists(specs(), max_size=5))
def test_no_batch_grants_more_memory_than_the_box_has_even_when_too_much_is_wanted(box, wanted):
    box.want = {spec.name: spec for spec in wanted}
    box.seen |= {f"f{name}": Seen(spec, "fetched") for name, spec in box.want.items()}
    box.round(rough=False)


@given(boxes(), st.lists(wants(), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_crash_loop_is_remembered_until_the_spec_changes(box, later):
    looping = {name: f"loop-{name}" for name in box.want}
    box.seen = {looping[name]: Seen(spec, "dead", retry_at=math.inf) for name, spec in box.want.items()}
    for _ in range(6):
        box.round(rough=False)
    assert set(box.seen) == set(looping.values())
    first, box.want = box.want, later[0]
    for _ in range(ROUNDS):
        box.round(rough=False)
    for name, spec in box.want.items():
        assert box.ready(name) == ([] if first.get(name) == spec else [spec])
    assert {s.spec.name for s in box.seen.values() if s.phase == "dead"} == {name for name in box.want if first.get(name) == box.want[name]}


def test_a_thousand_loads_and_unloads_leave_the_memory_as_it_was():
    box = Box({}, {}, {}, limits=LIMITS, rnd=random.Random(5))
    for cycle in range(1000):
        box.want = {"a": spec_of("a", f"v{cycle}", MEMORY - 2, 4), "b": spec_of("b", f"v{cycle}", 2, 4)}
        if cycle == 0:
            box.warm = {"w1": Holding(MEMORY)}
        for _ in range(30):
            box.round(rough=cycle % 2 == 0)
        box.settle(rough_rounds=0)
        assert box.serves_what_is_wanted()
        box.want = {}
        box.settle(rough_rounds=0)
        assert not box.seen
        assert not box.warm


@given(boxes())
def test_an_old_version_that_is_not_ready_makes_way(box):
    drained = {step.sandbox for step in box.look().steps if isinstance(step, Drain)}
    assert {
        sandbox for sandbox, s in box.seen.items() if s.phase == "running" and not s.is_ready and s.spec != box.want.get(s.spec.name)
    } <= drained

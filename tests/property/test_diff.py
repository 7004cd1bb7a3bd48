"""The warden's diff converges whatever the order, and wherever a batch is cut, and never overcommits memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.diff import Drain, Fetch, Limits, Remove, Seen, Start, Step, next_steps
from skerry.wire.messages import ModelRef, ReplicaSpec

MEMORY = 8
GPU_MEMORY = 4
LIMITS = Limits(memory_bytes=MEMORY, gpu_memory_bytes=GPU_MEMORY)


def spec_of(name: str, digest: str, memory: int, gpu: int) -> ReplicaSpec:
    model = ModelRef(name="m", version=1, sha256=digest, size_bytes=1)
    return ReplicaSpec(name=name, deployment="d", generation=1, model=model, memory_bytes=memory, cpus=1.0, gpu_memory_bytes=gpu)


specs = st.builds(spec_of, st.sampled_from("abcde"), st.sampled_from(["v1", "v2"]), st.integers(0, 4), st.integers(0, 2))
phases = st.sampled_from(["fetched", "running", "draining", "dead"])


@st.composite
def worlds(draw):
    """A want and a seen that mostly agree: independent draws almost never do."""
    want = {s.name: s for s in draw(st.lists(specs, max_size=5))}
    while sum(s.memory_bytes for s in want.values()) > MEMORY or sum(s.gpu_memory_bytes for s in want.values()) > GPU_MEMORY:
        want.popitem()
    seen = {}
    for name, spec in want.items():
        if draw(st.booleans()):
            kept = draw(st.booleans())
            other = spec_of(name, "v0", draw(st.integers(0, 4)), draw(st.integers(0, 2)))
            times = {"retry_at": draw(st.integers(0, 3)), "drained_at": draw(st.integers(0, 3))}
            seen[name] = Seen(spec if kept else other, draw(phases), **times)
    for extra in draw(st.lists(specs, max_size=3)):
        seen.setdefault(extra.name, Seen(extra, draw(phases)))
    return want, seen


def held(seen) -> tuple[int, int]:
    """Written out again on purpose: an oracle must not call the code it judges."""
    holding = [s.spec for s in seen.values() if s.phase not in ("fetched", "dead")]
    return sum(s.memory_bytes for s in holding), sum(s.gpu_memory_bytes for s in holding)


def fits(amounts: tuple[int, int]) -> bool:
    return amounts[0] <= MEMORY and amounts[1] <= GPU_MEMORY


def apply(seen, step: Step, now: float) -> None:
    """What the box would do, with every precondition spelled out."""
    match step:
        case Fetch(spec):
            assert spec.name not in seen
            seen[spec.name] = Seen(spec, "fetched")
        case Start(spec):
            assert seen[spec.name].spec == spec, "started with another replica's model"
            assert seen[spec.name].phase == "fetched"
            seen[spec.name] = Seen(spec, "running")
        case Drain(name):
            assert seen[name].phase == "running"
            seen[name] = Seen(seen[name].spec, "draining", drained_at=now + 2)
        case Remove(name):
            gone = seen.pop(name)
            assert gone.phase != "running", "removed without draining"
            assert gone.phase != "draining" or now >= gone.drained_at, "cut off while draining"


@given(worlds(), st.lists(st.integers(0, 5), max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None)
def test_converges_whatever_order_or_crash(world, cuts, rnd):
    want, seen = world
    over_from_the_start = not fits(held(seen))
    now = 0
    for cut in [*cuts, *[99] * 24]:  # a crash after `cut` steps of a batch, then look again
        batch = next_steps(want, seen, limits=LIMITS, now=now)
        rnd.shuffle(batch)
        for step in batch[:cut]:
            apply(seen, step, now)
            assert over_from_the_start or fits(held(seen))
        now += 1
    assert next_steps(want, seen, limits=LIMITS, now=now) == []
    assert {name: s.spec for name, s in seen.items() if s.phase == "running"} == want


@given(worlds())
def test_the_same_world_gives_the_same_steps(world):
    want, seen = world
    shuffled = [dict(reversed(side.items())) for side in world]
    assert next_steps(want, seen, limits=LIMITS, now=1) == next_steps(*shuffled, limits=LIMITS, now=1)


@given(worlds())
def test_a_healthy_replica_that_is_still_wanted_is_never_touched(world):
    want, seen = world
    touched = {step.name for step in next_steps(want, seen, limits=LIMITS, now=9) if isinstance(step, Drain | Remove)}
    assert not {name for name in touched if seen[name].phase == "running" and seen[name].spec == want.get(name)}


@given(st.lists(specs, max_size=5), worlds())
def test_no_batch_grants_more_memory_than_the_box_has_even_when_too_much_is_wanted(wanted, world):
    want = {s.name: s for s in wanted}
    seen = {name: Seen(spec, "fetched") for name, spec in want.items()}
    seen.update({f"old-{name}": s for name, s in world[1].items()})
    memory, gpu_memory = held(seen)
    for step in next_steps(want, seen, limits=LIMITS, now=0):
        if isinstance(step, Start):
            memory, gpu_memory = memory + step.spec.memory_bytes, gpu_memory + step.spec.gpu_memory_bytes
            assert fits((memory, gpu_memory))

"""Memory is never granted twice, the fullest GPU that has room is taken, and a refusal says what is short."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.admission import Free, Grant, Holding, Limits, Refusal, free, give_back, holding_of, place
from skerry.wire.messages import ModelRef, ReplicaSpec

UUIDS = ["GPU-a", "GPU-b", "MIG-c"]


def spec_of(memory: int, gpu: int = 0) -> ReplicaSpec:
    return ReplicaSpec("a", "d", 1, ModelRef("m", 1, "v1", 1), memory, cpus=1.0, gpu_memory_bytes=gpu)


sizes = st.integers(0, 9)
limits_ = st.builds(Limits, sizes, st.dictionaries(st.sampled_from(UUIDS), sizes))
holdings_ = st.lists(st.builds(Holding, sizes, st.sampled_from(["", "GPU-gone", *UUIDS]), st.integers(0, 4)), max_size=4)
specs = st.builds(spec_of, sizes, st.sampled_from([0, 1, 2, 5, 9]))


@given(limits_, st.lists(specs, max_size=8))
def test_what_is_granted_one_after_the_other_is_never_more_than_there_is(limits, wanted):
    held: list[Holding] = []
    for spec in wanted:
        grant = place(spec, free(limits, held))
        if isinstance(grant, Grant):
            held.append(Holding(spec.memory_bytes, grant.gpu, spec.gpu_memory_bytes))
            assert (grant.gpu in limits.gpus) == (spec.gpu_memory_bytes > 0)
    assert sum(h.memory_bytes for h in held) <= limits.memory_bytes
    for uuid, size_bytes in limits.gpus.items():
        assert sum(h.gpu_memory_bytes for h in held if h.gpu == uuid) <= size_bytes


@given(specs, limits_)
def test_the_fullest_gpu_that_has_room_is_taken_and_a_refusal_is_never_for_nothing(spec, limits):
    gpus = {uuid: left for uuid, left in limits.gpus.items() if left >= spec.gpu_memory_bytes}
    result = place(spec, Free(limits.memory_bytes, limits.gpus))
    if isinstance(result, Refusal):
        assert spec.memory_bytes > limits.memory_bytes or (spec.gpu_memory_bytes and not gpus)
        assert (" of memory" in result.reason) == (spec.memory_bytes > limits.memory_bytes)
        assert ("GPU memory" in result.reason) == bool(spec.gpu_memory_bytes and not gpus)
    elif spec.gpu_memory_bytes:
        assert result.gpu == min(uuid for uuid, left in gpus.items() if left == min(gpus.values()))
    else:
        assert result.gpu == ""


@given(limits_, holdings_, st.randoms(use_true_random=False))
def test_what_is_free_is_what_the_limits_leave_in_whatever_order_it_is_counted(limits, holdings, rnd):
    left = free(limits, holdings)
    assert left.memory_bytes == limits.memory_bytes - sum(h.memory_bytes for h in holdings)
    for uuid, size_bytes in limits.gpus.items():
        assert left.gpus[uuid] == size_bytes - sum(h.gpu_memory_bytes for h in holdings if h.gpu == uuid or not h.gpu)
    rnd.shuffle(holdings)
    assert free(limits, holdings) == left


@given(limits_, st.lists(st.builds(Holding, sizes, st.sampled_from(UUIDS), sizes), max_size=50), st.randoms(use_true_random=False))
def test_holdings_taken_and_given_back_again_and_again_leave_what_was_free(limits, holdings, rnd):
    left = start = free(limits, [])
    for _ in range(1000 // max(20, len(holdings))):
        for held in holdings:
            left = left.less(held)
        rnd.shuffle(holdings)
        for held in holdings:
            left = left.plus(held)
    assert left == start


@given(limits_, st.builds(Holding, sizes, st.sampled_from(UUIDS), sizes))
def test_what_is_left_has_room_for_what_fits_on_its_gpu(limits, held):
    on_gpu = limits.gpus.get(held.gpu, -1) >= held.gpu_memory_bytes
    assert free(limits, []).has(held) == (limits.memory_bytes >= held.memory_bytes and (on_gpu or held.gpu_memory_bytes == 0))


@st.composite
def warm_boxes(draw):
    """Boxes that are nearly full of warm sandboxes."""
    warm = draw(st.dictionaries(st.sampled_from("uvwxy"), st.builds(Holding, st.integers(0, 5), st.sampled_from(UUIDS), st.integers(0, 4))))
    gpus = {
        uuid: sum(h.gpu_memory_bytes for h in warm.values() if h.gpu == uuid) + draw(st.integers(0, 2)) for uuid in UUIDS[: draw(sizes)]
    }
    return Limits(sum(h.memory_bytes for h in warm.values()) + draw(st.integers(0, 2)), gpus), warm


@given(specs, warm_boxes())
@settings(max_examples=500, deadline=None)
def test_what_is_given_back_makes_it_fit_and_nothing_is_given_back_in_vain(spec, box):
    limits, warm = box
    left = free(limits, warm.values())
    given_back = give_back(spec, left, warm)

    def fits_without(names) -> bool:
        return isinstance(place(spec, free(limits, [held for name, held in warm.items() if name not in names])), Grant)

    if given_back:
        assert not fits_without([])
        assert fits_without(given_back)
        assert not any(fits_without([name for name in given_back if name != spared]) for spared in given_back)
        if spec.gpu_memory_bytes == 0:
            assert not any(fits_without(fewer) for fewer in combinations(warm, len(given_back) - 1))
    else:
        assert fits_without([]) or not fits_without(warm)
    assert give_back(spec, left, dict(reversed(warm.items()))) == given_back


def test_a_refusal_reads_well():
    gib = 2**30
    assert place(spec_of(2 * gib), Free(gib)) == Refusal("needs 2 GiB of memory, 1 GiB is free")
    assert place(spec_of(0, gib), Free(gib)) == Refusal("needs 1 GiB of GPU memory, there is no GPU")
    short_of_both = place(spec_of(2 * gib, 2 * gib), Free(-5, {"GPU-a": gib, "GPU-b": 0}))
    assert short_of_both == Refusal("needs 2 GiB of memory, 0 B is free and 2 GiB of GPU memory, 1 GiB is free on the emptiest GPU")
    assert place(spec_of(gib + 1), Free(gib)) == Refusal("needs 1073741825 B of memory, 1073741824 B is free")


def test_what_a_replica_holds_is_what_its_spec_says():
    assert holding_of(spec_of(3, 2), "GPU-a") == Holding(3, "GPU-a", 2)

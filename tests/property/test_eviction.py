"""Models that are needed, or may be gone back to, never go; of the others the longest unused, as many as it takes and not one more."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.eviction import Held, Room, evictions, remembered

digests = st.sampled_from("abcdefgh")


@given(
    st.dictionaries(digests, st.tuples(st.integers(0, 50), st.integers(0, 9))), st.sets(digests), st.integers(0, 60), st.integers(0, 100),
    st.integers(0, 100), st.integers(0, 150),
)  # fmt: skip
def test_what_goes_is_the_longest_unused_that_is_not_kept_and_no_more_than_it_takes(models, kept, coming, free, reserve, most):
    held = [Held(digest, size, used) for digest, (size, used) in models.items()]
    gone = evictions(held, kept=kept, coming_bytes=coming, room=Room(free, reserve, most))

    def is_short(without: list[Held]) -> bool:
        freed = sum(model.size_bytes for model in without)
        total = sum(model.size_bytes for model in held) - freed + coming
        return free + freed - coming < reserve or (most > 0 and total > most)

    assert not {model.sha256 for model in gone} & kept
    rest = [model for model in held if model not in gone and model.sha256 not in kept]
    assert all(one.used_at_ms <= other.used_at_ms for one in gone for other in rest)
    assert not gone or is_short(gone[:-1]), "the last one had to go"
    assert not rest or not is_short(gone), "there was more to give, and it was needed"


@given(st.lists(st.lists(st.tuples(st.sampled_from("xy"), digests), max_size=3), max_size=12))
def test_of_what_is_deployed_the_present_and_the_one_before_are_kept_and_of_nothing_else_anything(rounds):
    """The oracle keeps the whole past of each deployment."""
    history: dict[str, list[str]] = {}
    past: dict[str, list[str]] = {}
    for deployed in rounds:
        history = remembered(history, deployed)
        names = {name for name, _ in deployed}
        past = {name: past.get(name, []) for name in names}
        for name in names:
            present = list(dict.fromkeys(digest for one, digest in deployed if one == name))
            before = [digest for digest in past[name] if digest not in present]
            past[name] = present + before
            assert history[name][: len(present)] == present
            assert len(history[name]) <= max(2, len(present))
            if before and len(present) == 1:
                assert len(history[name]) == 2
        assert history.keys() == names

"""What is held of sequences stays within its bounds, and what goes first is what was idle longest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.worker.sequences import Sequences

MOST, MOST_BYTES, IDLE_S = 3, 100, 10.0
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "keep", "keep", "look", "forget"]),
        st.sampled_from("abcdefg"),
        st.sampled_from([0, 1, 10, 30, 60, 99, 100]),
        st.sampled_from([0.0, 0.5, 6.0]),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_holds_what_was_kept_last_within_every_bound_and_never_anything_older(steps):
    sequences = Sequences(most=MOST, most_bytes=MOST_BYTES, idle_s=IDLE_S)
    model: list[tuple[str, int, float, object]] = []  # the longest unused first
    now = 0.0
    for action, sequence, size, passed in steps:
        now += passed
        if action != "forget":
            model = [entry for entry in model if now - entry[2] <= IDLE_S]
        if action == "keep":
            state = {"s": np.zeros(size, "u1")}
            model = [entry for entry in model if entry[0] != sequence]
            fits = size + 1 <= MOST_BYTES
            assert sequences.keep(sequence, state, now) == fits
            while fits and (len(model) >= MOST or sum(entry[1] for entry in model) + size + 1 > MOST_BYTES):
                model.pop(0)
            if fits:
                model.append((sequence, size + 1, now, state))
        elif action == "look":
            assert sequences.state(sequence, now) is next((entry[3] for entry in model if entry[0] == sequence), None)
        else:
            sequences.forget(sequence)
            model = [entry for entry in model if entry[0] != sequence]
        assert len(sequences) == len(model) <= MOST
        assert sequences.held_bytes == sum(entry[1] for entry in model) <= MOST_BYTES

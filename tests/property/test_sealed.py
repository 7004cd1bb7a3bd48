"""What was sealed comes back whole or not at all, in whatever pieces it is written and read and whatever is done to it meanwhile."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.backup.sealed import CHUNK_BYTES, MAGIC, TAG_BYTES, Opening, SealBroken, Sealing

KEY = b"a passphrase"
HEADER_BYTES = len(MAGIC) + 1 + 16 + 7
sizes = st.one_of(
    st.integers(0, 100), st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
)


def sealed(content: bytes, pieces: int = 1) -> bytes:
    file = io.BytesIO()
    sealing = Sealing(file, KEY, cost=2)
    step = max(1, -(-len(content) // pieces))
    for first in range(0, len(content), step):
        sealing.write(content[first : first + step])
    sealing.close()
    return file.getvalue()


def opened(data: bytes, key: bytes = KEY, size: int = -1) -> bytes:
    opening, parts = Opening(io.BytesIO(data), key), []
    while part := opening.read(size):
        parts.append(part)
    return b"".join(parts)


def content_of(size: int) -> bytes:
    return bytes(index * 7 % 251 for index in range(size % 1000)) * (size // max(1, size % 1000) + 1)


@given(sizes, st.integers(1, 5), st.sampled_from([-1, 1 << 16, CHUNK_BYTES, 3 * CHUNK_BYTES]))
@settings(max_examples=25, deadline=None)
def test_it_comes_back_as_it_was(size, pieces, read):
    content = content_of(size)[:size]
    assert opened(sealed(content, pieces), size=read) == content


@given(sizes, st.data())
@settings(max_examples=40, deadline=None)
def test_a_bit_that_is_another_an_end_that_is_missing_or_parts_in_another_order_open_nothing(size, data):
    content = content_of(size)[:size]
    whole = sealed(content)
    how = data.draw(st.sampled_from(["bit", "cut", "longer", "swap", "key"]))
    key, changed = KEY, whole
    if how == "bit":
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    elif how == "cut":
        step = CHUNK_BYTES + TAG_BYTES
        changed = whole[
            : data.draw(st.one_of(st.integers(0, len(whole) - 1), st.just((len(whole) - HEADER_BYTES - 1) // step * step + HEADER_BYTES)))
        ]
    elif how == "longer":
        changed = whole + whole[HEADER_BYTES:]
    elif how == "swap" and size > 2 * CHUNK_BYTES:
        step = CHUNK_BYTES + TAG_BYTES
        one, two = whole[HEADER_BYTES : HEADER_BYTES + step], whole[HEADER_BYTES + step : HEADER_BYTES + 2 * step]
        changed = whole[:HEADER_BYTES] + two + one + whole[HEADER_BYTES + 2 * step :]
    else:
        key = b"another one"
    try:
        found = opened(changed, key)
    except SealBroken:
        return
    assert (changed, key) == (whole, KEY), "it was changed, and opened all the same"
    assert found == content


@pytest.mark.parametrize("how", ["swapped", "repeated", "without one", "cut at a seam"])
def test_whole_chunks_can_be_neither_moved_nor_left_out(how):
    step = CHUNK_BYTES + TAG_BYTES
    whole = sealed(b"".join(bytes([number]) * CHUNK_BYTES for number in range(3)) + b"end")
    header, one, two, three, last = (
        whole[:HEADER_BYTES], *(whole[HEADER_BYTES + number * step :][:step] for number in range(3)), whole[HEADER_BYTES + 3 * step :],
    )  # fmt: skip
    assert opened(header + one + two + three + last)[-3:] == b"end"
    changed = {
        "swapped": two + one + three + last, "repeated": one + one + two + three + last, "without one": one + three + last,
        "cut at a seam": one + two + three,
    }[how]  # fmt: skip
    with pytest.raises(SealBroken):
        opened(header + changed)


@pytest.mark.parametrize("data", [b"", b"x", MAGIC, MAGIC + b"\x00" * 40, MAGIC + b"\xff" * 60, MAGIC + b"\x1f" + b"\x00" * 60])
def test_what_is_no_backup_costs_neither_time_nor_memory(data):
    with pytest.raises(SealBroken, match="no backup"):
        Opening(io.BytesIO(data), KEY)

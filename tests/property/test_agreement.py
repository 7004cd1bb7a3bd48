"""Two answers agree where every number is as near as was asked for, and nothing else is forgiven."""

import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import agreement
from skerry.wire import oip
from skerry.wire.messages import Agreement

FORMATS = {"FP16": "e", "FP32": "f", "FP64": "d", "INT32": "i", "UINT8": "B"}


def tensor(values, datatype: str = "FP32", shape: tuple[int, ...] | None = None, name: str = "y") -> oip.Tensor:
    data = struct.pack(f"<{len(values)}{FORMATS[datatype]}", *values)
    return oip.Tensor(name, datatype, (len(values),) if shape is None else shape, data)


def read_back(held: oip.Tensor) -> list[float]:
    count = len(held.data) // struct.calcsize(FORMATS[held.datatype])
    return list(struct.unpack(f"<{count}{FORMATS[held.datatype]}", held.data))


numbers = st.one_of(
    st.floats(-100, 100, width=32), st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]), st.floats(-0.125, 0.125, width=32)
)


def near(a: float, b: float, tolerance: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    if math.isinf(a) or math.isinf(b):
        return a == b
    return abs(a - b) <= tolerance * max(1.0, abs(a))


@given(
    st.lists(st.tuples(numbers, numbers, st.sampled_from(["same", "near", "other"])), min_size=1, max_size=8),
    st.sampled_from(["FP32", "FP64", "FP16"]),
    st.sampled_from([0.0, 0.001, 0.1]),
)
def test_values_agree_as_one_by_one_they_do(pairs, datatype, tolerance):
    ours = [a for a, _, _ in pairs]
    theirs = [a if kind == "same" else a * (1 + tolerance * 0.9) if kind == "near" else b for a, b, kind in pairs]
    first, second = tensor(ours, datatype), tensor(theirs, datatype)
    expected = all(near(a, b, tolerance) for a, b in zip(read_back(first), read_back(second), strict=True))
    reason = agreement.difference([first], [second], Agreement("values", tolerance))
    assert (reason == "") == expected, reason


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_the_largest_agrees_where_it_stands_in_the_same_place_in_each_row(rows, data):
    others = [data.draw(st.permutations(row)) for row in rows]
    shape = (len(rows), 3)
    first, second = (tensor([x for row in held for x in row], shape=shape) for held in (rows, others))
    expected = all(a.index(max(a)) == list(b).index(max(b)) for a, b in zip(rows, others, strict=True))
    assert (agreement.difference([first], [second], Agreement("largest")) == "") == expected


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        ([tensor([1.0, 2.0], name="z")], "outputs z instead of y"),
        ([], "outputs  instead of y"),
        ([tensor([1.0, 2.0], "FP64")], "FP64 [2] instead of FP32 [2]"),
        ([tensor([1.0, 2.0], shape=(2, 1))], "FP32 [2, 1] instead of FP32 [2]"),
        ([tensor([1.0, 2.5])], "1 of 2 values differ, the first is 2.5 instead of 2"),
    ],
)
def test_what_differs_is_said(theirs, why):
    assert why in agreement.difference([tensor([1.0, 2.0])], theirs, Agreement())


def test_what_is_no_float_must_be_equal():
    for asked in (Agreement("values", 1000.0), Agreement("largest")):
        assert agreement.difference([tensor([1, 2], "INT32")], [tensor([1, 3], "INT32")], asked)
        assert not agreement.difference([tensor([1, 2], "INT32")], [tensor([1, 2], "INT32")], asked)
        text = oip.Tensor("y", "BYTES", (1,), oip.join_bytes([b"a"]))
        assert agreement.difference([text], [msgspec.structs.replace(text, data=oip.join_bytes([b"b"]))], asked)


def test_half_precision_of_both_kinds_is_read():
    ones = oip.Tensor("y", "BF16", (2,), struct.pack("<2H", 0x3F80, 0x4000))
    close = oip.Tensor("y", "BF16", (2,), struct.pack("<2H", 0x3F80, 0x4001))
    assert not agreement.difference([ones], [close], Agreement("values", 0.01))
    assert agreement.difference([ones], [close], Agreement("values", 0.0001))
    empty = oip.Tensor("y", "FP32", (0, 3), b"")
    assert not agreement.difference([empty], [empty], Agreement("largest"))

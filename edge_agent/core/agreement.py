"""Whether two answers to one request say the same, as far as a deployment asks. Pure."""

from collections.abc import Sequence

import numpy as np

from skerry.wire import oip
from skerry.wire.messages import Agreement

MOST_NAME = 80


def difference(ours: Sequence[oip.Tensor], theirs: Sequence[oip.Tensor], asked: Agreement) -> str:
    """Where the two differ first, in words; empty where they agree.

    By ``values`` numbers agree that are no further apart than ``tolerance`` times the larger of 1 and what ours is; by ``largest`` it is
    the index of the largest number along the last axis that must be the same. What is not a number must be equal in any case.
    """
    known = {tensor.name: tensor for tensor in theirs}
    if known.keys() != {tensor.name for tensor in ours}:
        return f"outputs {_names(theirs)} instead of {_names(ours)}"
    for tensor in ours:
        if reason := _of_one(tensor, known[tensor.name], asked):
            return f"output {tensor.name[:MOST_NAME]!r}: {reason}"
    return ""


def _names(tensors: Sequence[oip.Tensor]) -> str:
    return ", ".join(sorted(tensor.name[:MOST_NAME] for tensor in tensors)[:5])


def _of_one(ours: oip.Tensor, theirs: oip.Tensor, asked: Agreement) -> str:
    if (ours.datatype, ours.shape) != (theirs.datatype, theirs.shape):
        return f"{theirs.datatype} {list(theirs.shape)} instead of {ours.datatype} {list(ours.shape)}"
    if bytes(ours.data) == bytes(theirs.data):
        return ""
    if not _is_float(ours.datatype):
        return "other bytes" if ours.datatype == "BYTES" else "other values"
    a, b = _numbers(ours), _numbers(theirs)
    if asked.by == "largest" and ours.shape and a.size:
        other = np.argmax(a, axis=-1) != np.argmax(b, axis=-1)
        return f"the largest is elsewhere in {int(other.sum())} of {other.size} rows" if other.any() else ""
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b) > asked.tolerance * np.maximum(1.0, np.abs(a))
    # Of infinities and of what is no number the difference is none either: equal ones agree, and no others.
    odd = ~(np.isfinite(a) & np.isfinite(b))
    apart = np.where(odd, ~((a == b) | (np.isnan(a) & np.isnan(b))), apart)
    if not apart.any():
        return ""
    first = int(np.flatnonzero(apart)[0])
    return f"{int(apart.sum())} of {a.size} values differ, the first is {b.flat[first]:.6g} instead of {a.flat[first]:.6g}"


def _is_float(datatype: str) -> bool:
    return datatype in ("FP16", "FP32", "FP64", "BF16")


def _numbers(tensor: oip.Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """The tensor's numbers, in double precision."""
    if tensor.datatype == "BF16":  # the upper half of an FP32
        raw = (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        raw = np.frombuffer(tensor.data, {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}[tensor.datatype])
    return raw.reshape(tensor.shape).astype(np.float64)

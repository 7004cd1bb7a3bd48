"""A box's wall clock, in a chaos run: Python reads this as each of the box's programs starts, and time is as much later as a file says.

A library that wraps the C functions (libfaketime) breaks sleeping by the monotonic clock, and the kernel has no namespace for this one.
"""

import mmap
import os
import struct
import time

with open(os.environ["CHAOS_CLOCK"], "rb") as file:  # noqa: PTH123 - read before anything else is imported
    _offset = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
_time_ns = time.time_ns


def time_ns() -> int:
    """The time, as this box takes it to be."""
    return int(_time_ns() + struct.unpack("q", _offset)[0])


time.time_ns = time_ns
time.time = lambda: time_ns() / 1e9

"""A box's link, frame by frame: two TAP devices in two network namespaces, and between them whatever is to happen to what passes.

The kernel here has no netem; and what a seed decides must be decided here, not by the kernel's own chance.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import os
import random
import struct
import subprocess
import threading
from pathlib import Path

import msgspec

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
FRAME_BYTES = 65536
FRAMES_AT_ONCE = 64
QUEUE_S = 4.0
"""What would have to wait longer than that on a slow link is dropped, as a router's queue does."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def leave_for_own_namespaces() -> None:
    """This process gets network and mount namespaces of its own: what it sets up ends with it. Before any thread is made."""
    _call(_libc.unshare(CLONE_NEWNET | CLONE_NEWNS), "unshare")
    run("mount", "--make-rprivate", "/")
    run("mount", "--make-rshared", "/")  # what is unmounted here is unmounted below
    run("ip", "link", "set", "lo", "up")


def enter_network(pid: int) -> None:
    """This thread, and no other, opens its sockets in that process's network from now on."""
    with Path(f"/proc/{pid}/ns/net").open("rb") as namespace:
        _call(_libc.setns(namespace.fileno(), CLONE_NEWNET), "setns")


def run(*argv: str) -> None:
    """A command that must work."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")


def tap(name: str, pid: int) -> int:
    """A TAP device in the network of process ``pid``, as a descriptor that does not block; it is gone once that is closed."""
    opened: list[int] = []

    def make() -> None:
        enter_network(pid)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
        opened.append(descriptor)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not opened:
        raise RuntimeError(f"no TAP device {name}")
    return opened[0]


class Weather(msgspec.Struct):
    """How a link is: which ways are open, what share of frames is lost, what each is late, how much fits (0: all)."""

    up: bool = True
    down: bool = True
    loss: float = 0.0
    latency_s: float = 0.0
    bits_per_s: float = 0.0


class Wire:
    """Carries frames between ``near`` (the box's device) and ``far`` (the bridge's), as ``weather`` has it."""

    def __init__(self, near: int, far: int, *, seed: int) -> None:
        self.weather = Weather()
        self._ends = {near: far, far: near}
        self._near = near
        self._free_s = {near: 0.0, far: 0.0}
        self._chance = random.Random(seed)

    def start(self) -> None:
        """In the running loop."""
        for end in self._ends:
            asyncio.get_running_loop().add_reader(end, self._read, end)

    def close(self) -> None:
        """Both devices are gone after that."""
        for end in self._ends:
            asyncio.get_running_loop().remove_reader(end)
            os.close(end)
        self._ends = {}

    def _read(self, end: int) -> None:
        for _ in range(FRAMES_AT_ONCE):
            try:
                frame = os.read(end, FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:  # a device whose namespace ended
                asyncio.get_running_loop().remove_reader(end)
                return
            self._carry(end, frame)

    def _carry(self, end: int, frame: bytes) -> None:
        weather = self.weather
        if not (weather.up if end == self._near else weather.down) or self._chance.random() < weather.loss:
            return
        loop = asyncio.get_running_loop()
        late_s = weather.latency_s
        if weather.bits_per_s:
            now_s = loop.time()
            starts_s = max(now_s, self._free_s[end])
            if starts_s - now_s > QUEUE_S:
                return
            self._free_s[end] = starts_s + 8 * len(frame) / weather.bits_per_s
            late_s += self._free_s[end] - now_s
        if late_s:
            loop.call_later(late_s, self._write, end, frame)
        else:
            self._write(end, frame)

    def _write(self, end: int, frame: bytes) -> None:
        other = self._ends.get(end)
        if other is not None:
            with contextlib.suppress(OSError):  # a full queue drops, as a network does
                os.write(other, frame)

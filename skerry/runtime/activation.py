"""Listening sockets that systemd opened and keeps open while a program is started again (sd_listen_fds(3), systemd.socket(5))."""

import os
import socket

_FIRST = 3
"""SD_LISTEN_FDS_START."""


def listeners() -> dict[str, list[socket.socket]]:
    """The sockets handed to this process, by FileDescriptorName=; empty where there are none. They are handed out once."""
    given, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if given != str(os.getpid()) or not (count.isascii() and count.isdigit() and len(count) <= 4):
        return {}
    found: dict[str, list[socket.socket]] = {}
    told = names.split(":") if names else []
    for index in range(int(count)):
        os.set_inheritable(_FIRST + index, False)
        listener = socket.socket(fileno=_FIRST + index)
        listener.setblocking(False)
        found.setdefault(told[index] if index < len(told) else "unknown", []).append(listener)  # as sd_listen_fds_with_names(3) calls it
    return found

"""What systemd wants to hear (sd_notify(3)): readiness, status, the watchdog. Silent where nobody listens."""

import os
import socket


def notify(*lines: str) -> None:
    """Send ``READY=1`` and the like; a missing or dead listener is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(lines).encode(), address)
        except OSError:
            return


def watchdog_interval_s() -> float:
    """How often the working loop must say that it lives: a third of WatchdogSec, 0 where none is set."""
    return int(os.environ.get("WATCHDOG_USEC", "0") or 0) / 3e6

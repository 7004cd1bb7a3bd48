"""systemd's part in a chaos run: a program that ends is started again, one that does not feed its watchdog is killed."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

RESTART_S = 0.5
WATCHDOG_S = 10.0
_PR_SET_PDEATHSIG = 1


class Program:
    """One program. While ``is_held`` it is not started again."""

    def __init__(self, name: str, argv: list[str], *, log: Path, sockets: Path, env: dict[str, str], into: Callable[[], None]) -> None:
        self.name = name
        self.has_watchdog = True
        self.starts = 0
        self.fed_to_death = 0
        self.is_held = False
        self._argv = argv
        self._log = log
        self._env = env
        self._into = into
        self._address = sockets / f"{name}.notify"
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._fed_s = 0.0

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def start(self) -> None:
        """Start it, and again whenever it ends, until ``end``."""
        self.is_held = False
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep(), name=self.name)

    async def end(self, number: int = signal.SIGTERM, *, within_s: float = 12.0) -> bool:
        """End it and leave it so; whether it ended by itself."""
        self.is_held = True
        self.signal(number)
        if self._task is None:
            return True
        _, pending = await asyncio.wait([self._task], timeout=within_s)
        if pending:
            self.signal(signal.SIGKILL)
            await asyncio.wait([self._task], timeout=within_s)
        return not pending

    def signal(self, number: int) -> None:
        """Where it runs."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def once(self, *, within_s: float) -> None:
        """Run it to its end, and not again."""
        self.is_held = True
        async with asyncio.timeout(within_s):
            await self._once()

    async def _keep(self) -> None:
        while not self.is_held:
            self._address.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
                notices.bind(str(self._address))
                notices.setblocking(False)
                asyncio.get_running_loop().add_reader(notices, self._hear, notices)
                try:
                    await self._once()
                finally:
                    asyncio.get_running_loop().remove_reader(notices)
            if not self.is_held:
                await asyncio.sleep(RESTART_S)

    async def _once(self) -> None:
        env = {**self._env, "NOTIFY_SOCKET": str(self._address), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
        self._fed_s = float("inf")  # from READY=1 on it is watched
        self.starts += 1
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                preexec_fn=self._become,
                start_new_session=True,
            )
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 1.0)
                return
            if self.has_watchdog and time.monotonic() - self._fed_s > WATCHDOG_S:
                self.fed_to_death += 1
                self.signal(signal.SIGKILL)

    def _become(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._into()

    def _hear(self, notices: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                notices.recv(4096)
                self._fed_s = time.monotonic()

"""systemd, by ``systemctl``: which programs run, from which release, and how often they ended."""

import asyncio
import re
from collections.abc import Iterable
from pathlib import Path

from edge_agent.core.update import Unit
from edge_agent.updater.ports import Pid
from skerry.runtime import log

logger = log.get("updater.manager")

CALL_WITHIN_S = 30.0
PROPERTIES = ("Id", "ActiveState", "MainPID", "NRestarts")


class Systemd:
    """See ports.Manager. ``root`` is where releases lie."""

    def __init__(self, systemctl: Path, root: Path, *, processes: Path = Path("/proc")) -> None:
        self._systemctl = systemctl
        self._processes = processes
        self._release = re.compile(rf"{re.escape(str(root))}/([0-9][^/\0]*)/".encode())
        self._ended_before: dict[str, int] = {}

    async def look(self, units: Iterable[str]) -> dict[str, Pid]:
        """See Manager. A program of which nothing is heard is shown as one that does not run."""
        names = list(units)
        text = await self._call("show", f"--property={','.join(PROPERTIES)}", *(f"{name}.service" for name in names))
        found = {}
        for block in text.split("\n\n"):
            said = dict(line.partition("=")[::2] for line in block.splitlines())
            name = said.get("Id", "").removesuffix(".service")
            if name in names:
                found[name] = self._seen(name, said)
        return {name: found.get(name, Pid(Unit(), 0)) for name in names}

    def _seen(self, name: str, said: dict[str, str]) -> Pid:
        pid, ends = _number(said.get("MainPID")), _number(said.get("NRestarts"))
        # systemd counts anew after a restart that was asked for.
        before = min(self._ended_before.get(name, ends), ends)
        self._ended_before[name] = before
        return Pid(Unit(self._version(pid) if pid else "", said.get("ActiveState") == "active", ends - before), pid)

    def _version(self, pid: int) -> str:
        try:
            match = self._release.search((self._processes / str(pid) / "cmdline").read_bytes())
        except OSError:
            return ""  # it has ended
        return match[1].decode() if match else ""

    async def reload(self) -> None:
        """See Manager."""
        await self._call("daemon-reload")

    async def restart(self, units: Iterable[str]) -> None:
        """See Manager."""
        await self._call("restart", "--no-block", *(f"{name}.service" for name in units))

    async def _call(self, *words: str) -> str:
        """What it says; what goes wrong is logged, and seen by the next look."""
        process = await asyncio.create_subprocess_exec(
            self._systemctl, *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(CALL_WITHIN_S):
                out, complaint = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            logger.error("systemctl.silent", words=words[:1], within_s=CALL_WITHIN_S)
            return ""
        if process.returncode:
            logger.error("systemctl.failed", words=words[:1], status=process.returncode, said=complaint.decode(errors="replace")[-300:])
        return out.decode(errors="replace")


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0

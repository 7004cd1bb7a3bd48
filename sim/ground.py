"""What simulated boxes and benchmarks stand on: a real broker and coordinator, and as many real boxes as are asked for.

A demo's fleet with other settings: a fleet name of its own, so that nothing is shared with another fleet on the same container
engine, and where it is asked for the pace that a fleet has outside of a demo.
"""

import asyncio
import contextlib
import io
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import uvloop

from skerry.demo.fleet import FLEET, Fleet
from skerry.wire import codec

T = TypeVar("T")

PACE = re.compile(r"^(?:sample_every_s|will_delay_s|reconnect_most_s|keepalive_s|rollup_s|drain_s) = .*\n", re.MULTILINE)
"""Settings that make a demo quicker than a fleet is; without them the programs' own defaults hold."""
DOCKER_SOCKET = re.compile(r"^docker_socket = .*\n", re.MULTILINE)
INTERRUPTED = 130
ANSWER_MAX_BYTES = 256 * 2**20


class ServerFailed(RuntimeError):
    """The coordinator answered with a status from 500 on."""


class Ground(Fleet):
    """A fleet of the demo's first ``boxes`` boxes, with none: a broker and a coordinator. ``name`` is the fleet's.

    ``edit`` gets each file of settings, by its path and text, and gives the text that is written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        boxes: int = 0,
        drivers: list[str] | None = None,
        docker_socket: str = "",
        keep_pace: bool = False,
        edit: Callable[[Path, str], str] = lambda _, text: text,
    ) -> None:
        super().__init__(folder, drivers=drivers)
        self.name = f"ground-{secrets.token_hex(4)}"
        self._boxes = boxes
        self._docker_socket = docker_socket
        self._keep_pace = keep_pace
        self._edit = edit

    def prepare(self) -> None:
        """See Fleet."""
        super().prepare()
        for box in self.boxes[self._boxes :]:
            shutil.rmtree(box.folder)
        self.boxes = self.boxes[: self._boxes]
        kept = {box.name for box in self.boxes}
        self._commands = {name: command for name, command in self._commands.items() if "." not in name or name.partition(".")[0] in kept}
        for path in [*self.folder.glob("*/*.toml"), *self.folder.glob("boxes/*/*.toml")]:
            text = path.read_text().replace(f'fleet = "{FLEET}"\n', f'fleet = "{self.name}"\n')
            if self._docker_socket:
                text = DOCKER_SOCKET.sub(f'docker_socket = "{self._docker_socket}"\n', text)
            path.write_text(self._edit(path, text if self._keep_pace else PACE.sub("", text)))

    async def call(
        self, session: aiohttp.ClientSession, method: str, path: str, kind: type[T], *, body: bytes | None = None, query: str = ""
    ) -> T:
        """One call of the API as its operator. Raises ServerFailed, and RuntimeError on a refusal."""
        headers = {"Authorization": f"Bearer {self.token}"}
        data = None if body is None else io.BytesIO(body)
        async with session.request(method, f"{self.url}{path}?{query}", data=data, headers=headers) as response:
            answer = await response.read()
            if response.status >= 400:
                kind_of_error = ServerFailed if response.status >= 500 else RuntimeError
                raise kind_of_error(f"{method} {path}: {response.status} {answer[:300].decode(errors='replace')}")
            return codec.decode(answer, kind, max_bytes=ANSWER_MAX_BYTES)


@contextlib.asynccontextmanager
async def standing(**how: Any) -> AsyncIterator[Ground]:
    """A ground that is up, as ``Ground`` takes it, in a directory of its own below /tmp; whatever happens, nothing of it is left."""
    folder = Path(tempfile.mkdtemp(prefix="sk-", dir="/tmp"))
    ground = Ground(folder, **how)
    try:
        ground.prepare()
        await ground.start()
        yield ground
    finally:
        for name in ground.dead():
            last = ((ground.logs / f"{name}.log").read_text(errors="replace").strip().splitlines() or ["without a word"])[-1]
            sys.stderr.write(f"{name} ended by itself: {last[:300]}\n")
        stubborn = await ground.stop()
        left = ground.left_behind()
        if stubborn or left:
            sys.stderr.write(f"had to be killed: {stubborn}; left behind: {left}\n")
        shutil.rmtree(folder, ignore_errors=True)


async def until(holds: Callable[[], Coroutine[Any, Any, bool]], *, within_s: float, what: str, every_s: float = 0.1) -> None:
    """Poll until it holds; a failure of the server is tried again. Raises RuntimeError that says ``what`` did not come."""
    failure = ""
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    if await holds():
                        return
                except ServerFailed as exc:
                    failure = f" (last failure: {exc})"
                await asyncio.sleep(every_s)
    except TimeoutError as exc:
        raise RuntimeError(f"not within {within_s:.0f} s: {what}{failure}") from exc


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main()`` to its end. The first Ctrl-C or SIGTERM cancels it, so that it ends what it started; further ones change nothing."""

    async def interruptible() -> T:
        working = asyncio.ensure_future(main())
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs started from here would inherit
            working.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        return await working

    try:
        return uvloop.run(interruptible())
    except asyncio.CancelledError:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)

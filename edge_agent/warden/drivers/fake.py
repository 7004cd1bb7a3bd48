"""A scriptable driver that ships: no process, no isolation, the same promises. For tests of whatever talks to a warden or a worker.

Its sandboxes really listen on their sockets, in this process, and speak ``skerry.wire.ipc``: a model of ``y = 2 x`` for ``x`` of
FP32 [-1, 3], loaded at once or when the control socket is told to. They live in a
FakeWorld, which outlives a driver as a box's processes outlive a warden, and ends with its event loop.
"""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable

import msgspec

from edge_agent.warden.ports import (
    CONTROL_NAME,
    LOAD_FAILED,
    MODEL_FILE,
    SOCKET_NAME,
    DriverFailed,
    Ending,
    LogLines,
    Sandbox,
    SandboxSpec,
    Usage,
)
from skerry.wire import codec, ipc, oip
from skerry.wire.messages import Rung, WarmupTensor

OUT_OF_MEMORY = "killed: out of memory"
BAD_MODEL = b"not a model"
"""A model file that begins so can't be loaded."""

MEMORY_BYTES = 16 * 1024 * 1024
HELLO = ipc.Hello(
    inputs=[ipc.TensorSpec("x", "FP32", (-1, 3))],
    outputs=[ipc.TensorSpec("y", "FP32", (-1, 3))],
    provider="FakeProvider",
    load_ms=0.1,
    warm=True,
)


def answers_of(batch: ipc.Batch, body: memoryview) -> tuple[ipc.Answers, list[oip.Bytes]]:
    """The answers to a frame's calls. Raises codec.Malformed where their tensors do not lie in ``body``."""
    offset, answers, parts = 0, [], list[oip.Bytes]()
    for call in batch.calls:
        tensors, offset = ipc.tensors_of(call.inputs, body, offset, None)
        answer, data = answer_of(call, tensors)
        answers.append(answer)
        parts += data
    ipc.check_end(body, offset)
    return ipc.Answers(answers), parts


def answer_of(call: ipc.Call, tensors: list[oip.Tensor]) -> tuple[ipc.Answer, list[oip.Bytes]]:
    """What the fake model says to ``call``: doubled, or refused in a worker's words."""
    if [tensor.name for tensor in tensors] != ["x"]:
        names = sorted(tensor.name[:80] for tensor in tensors)
        return ipc.Answer(call.call, error=f"inputs: this model takes ['x'], got {names}", refused=True), []
    (x,) = tensors
    if x.datatype != "FP32":
        return ipc.Answer(call.call, error=f"input 'x': datatype {x.datatype} given, the model takes FP32", refused=True), []
    if len(x.shape) != 2 or x.shape[1] != 3:
        return ipc.Answer(call.call, error=f"input 'x': shape {list(x.shape)} given, the model takes [-1, 3]", refused=True), []
    unknown = [name for name in call.outputs if name != "y"]
    if unknown:
        complaint = f"outputs: {unknown[0][:80]!r} is not an output of this model, which has ['y']"
        return ipc.Answer(call.call, error=complaint, refused=True), []
    floats = struct.Struct(f"<{len(x.data) // 4}f")
    data = floats.pack(*(2 * value for value in floats.unpack(x.data)))
    return ipc.Answer(call.call, ipc.heads_of([oip.Tensor("y", "FP32", x.shape, data)]), compute_us=1), [data]


def _load_failure(spec: SandboxSpec, warmup: list[WarmupTensor]) -> str:
    """Why the worker in this sandbox would end instead of listening; empty where it would not."""
    try:
        with (spec.model_dir / MODEL_FILE).open("rb") as model:
            if model.read(len(BAD_MODEL)) == BAD_MODEL:
                return f"{LOAD_FAILED}{MODEL_FILE}: this is not a model"
        wanted_bytes = sum(4 * oip.elements_of(tensor.shape, tensor.name) for tensor in warmup)
    except OSError as exc:
        return f"{LOAD_FAILED}{MODEL_FILE}: {exc.strerror}"
    except oip.BadRequest as exc:
        return f"{LOAD_FAILED}warmup: {exc}"
    return OUT_OF_MEMORY if wanted_bytes > spec.memory_bytes else ""


class FakeSandbox:
    """One sandbox of a FakeWorld: a server on a Unix socket, and what it wrote."""

    def __init__(self, spec: SandboxSpec) -> None:
        self.spec = spec
        self.running = True
        self.ending: Ending | None = None
        self.log: list[str] = []
        self.calls = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loading: asyncio.Task[None] | None = None

    def begin(self, delay_s: float) -> None:
        """Load in the background, as a process would."""
        self._loading = asyncio.create_task(self._load(delay_s), name=f"fake.load.{self.spec.name}")

    async def _load(self, delay_s: float) -> None:
        try:
            await asyncio.sleep(delay_s)
            if "--model" in self.spec.argv:
                warmup = msgspec.json.decode(self.spec.argv[self.spec.argv.index("--warmup") + 1], type=list[WarmupTensor])
            else:
                warmup = await self._told()
            failure = _load_failure(self.spec, warmup)
            if failure:
                self.end(failure)
                return
            self._server = await self._listening(SOCKET_NAME, self._serve)
        except OSError as exc:
            self.end(f"{LOAD_FAILED}{exc.strerror or exc}")
            return
        self.log.append("listening")

    async def _listening(self, name: str, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> asyncio.Server:
        path = self.spec.socket_dir / name
        staging = path.with_name(f"{name}.new")
        server = await asyncio.start_unix_server(serve, str(staging))
        staging.rename(path)  # whoever sees the path can connect
        return server

    async def _told(self) -> list[WarmupTensor]:
        """Wait at the control socket until it is said what to load."""
        told: asyncio.Future[ipc.Load] = asyncio.get_running_loop().create_future()

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, codec.Malformed), contextlib.closing(writer):
                header_bytes, _ = ipc.parse_prefix(await reader.readexactly(ipc.PREFIX.size))
                load = ipc.parse_header(await reader.readexactly(header_bytes), ipc.Load)
                if not told.done():
                    told.set_result(load)

        async with await self._listening(CONTROL_NAME, hear):
            load = await told
        (self.spec.socket_dir / CONTROL_NAME).unlink(missing_ok=True)
        return load.warmup

    def end(self, reason: str) -> None:
        """Stop at once, as a killed process would: connections break, the socket's file stays behind."""
        if not self.running:
            return
        self.running = False
        self.ending = Ending(137, oom_killed=True) if reason == OUT_OF_MEMORY else Ending(lines=[reason])
        self.log.append(reason)
        if self._loading is not None and self._loading is not asyncio.current_task():
            self._loading.cancel()
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            writer.writelines(ipc.frame(HELLO, []))
            while self.running:
                # As long as its gateway likes, as a worker would wait: the end of the sandbox ends the connection.
                header_bytes, body_bytes = ipc.parse_prefix(await reader.readexactly(ipc.PREFIX.size))
                header, body = await reader.readexactly(header_bytes), await reader.readexactly(body_bytes)
                self.calls += 1
                writer.writelines(ipc.frame(*answers_of(ipc.parse_header(header, ipc.Batch), memoryview(body))))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, codec.Malformed):
            pass  # the peer went away or does not speak our protocol; its connection alone ends
        finally:
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class FakeWorld:
    """What outlives a driver, and the script.

    ``start_delay_s`` passes between ``start``, which returns at once as a real driver's does, and a sandbox that listens.
    A method of the driver that is named in ``fail`` raises DriverFailed; ``probe`` returns a reason instead. One that is named in
    ``hang`` does not return before it is not.
    """

    def __init__(self) -> None:
        self.start_delay_s = 0.0
        self.fail: set[str] = set()
        self.hang: set[str] = set()
        self.sandboxes: dict[str, FakeSandbox] = {}

    def kill(self, name: str, reason: str) -> None:
        """Make a sandbox exit now; it stays listed with ``reason`` until it is stopped. KeyError for an unknown one."""
        self.sandboxes[name].end(reason)

    def close(self) -> None:
        """End and forget every sandbox, in the event loop that they were started in."""
        for sandbox in self.sandboxes.values():
            sandbox.end("the world ended")
        self.sandboxes.clear()


class FakeDriver:
    """See Driver for what each method promises, and FakeWorld for how to make it break them."""

    def __init__(self, world: FakeWorld, *, rung: Rung = "process", name: str = "fake") -> None:
        self.name = name
        self.rung = rung
        self.limits = "none"
        self._world = world

    async def _hang(self, method: str) -> None:
        while method in self._world.hang:
            await asyncio.sleep(0.01)

    async def _follow_script(self, method: str) -> None:
        await self._hang(method)
        if method in self._world.fail:
            raise DriverFailed(f"{method} fails, as the script says")

    async def probe(self) -> str:
        """See Driver."""
        await self._hang("probe")
        return "the script says that this driver does not work" if "probe" in self._world.fail else ""

    async def start(self, spec: SandboxSpec) -> None:
        """See Driver."""
        await self._follow_script("start")
        earlier = self._world.sandboxes.get(spec.name)
        if earlier is not None and earlier.running:
            return
        if not spec.socket_dir.is_dir():
            raise DriverFailed(f"{spec.socket_dir}: no such directory")
        sandbox = self._world.sandboxes[spec.name] = FakeSandbox(spec)
        sandbox.begin(self._world.start_delay_s)

    async def stop(self, name: str, *, grace_s: float) -> None:  # noqa: ARG002 - nothing here needs a moment to end
        """See Driver."""
        await self._follow_script("stop")
        sandbox = self._world.sandboxes.pop(name, None)
        if sandbox is not None:
            sandbox.end("stopped")

    async def sandboxes(self) -> list[Sandbox]:
        """See Driver."""
        await self._follow_script("sandboxes")
        return [Sandbox(name, sandbox.ending) for name, sandbox in sorted(self._world.sandboxes.items())]

    async def stats(self, name: str) -> Usage | None:
        """See Driver; the figures are made up, and grow with each call that was served."""
        await self._follow_script("stats")
        sandbox = self._world.sandboxes.get(name)
        if sandbox is None or not sandbox.running:
            return None
        return Usage(memory_bytes=MEMORY_BYTES, cpu_seconds=0.01 * (1 + sandbox.calls))

    async def logs(self, name: str, *, lines: int, after: str = "") -> LogLines:
        """See Driver; a position is a number of lines."""
        await self._follow_script("logs")
        sandbox = self._world.sandboxes.get(name)
        if sandbox is None or lines <= 0:
            return LogLines([])
        begin = int(after) if after.isdigit() else 0
        return LogLines(sandbox.log[begin:][-lines:], str(len(sandbox.log)))

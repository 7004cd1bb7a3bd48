"""What an idle replica holds in memory on every rung, beside Python with ONNX Runtime and the model but nothing of ours, and a bare worker.

``python -m bench.replica_memory [--rungs bubblewrap docker gvisor] [--replicas 1 4] [--idle-s S]``

Proportional set sizes (PSS): what only these processes hold, and their share of what they hold with others, so that replicas which share
pages of one file count them once in all. Everything that there is only because the sandbox is counts: its init, bubblewrap's own process,
all of gVisor's; the engine's shim for each container stands beside it. ``charged_mb`` is what the control group says, which the limit is
compared with. The speech detector is loaded, one call was answered, then nobody asked for ``--idle-s``. One kind runs at a time. Other
processes of this machine's Python make shares smaller: ``uss_mb`` is what nobody else holds.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from bench.report import report
from bench.sandboxes import RUNGS, Box, Question, bare_worker, first_answer, run, running, scratch, speech, wait_for_socket
from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.ports import SOCKET_NAME
from skerry.wire.messages import ModelRef

SHIM = "containerd-shim"
WARM_IDLE_S = 2.0
PLAIN = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], sess_options=options, providers=["CPUExecutionProvider"])
session.run(None, {"input": np.zeros((1, 576), "f4"), "state": np.zeros((2, 1, 128), "f4"), "sr": np.array(16000, "i8")})
print("ready", flush=True)
time.sleep(3600)
"""


class Held(msgspec.Struct):
    """Sums over processes, in KiB."""

    pss: int = 0
    rss: int = 0
    uss: int = 0
    processes: int = 0

    def add(self, pid: int) -> None:
        """Count a process; one that has ended holds nothing."""
        try:
            lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
            kib = {fields[0]: int(fields[1]) for fields in lines}
        except OSError:
            return
        self.pss += kib["Pss:"]
        self.rss += kib["Rss:"]
        self.uss += kib["Private_Clean:"] + kib["Private_Dirty:"]
        self.processes += 1

    def figures(self, replicas: int = 1) -> dict[str, object]:
        """For one replica, in 10**6 bytes."""
        sizes = {"pss_mb": self.pss, "rss_mb": self.rss, "uss_mb": self.uss}
        found: dict[str, object] = {name: round(kib * 1024 / 1e6 / replicas, 1) for name, kib in sizes.items()}
        return {**found, "processes": self.processes // replicas}


def of(pids: Iterable[int]) -> Held:
    """What these processes hold."""
    held = Held()
    for pid in pids:
        held.add(pid)
    return held


def tree() -> dict[int, list[int]]:
    """Every process's children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    return children


def below(pid: int, children: dict[int, list[int]]) -> list[int]:
    """What descends from a process."""
    found = list(children.get(pid, []))
    for child in children.get(pid, []):
        found += below(child, children)
    return found


def processes(box: Box, sandbox: str) -> tuple[list[int], list[int]]:
    """Those of a sandbox, and those of the engine that there are for it alone."""
    children = tree()
    if box.rung == "bubblewrap":
        init = msgspec.json.decode((box.config.state_dir / "bubblewrap" / sandbox / "handle.json").read_bytes())["pid"]
        maker = next(parent for parent, ones in children.items() if init in ones)
        return [maker, *below(maker, children)], []
    import docker

    with contextlib.closing(docker.APIClient(f"unix://{box.config.docker_socket}")) as engine:
        (listed,) = engine.containers(filters={"label": f"skerry.name={sandbox}"})
    shims = [pid for pid in children.get(1, []) if _is_shim_of(pid, listed["Id"])]
    return [pid for shim in shims for pid in below(shim, children)], shims


def _is_shim_of(pid: int, container: str) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return SHIM.encode() in command and container.encode() in command
    return False


async def of_sandboxes(box: Box, names: list[str]) -> dict[str, object]:
    """Sums over these sandboxes, for each of them."""
    inside, beside = Held(), Held()
    for name in names:
        mine, shims = processes(box, name)
        for pid in mine:
            inside.add(pid)
        for pid in shims:
            beside.add(pid)
    charged = [usage.memory_bytes for name in names if (usage := await box.driver.stats(name)) is not None]
    found = inside.figures(len(names)) | {"charged_mb": round(sum(charged) / 1e6 / len(names), 1)}
    return found | ({"shim_pss_mb": round(beside.pss * 1024 / 1e6 / len(names), 1)} if beside.processes else {})


async def of_replicas(folder: Path, rung: str, replicas: int, spoken: tuple[ModelRef, Path, Question], idle_s: float) -> dict[str, object]:
    """That many replicas of one box, idle."""
    model, file, question = spoken
    async with running(Box(folder / f"{rung}-{replicas}", rung, model=model, file=file)) as box:
        box.want(replicas)
        for path in await box.sockets(replicas):
            await asyncio.to_thread(first_answer, path, question)
        await asyncio.sleep(idle_s)
        return await of_sandboxes(box, list(box.slots.all()))


async def of_warm(folder: Path, rung: str, spoken: tuple[ModelRef, Path, Question]) -> dict[str, object]:
    """One that waits for its model."""
    model, file, _ = spoken
    async with running(Box(folder / f"{rung}-warm", rung, model=model, file=file, warm_most=1)) as box:
        box.want(1)
        await box.sockets(1)
        await box.empty()
        await box.warm()
        await asyncio.sleep(WARM_IDLE_S)
        return await of_sandboxes(box, list(box.slots.all()))


async def plain(folder: Path, file: Path, count: int, idle_s: float) -> dict[str, object]:
    """Python, ONNX Runtime and the model, without anything of ours."""
    started = [_start_plain(folder, file) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)
        await asyncio.sleep(idle_s)
        return of(process.pid for process in started).figures(count)
    finally:
        _end(started)


def _start_plain(folder: Path, file: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in host_runtime.worker_environment(1.0).items() if name != "PYTHONPATH"}
    return subprocess.Popen([sys.executable, "-c", PLAIN, str(file)], stdout=subprocess.PIPE, env=environment, cwd=folder)


async def bare(folder: Path, spoken: tuple[ModelRef, Path, Question], count: int, idle_s: float) -> dict[str, object]:
    """Our worker outside of any sandbox."""
    model, file, question = spoken
    places = [folder / f"bare-{count}-{n}" for n in range(count)]
    started = [bare_worker(place, file, model.warmup) for place in places]
    try:
        for place in places:
            await asyncio.to_thread(wait_for_socket, place / SOCKET_NAME)
            await asyncio.to_thread(first_answer, place / SOCKET_NAME, question)
        await asyncio.sleep(idle_s)
        return of(process.pid for process in started).figures(count)
    finally:
        _end(started)


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.kill()
        process.communicate()


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """One kind after the other."""
    spoken = speech()
    found: dict[str, object] = {"memory_of": "one replica", "idle_s": arguments.idle_s, "page_bytes": os.sysconf("SC_PAGE_SIZE")}
    with scratch() as folder:
        for count in arguments.replicas:
            one: dict[str, object] = {
                "plain": await plain(folder, spoken[1], count, arguments.idle_s),
                "bare": await bare(folder, spoken, count, arguments.idle_s),
            }
            for rung in arguments.rungs:
                one[rung] = await of_replicas(folder, rung, count, spoken, arguments.idle_s)
            found[f"replicas {count}"] = one
        found["warm"] = {rung: await of_warm(folder, rung, spoken) for rung in arguments.rungs}
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--idle-s", type=float, default=5.0)
    arguments = parser.parse_args()
    report("replica_memory", **run(lambda: measure(arguments)))


if __name__ == "__main__":
    main()

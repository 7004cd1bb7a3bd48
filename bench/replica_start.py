"""From "a replica is wanted" to its first correct answer, on every rung, out of a warm sandbox and cold; beside what others take.

``python -m bench.replica_start [--rounds N] [--rungs bubblewrap docker gvisor] [--skip-mlserver] [--skip-docker-run]``

The clock starts where a warden accepts a document that wants one replica more, its model in the store already, and stops at the first
right answer on the socket that the warden's route table names; then the replica is removed again. Every rung has a warden's loop of its
own; the rounds go through all of them in turn, so that all see the same machine, and each begins once that has little else to do, or has
had two seconds to.

Beside them: the worker outside of any sandbox; ``docker run`` by hand of the same worker with the same mounts and limits; MLServer (from
PyPI, in an environment of its own below ``.cache``) with one ONNX runtime class and no worker processes, which is its fastest, until the
same answer over its REST API.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.report import report
from bench.sandboxes import (
    CPUS,
    MEMORY_BYTES,
    POLL_S,
    RUNGS,
    WITHIN_S,
    Box,
    Question,
    bare_worker,
    engine_socket,
    first_answer,
    quiet,
    run,
    running,
    scratch,
    speech,
    summary,
    wait_for_socket,
)
from edge_agent.warden.drivers import docker_profile, host_runtime
from edge_agent.warden.drivers.docker import IMAGE, IMAGE_TAG
from edge_agent.warden.ports import MODEL_DIR, MODEL_FILE, SOCKET_DIR, SOCKET_NAME, SandboxSpec
from skerry.confine.policy import FLOOR
from skerry.demo.fleet import free_ports
from skerry.wire.messages import ModelRef

WARM_BAR_S = 0.060
COLD_BARS_S = {"bubblewrap": 0.3, "docker": 0.7, "gvisor": 1.6}
MLSERVER = Path(".cache/bench/mlserver")
MLSERVER_NEEDS = ["mlserver", "uvloop==0.21.*", "onnxruntime"]
RUNTIME = """
import numpy as np, onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Onnx(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(self.settings.parameters.uri, sess_options=options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        feeds = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        names = [one.name for one in self.session.get_outputs()]
        outputs = [NumpyCodec.encode_output(n, np.asarray(v)) for n, v in zip(names, self.session.run(None, feeds))]
        return InferenceResponse(model_name=self.name, outputs=outputs)
"""

Round = Callable[[], Awaitable[float]]


async def timed_start(box: Box, question: Question, *, is_warm: bool) -> float:
    """One round of one rung: start, first answer, and away again."""
    if is_warm:
        await box.warm()
    started = time.perf_counter()
    box.want(1)
    (path,) = await box.sockets(1)
    await asyncio.to_thread(first_answer, path, question)
    took_s = time.perf_counter() - started
    if box.took_warm != is_warm:
        raise RuntimeError(f"{box.rung}: the replica was {'cold' if is_warm else 'warm'}")
    await box.empty()
    return took_s


async def timed_bare(folder: Path, file: Path, model: ModelRef, question: Question) -> float:
    """The same worker outside of any sandbox, started by nobody's loop."""

    def work() -> float:
        started = time.perf_counter()
        process = bare_worker(folder / "bare", file, model.warmup)
        try:
            wait_for_socket(folder / "bare" / SOCKET_NAME)
            first_answer(folder / "bare" / SOCKET_NAME, question)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder / "bare")

    return await asyncio.to_thread(work)


# -- docker run, by hand


def docker_command(spec: SandboxSpec, profile: Path) -> list[str]:
    """The driver's container as the engine's own command line makes it."""
    mounts = [f"{path}:{path}:ro" for path in host_runtime.system_mounts()]
    mounts += [f"{spec.model_dir}:{MODEL_DIR}:ro", f"{spec.socket_dir}:{SOCKET_DIR}"]
    return [
        *("docker", "--host", f"unix://{engine_socket()}", "run", "--detach", "--name", spec.name, "--init", "--network", "none"),
        *("--ipc", "private", "--read-only", "--cap-drop", "ALL", "--user", f"{spec.uid}:{spec.uid}", "--workdir", "/"),
        *("--security-opt", "no-new-privileges", "--security-opt", f"seccomp={profile}", "--pids-limit", str(spec.pids_max)),
        *("--memory", str(spec.memory_bytes), "--memory-swap", str(spec.memory_bytes), "--cpus", str(spec.cpus)),
        *("--ulimit", f"nofile={spec.files_max}", "--ulimit", f"fsize={spec.file_max_bytes}", "--ulimit", "core=0"),
        *("--shm-size", str(spec.tmp_max_bytes), "--tmpfs", f"/tmp:size={spec.tmp_max_bytes},mode=1777,nosuid,nodev,noexec"),
        *(word for mount in mounts for word in ("--volume", mount)),
        *(word for name, value in spec.environment.items() for word in ("--env", f"{name}={value}")),
        f"{IMAGE}:{IMAGE_TAG}",
        *spec.argv,
    ]


async def timed_docker_run(folder: Path, file: Path, model: ModelRef, question: Question) -> float:
    """One round of it."""
    place = folder / "by-hand"
    for part in (place / "model", place / "run"):
        part.mkdir(parents=True, exist_ok=True)
    (place / "run").chmod(0o777)
    with contextlib.suppress(FileExistsError):
        (place / "model" / MODEL_FILE).hardlink_to(file)
    (place / "seccomp.json").write_text(docker_profile.profile(FLOOR, platform.machine()))
    argv = host_runtime.with_model(host_runtime.worker_argv(CPUS), model.warmup)
    spec = SandboxSpec(
        name=f"skerry-bench-{folder.name}", argv=argv, environment=host_runtime.worker_environment(CPUS), model_dir=place / "model",
        socket_dir=place / "run", memory_bytes=MEMORY_BYTES, cpus=CPUS, uid=65534,
    )  # fmt: skip
    path = place / "run" / SOCKET_NAME

    def work() -> float:
        started = time.perf_counter()
        subprocess.run(docker_command(spec, place / "seccomp.json"), check=True, stdout=subprocess.DEVNULL, timeout=WITHIN_S)
        while not path.exists():
            if time.perf_counter() - started > WITHIN_S:
                raise RuntimeError("docker run: no worker")
            time.sleep(POLL_S)
        first_answer(path, question)
        return time.perf_counter() - started

    try:
        return await asyncio.to_thread(work)
    finally:
        remove = ["docker", "--host", f"unix://{engine_socket()}", "rm", "--force", "--volumes", spec.name]
        await asyncio.to_thread(subprocess.run, remove, check=False, stdout=subprocess.DEVNULL, timeout=WITHIN_S)
        path.unlink(missing_ok=True)


# -- MLServer


def prepare_mlserver(file: Path) -> None:
    """An environment of its own, made once, and a folder with one model."""
    if not (MLSERVER / "venv" / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(MLSERVER / "venv")], check=True)
        python = MLSERVER / "venv" / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *MLSERVER_NEEDS], check=True)
        subprocess.run([str(python), "-m", "compileall", "-q", str(MLSERVER / "venv" / "lib")], check=False)
        (MLSERVER / "venv" / "ready").touch()
    served = MLSERVER / "served"
    served.mkdir(exist_ok=True)
    (served / "onnx_runtime_class.py").write_text(RUNTIME)
    settings = {"name": "speech", "implementation": "onnx_runtime_class.Onnx", "parameters": {"uri": str(file)}}
    (served / "model-settings.json").write_text(json.dumps(settings))


def mlserver_body(question: Question) -> bytes:
    """The question as the protocol's JSON."""
    inputs = []
    for tensor in question.tensors:
        data = memoryview(bytes(tensor.data)).cast("f" if tensor.datatype == "FP32" else "q").tolist()
        inputs.append({"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype, "data": data})
    return json.dumps({"inputs": inputs}).encode()


def ask_mlserver(port: int, body: bytes, question: Question) -> bool:
    """Ask once; whether it was answered, and right."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v2/models/speech/infer", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    except OSError:
        return False
    finally:
        connection.close()
    if response.status != 200:
        return False
    question.check_numbers([number for output in json.loads(answer)["outputs"] for number in output["data"]])
    return True


async def timed_mlserver(question: Question) -> float:
    """One round of it."""
    http_port, grpc_port, metrics_port = free_ports(3)
    served = MLSERVER / "served"
    ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    (served / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports}))
    body = mlserver_body(question)

    def work() -> float:
        started = time.perf_counter()
        command = [str((MLSERVER / "venv" / "bin" / "mlserver").absolute()), "start", "."]
        with (MLSERVER / "log").open("wb") as said:
            server = subprocess.Popen(command, cwd=served, stdout=said, stderr=said, env={"PATH": "/usr/bin:/bin"})
        try:
            while not ask_mlserver(http_port, body, question):
                if time.perf_counter() - started > WITHIN_S or server.poll() is not None:
                    raise RuntimeError(f"MLServer does not answer: see {MLSERVER / 'log'}")
                time.sleep(POLL_S)
            return time.perf_counter() - started
        finally:
            server.kill()
            server.wait()

    return await asyncio.to_thread(work)


# -- all of them in turn


async def all_rounds(rounds: dict[str, Round], times: int) -> tuple[dict[str, list[float]], int]:
    """Each once outside of the count, then all in turn; and how many began while other work kept the machine busy."""
    took_s: dict[str, list[float]] = {name: [] for name in rounds}
    disturbed = 0
    for index in range(times + 1):
        for name, one in rounds.items():
            is_quiet = await quiet()
            seconds = await one()
            if index:
                took_s[name].append(seconds)
                disturbed += not is_quiet
        sys.stderr.write(f"round {index} of {times}: " + ", ".join(f"{n} {s[-1]:.3f}" for n, s in took_s.items() if s) + "\n")
    return took_s, disturbed


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Put all that is asked for in turn and sum up."""
    model, file, question = speech()
    rounds: dict[str, Round] = {}
    bars: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(scratch())
        for rung in arguments.rungs:
            cold = await stack.enter_async_context(running(Box(folder / f"{rung}-cold", rung, model=model, file=file)))
            rounds[f"{rung} cold"], bars[f"{rung} cold"] = _round(cold, question, is_warm=False), COLD_BARS_S[rung]
            warm = await stack.enter_async_context(running(Box(folder / f"{rung}-warm", rung, model=model, file=file, warm_most=1)))
            await _first_start(warm, question)
            rounds[f"{rung} warm"], bars[f"{rung} warm"] = _round(warm, question, is_warm=True), WARM_BAR_S
        if not arguments.skip_docker_run and shutil.which("docker") and engine_socket().exists():
            rounds["docker run"] = lambda: timed_docker_run(folder, cold.store.model_path(model.sha256), model, question)
        if not arguments.skip_mlserver:
            await asyncio.to_thread(prepare_mlserver, file)
            rounds["mlserver"] = lambda: timed_mlserver(question)
        rounds["bare worker"] = lambda: timed_bare(folder, file, model, question)
        took_s, disturbed = await all_rounds(rounds, arguments.rounds)
    figures: dict[str, object] = {name: summary(seconds, bars.get(name)) for name, seconds in took_s.items()}
    return {"rounds": arguments.rounds, "begun_on_a_busy_machine": f"{disturbed} of {len(rounds) * arguments.rounds}", **figures}


def _round(box: Box, question: Question, *, is_warm: bool) -> Round:
    return lambda: timed_start(box, question, is_warm=is_warm)


async def _first_start(box: Box, question: Question) -> None:
    """A kind is held ready once a replica of it was started."""
    box.want(1)
    (path,) = await box.sockets(1)
    await asyncio.to_thread(first_answer, path, question)
    await box.empty()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--skip-docker-run", action="store_true")
    parser.add_argument("--skip-mlserver", action="store_true", help="it is installed from the package index on the first run")
    arguments = parser.parse_args()
    report("replica_start", **run(lambda: measure(arguments)))


if __name__ == "__main__":
    main()

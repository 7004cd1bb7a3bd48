"""What gateway and sandbox add to a bare ``InferenceSession.run``: one caller, one connection, binary tensors, both measured in turn.

``python -m bench.added_latency [--driver bubblewrap|docker|gvisor] [--client bare|http.client] [--rounds N]``
"""

import argparse
import asyncio
import contextlib
import http.client
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort

from bench.report import report
from bench.sandboxes import CPUS, MEMORY_BYTES, RUNGS, engine_socket, wait_for_socket
from edge_agent.warden.drivers import host_runtime
from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.drivers.docker import DockerDriver
from edge_agent.warden.ports import MODEL_FILE, SOCKET_NAME, Driver, SandboxSpec
from skerry.cli import catalogue
from skerry.demo.fleet import free_ports
from skerry.demo.story import CACHE, MODELS
from skerry.wire import codec, oip
from skerry.wire.box import LocalReplica, Route, RouteTable


def image_model(path: Path) -> Path:
    """A float image of [1, 3, 224, 224] (602,112 bytes) to ten numbers, so that the transport is what costs."""
    weights = np.zeros((3, 10), "f4")
    graph = oh.make_graph(
        [oh.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0), oh.make_node("MatMul", ["m", "w"], ["y"])],
        "image",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 224, 224])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 10])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), path)
    return path


def bare(model: Path, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """A bare session with the options that the worker uses."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def placed(folder: Path, name: str, model: Path) -> SandboxSpec:
    """A worker's sandbox with its directories, as a warden makes them."""
    place = folder / name
    (place / "model").mkdir(parents=True)
    (place / "run").mkdir()
    (place / "run").chmod(0o777)
    shutil.copy(model, place / "model" / MODEL_FILE)
    return SandboxSpec(
        name=name, argv=host_runtime.with_model(host_runtime.worker_argv(CPUS), []), environment=host_runtime.worker_environment(CPUS),
        model_dir=place / "model", socket_dir=place / "run", memory_bytes=MEMORY_BYTES, cpus=CPUS,
    )  # fmt: skip


@contextlib.contextmanager
def served(folder: Path, driver: Driver, models: dict[str, Path]) -> Iterator[int]:
    """The models in sandboxes behind a gateway of their own; yields its port."""
    routes = []
    for name, model in models.items():
        spec = placed(folder, name, model)
        asyncio.run(driver.start(spec))
        routes.append(Route(name, name, 1, 5000, replicas=[LocalReplica(name, str(spec.socket_dir / SOCKET_NAME))]))
    try:
        for name in models:
            wait_for_socket(folder / name / "run" / SOCKET_NAME)
        (folder / "routes.json").write_bytes(codec.encode(RouteTable(1, routes)))
        (port,) = free_ports(1)
        paths = f'socket = "{folder}/g.sock"\nroutes_file = "{folder}/routes.json"\n'
        (folder / "gateway.toml").write_text(f'node = "bench"\ntier = "edge"\nlisten = "127.0.0.1:{port}"\n{paths}')
        gateway = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.gateway", "--config", str(folder / "gateway.toml")], stdout=subprocess.DEVNULL
        )
        try:
            time.sleep(1.5)
            yield port
        finally:
            gateway.terminate()
            gateway.wait()
    finally:
        for name in models:
            asyncio.run(driver.stop(name, grace_s=1))


def request_of(feeds: dict[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request with these inputs."""
    datatypes = {"float32": "FP32", "int64": "INT64"}
    return oip.render_request([oip.Tensor(n, datatypes[str(v.dtype)], v.shape, v.tobytes()) for n, v in feeds.items()])


def asking_barely(port: int, model: str, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """One request on a kept connection by a caller that costs next to nothing itself; raises unless it was answered."""
    body, headers = request_of(feeds)
    head = [f"POST /v2/models/{model}/infer HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}"]
    request = "\r\n".join([*head, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask() -> bytes:
        connection.sendall(request)
        answer = connection.recv(65536)
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += connection.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer)
        size = int(answer[: end + 2].lower().split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
        while len(answer) < end + 4 + size:
            answer += connection.recv(65536)
        return answer

    return ask


def asking_with_http_client(port: int, model: str, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """The same by Python's own HTTP client, which adds its own work on both ways."""
    body, headers = request_of(feeds)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def ask() -> bytes:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(answer)
        return answer

    return ask


def medians(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median milliseconds of each, taken in turn in blocks of 20, so that both see the same machine."""
    for _ in range(50):
        first()
        second()
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds // 20):
        for index, work in enumerate((first, second)):
            for _ in range(20):
                started = time.perf_counter()
                work()
                took[index].append((time.perf_counter() - started) * 1000)
    return statistics.median(took[0]), statistics.median(took[1])


def driver_called(name: str, folder: Path) -> Driver:
    """The driver of that name, its state below ``folder``."""
    if name == "bubblewrap":
        return BubblewrapDriver(folder / "drivers")
    runtime = "runsc" if name == "gvisor" else ""
    return DockerDriver(folder / "drivers", socket=engine_socket(), runtime=runtime, owner=f"bench-{folder.name}")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=RUNGS, default="bubblewrap")
    parser.add_argument("--client", choices=["bare", "http.client"], default="bare", help="bare: a socket and no HTTP library")
    parser.add_argument("--rounds", type=int, default=2000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sk-"))
    folder.chmod(0o755)
    driver = driver_called(arguments.driver, folder)
    speech = next(manifest for manifest in catalogue.read_catalogue(MODELS) if manifest.name == "speech-detector")
    models = {"speech": catalogue.materialise(speech, CACHE).resolve(), "image": image_model(folder / "image.onnx")}
    feeds: dict[str, dict[str, np.ndarray]] = {
        "speech": {"input": np.zeros((1, 576), "f4"), "state": np.zeros((2, 1, 128), "f4"), "sr": np.array(16000, "i8")},
        "image": {"x": np.random.default_rng(1).random((1, 3, 224, 224), "f4")},
    }
    ask = asking_barely if arguments.client == "bare" else asking_with_http_client
    figures: dict[str, object] = {"client": arguments.client, "driver": arguments.driver, "rounds": arguments.rounds}
    try:
        with served(folder, driver, models) as port:
            for name, bar_ms in (("speech", 0.6), ("image", 1.5)):
                bare_ms, through_ms = medians(bare(models[name], feeds[name]), ask(port, name, feeds[name]), arguments.rounds)
                figures[name] = {
                    "bare_p50_ms": round(bare_ms, 3), "through_p50_ms": round(through_ms, 3),
                    "added_p50_ms": round(through_ms - bare_ms, 3), "bar_ms": bar_ms, "reached": through_ms - bare_ms <= bar_ms,
                }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("added_latency", **msgspec.to_builtins(figures))


if __name__ == "__main__":
    main()

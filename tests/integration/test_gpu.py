"""On a box with an NVIDIA GPU: what is read of it, who may use it, and that a model in a sandbox computes on it."""

import asyncio
import json
import shutil
import stat
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from bench import models
from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.drivers.host_runtime import with_model, worker_argv
from edge_agent.warden.ports import SandboxSpec
from edge_agent.worker.session import CPU_PROVIDER, GPU_PROVIDER
from skerry.runtime import nvml
from skerry.wire import ipc
from skerry.wire.messages import Gpu
from tests.conftest import need, scaling
from tests.contract.test_drivers import absence, spec_of, wait_ready
from tests.integration import box as boxes
from tests.integration.models_of_many_kinds import tensor_of
from tests.integration.test_worker import Client

GPU_MEMORY_BYTES = 2 * 2**30


def asked(*fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    return [cell.strip() for cell in subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split(",")]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = nvml.gpus()
    need("an NVIDIA GPU", "" if found and shutil.which("nvidia-smi") else "this machine has none", is_optional=True)
    return found[0]


@pytest.fixture(scope="module")
def cuda(gpu) -> Gpu:
    need("onnxruntime-gpu", "" if GPU_PROVIDER in ort.get_available_providers() else "not installed", is_optional=True)
    need("bubblewrap", absence("bubblewrap"))
    return gpu


def test_what_is_read_of_a_gpu_is_what_nvidias_own_program_says(gpu):
    uuid, name, memory_mib, driver = asked("uuid", "name", "memory.total", "driver_version")
    assert (gpu.uuid, gpu.name, gpu.driver) == (uuid, name, driver)
    assert gpu.memory_mib == pytest.approx(int(memory_mib), abs=1)
    (sample, *_) = nvml.samples()
    temperature_c, used_mib = map(float, asked("temperature.gpu", "memory.used"))
    assert sample.uuid == uuid
    assert sample.temperature_c == pytest.approx(temperature_c, abs=10)
    assert sample.memory_used_mib == pytest.approx(used_mib, abs=1024)
    assert sample.power_w > 1
    assert 0 <= sample.utilization_ratio <= 1


def test_a_gpus_device_files_are_the_drivers_and_its_own(gpu):
    files = nvml.device_files([gpu.uuid])
    assert "/dev/nvidiactl" in files
    assert sum(path.removeprefix("/dev/nvidia").isdigit() for path in files) == 1
    assert all(stat.S_ISCHR(Path(path).stat().st_mode) for path in files)
    with pytest.raises(nvml.NoSuchGpu):
        nvml.device_files(["GPU-00000000-0000-0000-0000-000000000000"])


class Worker:
    """A worker in bubblewrap, with a GPU or without."""

    def __init__(self, folder: Path, model: Path, gpus: list[str]) -> None:
        self.folder = folder
        self.driver = BubblewrapDriver(folder / "run")
        argv = with_model(worker_argv(2.0), [], gpu_memory_bytes=GPU_MEMORY_BYTES if gpus else 0)
        spec = spec_of(folder, model, name="d-gpu" if gpus else "d-none")
        self.spec: SandboxSpec = msgspec.structs.replace(spec, argv=argv, gpus=gpus, memory_bytes=8 * 2**30, cpus=2.0, file_max_bytes=2**30)

    def __enter__(self) -> "Worker":
        async def start() -> None:
            await self.driver.start(self.spec)
            await wait_ready(self.driver, self.spec)

        asyncio.run(start())
        self.client = Client(self.spec.socket_dir / "worker.sock")
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        asyncio.run(self.driver.stop(self.spec.name, grace_s=0))

    def init_pid(self) -> int:
        return int(json.loads((self.folder / "run" / self.spec.name / "handle.json").read_text())["pid"])

    def devices(self) -> set[str]:
        """What of NVIDIA's its sandbox has."""
        return {path.name for path in Path(f"/proc/{self.init_pid()}/root/dev").iterdir() if path.name.startswith("nvidia")}

    def answer(self, name: str, array: np.ndarray) -> np.ndarray:
        answer, body = self.client.call([tensor_of(name, array)])
        assert answer.error == ""
        (output,), _ = ipc.tensors_of(answer.outputs, memoryview(body), 0, None)
        return np.frombuffer(output.data, "<f4").reshape(output.shape)


@pytest.fixture
def shufflenet(tmp_path) -> models.Model:
    return models.model(tmp_path, "shufflenet")


def test_a_model_in_a_sandbox_computes_on_the_gpu_that_it_was_given_and_its_answer_is_the_processors(cuda, folder, shufflenet):
    feed = {name: np.random.default_rng(1).standard_normal(array.shape, "f4") for name, array in shufflenet.feeds.items()}
    ((name, array),) = feed.items()
    (expected, *_) = ort.InferenceSession(str(shufflenet.file), providers=[CPU_PROVIDER]).run(None, feed)
    with Worker(folder, shufflenet.file, [cuda.uuid]) as worker:
        assert worker.client.hello.provider == GPU_PROVIDER
        assert "seccomp" in worker.client.hello.confinement
        assert worker.devices() == {Path(path).name for path in nvml.device_files([cuda.uuid])}
        np.testing.assert_allclose(worker.answer(name, array), expected, rtol=5e-2, atol=5e-2)
        pids = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=30
        ).stdout.split()
        assert pids, "nobody computes on the GPU"


def test_a_sandbox_that_was_given_no_gpu_has_none(cuda, folder, shufflenet):
    with Worker(folder, shufflenet.file, []) as worker:
        assert worker.client.hello.provider == CPU_PROVIDER
        assert worker.devices() == set()


@pytest.fixture
def warden(folder, cuda) -> boxes.Box:
    return boxes.Box(folder, boxes.bubblewrap, memory_bytes=16 * 2**30, gpus={cuda.uuid: cuda.memory_mib * 2**20})


def test_the_warden_gives_a_replica_that_asks_for_gpu_memory_a_gpu_and_says_so(warden, cuda):
    async def scene() -> None:
        async with warden.up():
            wanted = warden.spec(content=scaling(2.0).SerializeToString(), gpu_memory_bytes=GPU_MEMORY_BYTES, memory_bytes=4 * 2**30)
            await warden.want(wanted)
            await warden.until_ready("d-0")
            report = warden.report()
            assert report is not None
            assert report.provider == GPU_PROVIDER
            assert await boxes.answer_of(warden.socket()) == (2, 4, 6)
            too_much = warden.spec("e-0", content=scaling(3.0).SerializeToString(), gpu_memory_bytes=cuda.memory_mib * 2**20)
            await warden.want(wanted, too_much)
            await warden.until(lambda: (found := warden.report("e-0")) is not None and "GPU memory" in found.reason)

    warden.play(scene)

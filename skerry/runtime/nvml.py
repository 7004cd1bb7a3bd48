"""NVIDIA's GPUs through NVML (pynvml). A box without the driver is normal: there are no GPUs then, and nothing is said of it."""

import contextlib
from pathlib import Path
from typing import Any

from skerry.wire.messages import Gpu, GpuSample


def _library() -> Any | None:
    """The initialised library, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def gpus() -> list[Gpu]:
    """Every GPU that the driver shows, memory in MiB."""
    nvml = _library()
    if nvml is None:
        return []
    found = []
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory_mib = nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20
            found.append(Gpu(_text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), memory_mib, driver))
    return found


class NoSuchGpu(Exception):
    """A GPU that can't be handed to a sandbox; the text says why."""


def device_files(uuids: list[str]) -> list[str]:
    """The device files that a process needs for these GPUs, the driver's common ones first. Raises NoSuchGpu."""
    nvml = _library()
    if nvml is None:
        raise NoSuchGpu("there is no NVIDIA driver on this box")
    found = [path for path in ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools") if Path(path).exists()]
    for uuid in uuids:
        if uuid.startswith("MIG-"):
            raise NoSuchGpu(f"{uuid}: a MIG slice can only be handed to a container (rung container)")
        try:
            minor = nvml.nvmlDeviceGetMinorNumber(nvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
        except nvml.NVMLError as exc:
            raise NoSuchGpu(f"{uuid[:80]!r} is not a GPU of this box: {exc}") from exc
        found.append(f"/dev/nvidia{minor}")
    return found


def samples() -> list[GpuSample]:
    """One reading of every GPU; counters that a GPU lacks read 0."""
    nvml = _library()
    if nvml is None:
        return []
    readings = []
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            temperature_c, power_w = 0.0, 0.0
            with contextlib.suppress(nvml.NVMLError):
                temperature_c = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            with contextlib.suppress(nvml.NVMLError):
                power_w = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            readings.append(
                GpuSample(
                    uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                    utilization_ratio=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                    memory_used_mib=nvml.nvmlDeviceGetMemoryInfo(handle).used // 2**20,
                    temperature_c=temperature_c,
                    power_w=power_w,
                )
            )
    return readings

"""A model in ONNX Runtime: load it, warm it up, check what comes in, run it."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from skerry.wire import ipc, oip
from skerry.wire.messages import WarmupTensor

PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
"""Fastest first; ONNX Runtime falls back along the list for operators that a provider lacks."""

DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class LoadFailed(Exception):
    """The model can't be served; the text says why."""


class Refused(ValueError):
    """An input that this model does not take; the text names it."""


def _signature(nodes: list[Any]) -> list[ipc.TensorSpec]:
    specs = []
    for node in nodes:
        if node.type not in DATATYPES:
            raise LoadFailed(f"{node.name!r} has type {node.type}, which the protocol cannot carry")
        extents = tuple(extent if isinstance(extent, int) and extent >= 0 else -1 for extent in node.shape)
        specs.append(ipc.TensorSpec(node.name, DATATYPES[node.type], extents))
    return specs


class Session:
    """A loaded model. Construction loads and warms it up, and raises LoadFailed."""

    def __init__(self, model: Path, *, threads: int, warmup: list[WarmupTensor]) -> None:
        started = time.perf_counter()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is in the answer: a caller must not be able to fill the log
        # A worker that spins between requests would take the cores of its neighbours on a small box.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        available = ort.get_available_providers()
        try:
            self._session = ort.InferenceSession(
                str(model), sess_options=options, providers=[provider for provider in PROVIDERS if provider in available]
            )
            self.inputs = _signature(self._session.get_inputs())
            self.outputs = _signature(self._session.get_outputs())
        except LoadFailed:
            raise
        except Exception as exc:
            raise LoadFailed(f"{model.name}: {str(exc).splitlines()[0][:500]}") from exc
        self.provider: str = self._session.get_providers()[0]
        self.warm = False
        self._warm_up(warmup)
        self.load_ms = (time.perf_counter() - started) * 1000

    def _warm_up(self, warmup: list[WarmupTensor]) -> None:
        """One run, so that no caller pays for first-run set-up. Raises LoadFailed when a run that was asked for fails."""
        by_name = {tensor.name: tensor for tensor in warmup}
        feeds = {}
        for spec in self.inputs:
            # Without a warm-up of its own each free extent is one: not every network takes that, and then there is none.
            given = by_name.pop(spec.name, WarmupTensor(spec.name, [max(extent, 1) if extent != 0 else 0 for extent in spec.shape]))
            if any(extent < 0 for extent in given.shape):
                raise LoadFailed(f"warmup: {given.name!r} has shape {given.shape}, which has a negative extent")
            dtype = object if spec.datatype == "BYTES" else oip.NUMPY_DTYPES[spec.datatype]
            feeds[spec.name] = np.full(given.shape, "" if dtype is object else given.value, dtype=dtype)
        if by_name:
            raise LoadFailed(f"warmup: {sorted(by_name)[0]!r} is not an input of this model, which has {[s.name for s in self.inputs]}")
        try:
            self._session.run(None, feeds)
        except Exception as exc:
            if warmup:
                raise LoadFailed(f"warm-up run failed: {str(exc).splitlines()[0][:500]}") from exc
        else:
            self.warm = True

    def run(self, tensors: list[oip.Tensor], wanted: list[str]) -> list[oip.Tensor]:
        """The outputs named in ``wanted``, all where it is empty. Raises Refused for inputs that the model does not take."""
        feeds = self._feeds(tensors)
        specs = {spec.name: spec for spec in self.outputs}
        unknown = [name for name in wanted if name not in specs]
        if unknown:
            raise Refused(f"outputs: {unknown[0][:80]!r} is not an output of this model, which has {sorted(specs)}")
        names = wanted or list(specs)
        try:
            arrays = self._session.run(names, feeds)
        except Exception as exc:
            # Free extents can contradict each other in ways that only the graph knows.
            is_empty = any(0 in tensor.shape for tensor in tensors)
            if is_empty or "InvalidArgument" in type(exc).__name__ or "INVALID_ARGUMENT" in str(exc):
                raise Refused(f"inputs: {str(exc).splitlines()[0][:500]}") from exc
            raise
        return [_tensor_of(specs[name], array) for name, array in zip(names, arrays, strict=True)]

    def _feeds(self, tensors: list[oip.Tensor]) -> dict[str, Any]:
        given = {tensor.name: tensor for tensor in tensors}
        expected = {spec.name for spec in self.inputs}
        if set(given) != expected:
            raise Refused(f"inputs: this model takes {sorted(expected)}, got {sorted(name[:80] for name in given)}")
        feeds = {}
        for spec in self.inputs:
            tensor = given[spec.name]
            if tensor.datatype != spec.datatype:
                raise Refused(f"input {spec.name!r}: datatype {tensor.datatype} given, the model takes {spec.datatype}")
            fits = len(tensor.shape) == len(spec.shape) and all(
                want in (-1, got) for want, got in zip(spec.shape, tensor.shape, strict=True)
            )
            if not fits:
                raise Refused(f"input {spec.name!r}: shape {list(tensor.shape)} given, the model takes {list(spec.shape)}")
            feeds[spec.name] = _array_of(tensor)
        return feeds


def _array_of(tensor: oip.Tensor) -> Any:
    if tensor.datatype == "BYTES":
        texts = [element.decode(errors="surrogateescape") for element in oip.split_bytes(tensor.data, tensor.name)]
        return np.array(texts, dtype=object).reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=oip.NUMPY_DTYPES[tensor.datatype]).reshape(tensor.shape)


def _tensor_of(spec: ipc.TensorSpec, array: Any) -> oip.Tensor:
    if spec.datatype == "BYTES":
        data: oip.Bytes = oip.join_bytes([str(text).encode(errors="surrogateescape") for text in array.ravel()])
    else:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
    return oip.Tensor(spec.name, spec.datatype, array.shape, data)

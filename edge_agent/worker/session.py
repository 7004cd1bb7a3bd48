"""A model in ONNX Runtime: load it, warm it up, check what comes in, run it. Inputs are read, and large outputs written, where they lie."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from skerry.wire import ipc, oip
from skerry.wire.messages import StateTensor, WarmupTensor

GPU_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
"""ONNX Runtime falls back to the processor for operators that the GPU's provider lacks. TensorRT's is not asked for: it builds an engine
for minutes at every load."""

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


IN_PLACE = frozenset({"FP16", "FP32", "FP64", "INT8", "UINT8"})
"""What may lie in memory that another can write to while the model runs. Whole numbers may be indices, truth values may say how many there
are, and a few numbers may be a size: ONNX Runtime looks at those once and then relies on it, so they are copied."""
IN_PLACE_FROM_BYTES = 16 * 1024
BIND_FROM_BYTES = 128 * 1024
"""Below, to let ONNX Runtime write an output where it belongs takes longer than to copy it there."""

_COPY_TO_BYTES = 4096
"""So small an output is copied in less time than it takes to make a view of it."""
_DTYPES = {datatype: np.dtype(name) for datatype, name in oip.NUMPY_DTYPES.items()}
Arrays = dict[str, Any]
Places = Mapping[str, tuple[tuple[int, ...], int]]
"""Outputs that ONNX Runtime shall write itself: shape and address."""


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


def _is_free_first(specs: list[ipc.TensorSpec]) -> bool:
    return all(spec.datatype != "BYTES" and spec.shape[:1] == (-1,) for spec in specs)


def _known_ahead(inputs: list[Any], outputs: list[Any]) -> dict[str, list[int | tuple[str, int]]]:
    """For the outputs whose shape follows from the inputs': each extent, or the input and the axis that it is equal to.

    A model may give the same name to two extents that differ: ONNX Runtime refuses to write such an output, and ``compute`` learns from it.
    """
    named = {extent: (node.name, axis) for node in inputs for axis, extent in enumerate(node.shape) if isinstance(extent, str) and extent}
    known: dict[str, list[int | tuple[str, int]]] = {}
    for node in outputs:
        extents = [extent if isinstance(extent, int) and extent >= 0 else named.get(extent) for extent in node.shape]
        found = [extent for extent in extents if extent is not None]
        if len(found) == len(extents):
            known[node.name] = found
    return known


def _check_state(state: Sequence[StateTensor], inputs: list[ipc.TensorSpec], outputs: list[ipc.TensorSpec]) -> None:
    """Raises LoadFailed unless each output can become its input."""
    takes, gives = ({spec.name: spec for spec in specs} for specs in (inputs, outputs))
    for pair in state:
        if pair.input not in takes:
            raise LoadFailed(f"state: {pair.input!r} is not an input of this model, which has {sorted(takes)}")
        if pair.output not in gives:
            raise LoadFailed(f"state: {pair.output!r} is not an output of this model, which has {sorted(gives)}")
        into, out_of = takes[pair.input], gives[pair.output]
        if into.datatype != out_of.datatype or into.datatype == "BYTES":
            raise LoadFailed(f"state: {pair.output!r} is {out_of.datatype} and can't become {pair.input!r}, which is {into.datatype}")
        fits = len(into.shape) == len(out_of.shape) and all(
            -1 in (want, got) or want == got for want, got in zip(into.shape, out_of.shape, strict=True)
        )
        if not fits:
            raise LoadFailed(
                f"state: {pair.output!r} has shape {list(out_of.shape)} and can't become {pair.input!r}, which has {list(into.shape)}"
            )
    for ends in ([pair.input for pair in state], [pair.output for pair in state]):
        if len(set(ends)) != len(ends):
            raise LoadFailed(f"state: a tensor is named twice in {ends}")


def _providers(gpu_memory_bytes: int) -> list[Any]:
    """What ONNX Runtime may compute on. What it takes of a GPU's memory for tensors is bounded; the driver's own part of it, some hundred
    MiB, is not."""
    if gpu_memory_bytes == 0 or GPU_PROVIDER not in ort.get_available_providers():
        return [CPU_PROVIDER]
    ort.preload_dlls()  # CUDA and cuDNN lie in Python packages beside ONNX Runtime, where the dynamic loader does not look
    return [(GPU_PROVIDER, {"gpu_mem_limit": str(gpu_memory_bytes), "arena_extend_strategy": "kSameAsRequested"}), CPU_PROVIDER]


class Session:
    """A loaded model. Construction loads and warms it up, and raises LoadFailed."""

    def __init__(
        self, model: Path, *, threads: int, warmup: list[WarmupTensor], state: Sequence[StateTensor] = (), gpu_memory_bytes: int = 0
    ) -> None:
        started = time.perf_counter()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is in the answer: a caller must not be able to fill the log
        # A worker that spins between requests would take the cores of its neighbours on a small box.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(model), sess_options=options, providers=_providers(gpu_memory_bytes))
            takes, gives = self._session.get_inputs(), self._session.get_outputs()
            self.inputs, self.outputs = _signature(takes), _signature(gives)
        except LoadFailed:
            raise
        except Exception as exc:
            raise LoadFailed(f"{model.name}: {str(exc).splitlines()[0][:500]}") from exc
        _check_state(state, self.inputs, self.outputs)
        self.state = list(state)
        self._takes = {spec.name: spec for spec in self.inputs}
        self._specs = {spec.name: spec for spec in self.outputs}
        self._known = {} if self._speaks_bytes() else _known_ahead(takes, gives)
        firsts = {node.shape[0] if node.shape else 1 for node in takes}
        self.batches = not state and len(firsts) == 1 and _is_free_first(self.inputs) and _is_free_first(self.outputs)
        """Whether inputs of several calls can be run together. Two inputs whose first axes have different names may not grow alike."""
        self.provider: str = self._session.get_providers()[0]
        self.warm = False
        self._warm_up(warmup)
        self.load_ms = (time.perf_counter() - started) * 1000

    def _speaks_bytes(self) -> bool:
        return any(spec.datatype == "BYTES" for spec in [*self.inputs, *self.outputs])

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
        names = self.names_of(wanted)
        return [self.tensor_of(name, array) for name, array in zip(names, self.compute(self.feeds_of(tensors), names), strict=True)]

    def names_of(self, wanted: list[str]) -> list[str]:
        """The outputs that a call asks for; raises Refused for one that the model does not have, or twice."""
        if not wanted:
            return list(self._specs)
        unknown = [name for name in wanted if name not in self._specs]
        if unknown:
            raise Refused(f"outputs: {unknown[0][:80]!r} is not an output of this model, which has {sorted(self._specs)}")
        if len(set(wanted)) != len(wanted):
            raise Refused(f"outputs: a name is given twice in {wanted}")
        return wanted

    def feeds_of(self, tensors: list[oip.Tensor], *, left_out: Collection[str] = ()) -> Arrays:
        """The inputs as arrays over their own memory. Those in ``left_out`` need not be there. Raises Refused for what does not fit."""
        feeds = {}
        for tensor in tensors:
            spec = self._takes.get(tensor.name)
            if spec is None or tensor.name in feeds:
                raise self._takes_others(tensors)
            if tensor.datatype != spec.datatype:
                raise Refused(f"input {spec.name!r}: datatype {tensor.datatype} given, the model takes {spec.datatype}")
            if tensor.shape != spec.shape and not _fits(tensor.shape, spec.shape):
                raise Refused(f"input {spec.name!r}: shape {list(tensor.shape)} given, the model takes {list(spec.shape)}")
            feeds[spec.name] = _array_of(tensor)
        if len(feeds) != len(self._takes) and not self._takes.keys() - feeds.keys() <= set(left_out):
            raise self._takes_others(tensors)
        return feeds

    def _takes_others(self, tensors: list[oip.Tensor]) -> Refused:
        return Refused(f"inputs: this model takes {sorted(self._takes)}, got {sorted(tensor.name[:80] for tensor in tensors)}")

    def shape_ahead(self, name: str, feeds: Arrays) -> tuple[int, ...] | None:
        """The shape that an output will have, where ONNX Runtime may write it straight to its place and that pays; else None."""
        extents = self._known.get(name)
        spec = self._specs[name]
        if extents is None or spec.datatype not in IN_PLACE:
            return None
        shape = tuple(extent if isinstance(extent, int) else feeds[extent[0]].shape[extent[1]] for extent in extents)
        return shape if math.prod(shape) * oip.ITEM_BYTES[spec.datatype] >= BIND_FROM_BYTES else None

    def compute(self, feeds: Arrays, names: list[str], places: Places | None = None) -> list[Any]:
        """Run it; the outputs in the order of ``names``, None for those that were written to their place.

        Raises Refused for inputs that contradict each other, and whatever ONNX Runtime raises for what fails here.
        """
        try:
            if not places:
                outputs: list[Any] = self._session.run(names, feeds)
                return outputs
            try:
                return self._run_in_place(feeds, names, places)
            except Exception:  # noqa: BLE001 - a second run without places tells whose fault it is
                outputs = self._session.run(names, feeds)
                self._known = {}
                return outputs
        except Exception as exc:
            # Free extents can contradict each other in ways that only the graph knows.
            is_empty = any(0 in array.shape for array in feeds.values())
            if is_empty or "InvalidArgument" in type(exc).__name__ or "INVALID_ARGUMENT" in str(exc):
                raise Refused(f"inputs: {str(exc).splitlines()[0][:500]}") from exc
            raise

    def _run_in_place(self, feeds: Arrays, names: list[str], places: Places) -> list[Any]:
        """Inputs and outputs are bound in this process's memory: a provider with a memory of its own copies from there and to there."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            if name in places:
                shape, address = places[name]
                binding.bind_output(name, "cpu", 0, _DTYPES[self._specs[name].datatype], shape, address)
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        if self.provider != "CPUExecutionProvider":
            binding.synchronize_outputs()
        values = binding.get_outputs()
        return [None if name in places else value.numpy() for name, value in zip(names, values, strict=True)]

    def zeros_of_state(self) -> Arrays:
        """What a sequence begins with, by input."""
        specs = [self._takes[pair.input] for pair in self.state]
        return {spec.name: np.zeros([1 if extent < 0 else extent for extent in spec.shape], _DTYPES[spec.datatype]) for spec in specs}

    def tensor_of(self, name: str, array: Any) -> oip.Tensor:
        """An output as the protocol carries it."""
        datatype = self._specs[name].datatype
        if datatype == "BYTES":
            data: oip.Bytes = oip.join_bytes([str(text).encode(errors="surrogateescape") for text in array.ravel()])
        elif array.nbytes <= _COPY_TO_BYTES:
            data = array.tobytes()
        else:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return oip.Tensor(name, datatype, array.shape, data)

    def datatype_of(self, name: str) -> str:
        """An output's."""
        return self._specs[name].datatype


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, got) for want, got in zip(wanted, shape, strict=True))


def _array_of(tensor: oip.Tensor) -> Any:
    if tensor.datatype == "BYTES":
        texts = [element.decode(errors="surrogateescape") for element in oip.split_bytes(tensor.data, tensor.name)]
        return np.array(texts, dtype=object).reshape(tensor.shape)
    array: Any = np.ndarray(tensor.shape, _DTYPES[tensor.datatype], tensor.data)
    is_in_place = array.nbytes >= IN_PLACE_FROM_BYTES and tensor.datatype in IN_PLACE and array.flags.aligned
    return array if is_in_place else array.copy()

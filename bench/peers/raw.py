"""What the peers' servers share: the models of a spec, run on the raw bytes of their inputs, one after the other, or on arrays.

Runs in a peer's own environment: numpy, ONNX Runtime and the standard library are all that it imports.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

SPEC = "SKERRY_BENCH_SPEC"
"""Names the file that says what to serve: a JSON list of name, file, inputs (name, dtype, shape)."""


class OnnxModel:
    """One model with the options that everybody is given."""

    def __init__(self, entry: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(entry["file"], sess_options=options, providers=["CPUExecutionProvider"])
        self.name: str = entry["name"]
        self.output_names = [output.name for output in self._session.get_outputs()]
        self._inputs = [(name, np.dtype(dtype), shape, math.prod(shape)) for name, dtype, shape in entry["inputs"]]

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """Arrays in, arrays out."""
        return self._session.run(None, feeds)

    def __call__(self, body: bytes) -> bytes:
        """Bytes in, bytes out."""
        feeds, offset = {}, 0
        for name, dtype, shape, count in self._inputs:
            feeds[name] = np.frombuffer(body, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
        outputs = self._session.run(None, feeds)
        return outputs[0].tobytes() if len(outputs) == 1 else b"".join(output.tobytes() for output in outputs)


def entries() -> list[dict[str, Any]]:
    """What the spec says."""
    found: list[dict[str, Any]] = json.loads(Path(os.environ[SPEC]).read_text())
    return found


def models() -> dict[str, OnnxModel]:
    """All of the spec's models by name."""
    return {entry["name"]: OnnxModel(entry) for entry in entries()}

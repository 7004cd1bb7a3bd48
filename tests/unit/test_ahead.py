"""What a warm worker does before it has a model."""

import numpy as np
import onnx
import onnxruntime as ort

from edge_agent.worker import ahead


def test_the_small_model_is_a_model_and_runs():
    model = ahead.small_model()
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert [output.shape for output in session.run(None, {"x": np.ones(ahead.INPUT_SHAPE, "f4")})] == [(8, 1, 4), (8, 1, 4)]


def test_lengths_over_one_byte_are_written_as_the_format_has_them():
    assert ahead._varint(0) == b"\x00"
    assert ahead._varint(127) == b"\x7f"
    assert ahead._varint(300) == b"\xac\x02"


def test_preparing_never_fails(monkeypatch):
    ahead.prepare()
    monkeypatch.setattr(ahead, "small_model", lambda: b"no model")
    monkeypatch.setattr(ahead, "_libc", object())  # a C library without mallopt
    ahead.prepare()
    ahead.give_back_soon()

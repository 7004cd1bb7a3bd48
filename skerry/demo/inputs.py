"""What the demo's models are tried on, with the truth: a recorded conversation with its transcript of who spoke when, and lines of
text set in a real font.
"""

import wave
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from skerry.cli import catalogue
from skerry.wire import oip

SAMPLE_RATE_HZ = 16_000
WINDOW = 512
"""Samples that the speech detector judges at a time, 32 ms."""
CONTEXT = 64
"""Samples of the window before that it wants to see again."""
LINE_HEIGHT = 48

_WHEEL = {"requirement": "pyannote.audio==3.3.2", "archive_sha256": "23e0dcedda920cb2e154e146bcd9663289ee7942d0e012663dad76f2e571ebeb"}
RECORDING = catalogue.Source(
    **_WHEEL,
    file="pyannote/audio/sample/sample.wav",
    sha256="c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
    size_bytes=960104,
)
"""Thirty seconds of two people on a telephone (package licence: MIT)."""
TRANSCRIPT = catalogue.Source(
    **_WHEEL,
    file="pyannote/audio/sample/sample.rttm",
    sha256="d78fe62c69d8e6dcbb42c26adfce83faccb374c5a1e6d987fe37f85f1c173c87",
    size_bytes=596,
)
"""Who spoke when, as people heard it: RTTM, NIST's Rich Transcription Time Marked format."""

TEXTS = [
    "BEST BEFORE 2027-03-14",
    "LOT 48213-B",
    "Invoice No. 90417",
    "EXIT 42 NORTH",
    "Pallet 7 of 12",
    "Wheel 0316 OK",
    "CAUTION: HOT SURFACE",
    "Dock 19 closed",
]


class Recording(msgspec.Struct, frozen=True):
    """Sound from -1 to 1 at SAMPLE_RATE_HZ, and for each whole window whether somebody speaks in it."""

    samples: NDArray[np.float32]
    speech: NDArray[np.bool_]


def fetch(folder: Path) -> None:
    """Have the recording and its transcript in ``folder``, verified. Raises CatalogueError."""
    catalogue.fetch(RECORDING, folder / "conversation.wav")
    catalogue.fetch(TRANSCRIPT, folder / "conversation.rttm")


def read_recording(folder: Path) -> Recording:
    """The recording that ``fetch`` left."""
    with wave.open(str(folder / "conversation.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)
    speech = np.zeros(len(samples) // WINDOW, bool)
    for line in (folder / "conversation.rttm").read_text().splitlines():
        fields = line.split()
        start_s, length_s = float(fields[3]), float(fields[4])
        first, last = (int(at_s * SAMPLE_RATE_HZ / WINDOW) for at_s in (start_s, start_s + length_s))
        speech[first : last + 1] = True
    return Recording(samples, speech)


def window_tensors(recording: Recording, index: int, state: oip.Tensor | None) -> list[oip.Tensor]:
    """The speech detector's inputs for one window; ``state`` is what it gave for the window before."""
    start = index * WINDOW
    before = recording.samples[start - CONTEXT : start] if index else np.zeros(CONTEXT, np.float32)
    sound = np.concatenate([before, recording.samples[start : start + WINDOW]])
    return [
        tensor_of("input", sound[None, :]),
        oip.Tensor("state", "FP32", (2, 1, 128), state.data if state is not None else bytes(4 * 2 * 128)),
        oip.Tensor("sr", "INT64", (), SAMPLE_RATE_HZ.to_bytes(8, "little")),
    ]


def tensor_of(name: str, values: NDArray[np.float32]) -> oip.Tensor:
    """A float tensor."""
    return oip.Tensor(name, "FP32", values.shape, np.ascontiguousarray(values).tobytes())


def text_tensor(text: str) -> oip.Tensor:
    """A line of text as the recogniser wants it: [1, 3, 48, width], from -1 to 1."""
    font = ImageFont.load_default(32)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (int(right - left) + 24, LINE_HEIGHT), "white")
    ImageDraw.Draw(image).text((12 - left, LINE_HEIGHT / 2 - (top + bottom) / 2), text, fill="black", font=font)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    return tensor_of("x", pixels)


def read_alphabet(model: Path) -> list[str]:
    """The recogniser's characters, from its own metadata; the first stands for "none" (CTC)."""
    characters = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map["character"]
    return ["", *characters.splitlines(), " "]


def text_of(output: oip.Tensor, alphabet: list[str]) -> str:
    """What the recogniser read: the likeliest character at each step, repeats and "none" left out (greedy CTC decoding)."""
    best = np.frombuffer(output.data, "<f4").reshape(output.shape)[0].argmax(axis=1)
    kept = [index for position, index in enumerate(best) if index and (position == 0 or best[position - 1] != index)]
    return "".join(alphabet[index] for index in kept).strip()


def mistakes(read: str, truth: str) -> int:
    """Characters to insert, delete or change to make one text of the other (Levenshtein's distance)."""
    previous = list(range(len(truth) + 1))
    for row, ours in enumerate(read, 1):
        current = [row]
        for column, theirs in enumerate(truth, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (ours != theirs)))
        previous = current
    return previous[-1]

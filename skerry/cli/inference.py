"""``skerry infer``: one request of the Open Inference Protocol to a box's gateway."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from skerry.cli.client import EXIT_FAILED, EXIT_REFUSED, EXIT_USAGE, Answer, CliError, send
from skerry.wire import oip


def read_npy(path: Path, name: str) -> oip.Tensor:
    """A NumPy file as a tensor; nothing in it is executed. Raises CliError."""
    try:
        values = np.ascontiguousarray(np.load(path, allow_pickle=False, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as exc:
        raise CliError(f"{path}: {exc}", exit_code=EXIT_USAGE) from exc
    datatype = next((known for known, dtype in oip.NUMPY_DTYPES.items() if np.dtype(dtype) == values.dtype), None)
    if datatype is None:
        raise CliError(
            f"{path}: {values.dtype} has no datatype in the protocol", exit_code=EXIT_USAGE, hint=f"one of {', '.join(oip.NUMPY_DTYPES)}"
        )
    return oip.Tensor(name, datatype, values.shape, values.tobytes())


def infer(gateway_url: str, model: str, body: bytes, headers: dict[str, str], *, timeout_s: float) -> Answer:
    """Ask, and raise CliError with the gateway's own words for a refusal."""
    answer = send("POST", f"{gateway_url.rstrip('/')}/v2/models/{model}/infer", headers=headers, body=body, timeout_s=timeout_s)
    if answer.status == 200:
        return answer
    hint = f"try again in {answer.headers['retry-after']} s" if "retry-after" in answer.headers else ""
    raise CliError(words_of(answer), exit_code=EXIT_REFUSED if answer.status < 500 else EXIT_FAILED, hint=hint)


def words_of(answer: Answer) -> str:
    """The gateway's own words in an answer that is an error."""
    try:
        words: Any = msgspec.json.decode(answer.body)["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        words = f"status {answer.status}"
    return str(words)

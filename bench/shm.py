"""Tensors in system shared memory, by Triton's extension: regions are registered once, then requests and answers carry JSON alone."""

import contextlib
import http.client
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.calls import Target, http_request
from bench.load import Call
from bench.models import DATATYPES, Model

SHM = Path("/dev/shm")
ALIGN = 64


class NotOffered(Exception):
    """The server does not take the regions; the text is what it said."""


def _post(address: str, path: str, body: dict[str, object]) -> None:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise NotOffered(f"{path}: {answer.status} {text[:200].decode(errors='replace')}")


@contextlib.contextmanager
def _region(name: str, size_bytes: int) -> Iterator[mmap.mmap]:
    file = SHM / name
    with file.open("x+b") as opened:
        try:
            os.ftruncate(opened.fileno(), size_bytes)
            with mmap.mmap(opened.fileno(), size_bytes) as mapped:
                yield mapped
        finally:
            file.unlink()


@contextlib.contextmanager
def target(address: str, model: Model) -> Iterator[Target]:
    """Regions of their own for one model, as long as they are asked. Raises NotOffered."""
    arrays = {**model.feeds}
    outputs = dict(zip(model.output_names, model.truth, strict=True))
    places: dict[str, int] = {}
    end = 0
    for name, array in [*arrays.items(), *outputs.items()]:
        places[name] = end
        end += -(-array.nbytes // ALIGN) * ALIGN
    name = f"skerry-bench-{os.getpid()}-{model.name}"
    with _region(name, end) as mapped:
        mapped[:] = bytes(end)  # whoever touches a page first is who it is counted to
        for key, array in arrays.items():
            mapped[places[key] : places[key] + array.nbytes] = array.tobytes()
        _post(address, f"/v2/systemsharedmemory/region/{name}/register", {"key": f"/{name}", "offset": 0, "byte_size": end})

        def where(key: str, array: np.ndarray) -> dict[str, object]:
            return {"shared_memory_region": name, "shared_memory_offset": places[key], "shared_memory_byte_size": array.nbytes}

        body = {
            "inputs": [
                {"name": key, "shape": list(array.shape), "datatype": DATATYPES[str(array.dtype)], "parameters": where(key, array)}
                for key, array in arrays.items()
            ],
            "outputs": [{"name": key, "parameters": where(key, array)} for key, array in outputs.items()],
        }

        def check(_: bytes, __: bytes) -> None:
            model.check([np.frombuffer(mapped[places[key] : places[key] + a.nbytes], a.dtype) for key, a in outputs.items()])

        request = http_request(address, f"/v2/models/{model.name}/infer", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            yield Target(Call("http", address, request), check)
        finally:
            with contextlib.suppress(NotOffered, OSError):
                _post(address, f"/v2/systemsharedmemory/region/{name}/unregister", {})

"""LitServe: each model at a path of its own; the body's bytes go to the worker's process as they are."""

import sys
from typing import Annotated

import litserve
import raw
from fastapi import Body, Response


class Served(litserve.LitAPI):
    """One model of the spec."""

    def __init__(self, name: str) -> None:
        super().__init__(api_path=f"/raw/{name}")
        self._name = name

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's own signature
        """Load it, in the worker's process."""
        self._model = raw.models()[self._name]

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        """The inputs."""
        return request

    def predict(self, x: bytes) -> bytes:
        """One call."""
        return self._model(x)

    def encode_response(self, output: bytes) -> Response:
        """The outputs."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    port, replicas = int(sys.argv[1]), int(sys.argv[2])
    server = litserve.LitServer(
        [Served(entry["name"]) for entry in raw.entries()], accelerator="cpu", workers_per_device=replicas, timeout=False, fast_queue=True
    )
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", access_log=False, generate_client_file=False)

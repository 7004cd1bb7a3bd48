"""KServe's own Python server with a custom model, asked over gRPC with raw contents.

Its further worker processes speak REST alone: for more than one replica the model is run in threads, so that every core is used.
"""

import asyncio
import sys

import raw
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

DATATYPES = {"float32": "FP32", "int64": "INT64"}


class Served(Model):
    """One model of the spec."""

    def __init__(self, model: raw.OnnxModel, replicas: int) -> None:
        super().__init__(model.name)
        self._model = model
        self._in_threads = replicas > 1
        self.ready = True

    def load(self) -> bool:
        """It is loaded already."""
        return True

    async def predict(self, payload: InferRequest, headers: object = None, response_headers: object = None) -> InferResponse:  # noqa: ARG002 - KServe's own signature
        """One call."""
        feeds = {entry.name: entry.as_numpy() for entry in payload.inputs}
        arrays = await asyncio.to_thread(self._model.run, feeds) if self._in_threads else self._model.run(feeds)
        outputs = []
        for name, array in zip(self._model.output_names, arrays, strict=True):
            output = InferOutput(name, list(array.shape), DATATYPES[str(array.dtype)])
            output.set_data_from_numpy(array, binary_data=True)
            outputs.append(output)
        return InferResponse(payload.id, self.name, outputs)


if __name__ == "__main__":
    port, replicas = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    ModelServer(http_port=port, grpc_port=port + 1, workers=1, enable_grpc=True, access_log_format=None).start(
        [Served(model, replicas) for model in raw.models().values()]
    )

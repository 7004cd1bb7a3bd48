"""MLServer with a runtime of our own, its settings written here; it is asked by REST in JSON and by gRPC with raw contents."""

import json
import os
import sys
from pathlib import Path

import raw
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Served(MLModel):
    """One model of the spec."""

    async def load(self) -> bool:
        """Load it, in whichever process runs it."""
        self._model = raw.models()[self.name]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One call."""
        arrays = self._model.run({entry.name: NumpyCodec.decode_input(entry) for entry in payload.inputs})
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(self._model.output_names, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def write_settings(folder: Path, *, port: int, replicas: int) -> None:
    """What ``mlserver start`` reads; with one replica the models are run in the server's own process, which is faster."""
    settings = {
        "host": "127.0.0.1", "http_port": port, "grpc_port": port + 1, "metrics_endpoint": None, "debug": False, "gzip_enabled": False,
        "parallel_workers": replicas if replicas > 1 else 0, "environments_dir": str(folder / "environments"),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    for entry in raw.entries():
        place = folder / entry["name"]
        place.mkdir()
        model = {"name": entry["name"], "implementation": "mlserver_server.Served", "parameters": {"uri": entry["file"]}}
        (place / "model-settings.json").write_text(json.dumps(model))


if __name__ == "__main__":
    scratch = Path(sys.argv[3])
    write_settings(scratch, port=int(sys.argv[1]), replicas=int(sys.argv[2]))
    program = str(Path(sys.executable).with_name("mlserver"))
    os.execv(program, [program, "start", str(scratch)])

"""An MLServer runtime that serves the model at /model/model.onnx with ONNX Runtime."""

import asyncio

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor

DATATYPES = {"tensor(float)": "FP32"}


def described(node) -> MetadataTensor:
    return MetadataTensor(
        name=node.name, datatype=DATATYPES[node.type], shape=[extent if isinstance(extent, int) else -1 for extent in node.shape]
    )


class OnnxModel(MLModel):
    """One session; a call runs in a thread."""

    async def load(self) -> bool:
        self._session = onnxruntime.InferenceSession("/model/model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = [described(node) for node in self._session.get_inputs()]
        self.outputs = [described(node) for node in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        wanted = [output.name for output in payload.outputs or self.outputs]
        arrays = await asyncio.to_thread(self._session.run, wanted, feeds)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(wanted, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)

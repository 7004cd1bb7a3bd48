"""The messages of ``inference.GRPCInferenceService`` as data, and the classes made of them: there is no generated code.

Sources: kserve/open-inference-protocol ``specification/protocol/open_inference_grpc.proto``; Triton's ``grpc_service.proto`` and
``model_config.proto``, of which the configuration has the fields that we fill. The classes live in a descriptor pool of their own:
another copy of the protocol in the same process, Triton's client's say, does not clash with them.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

Message = Any
"""An instance of one of ``MESSAGES``: protobuf's classes are made at run time, and have no types to check against."""

Fields = dict[str, tuple[int, str]]

_NAME_VERSION: Fields = {"name": (1, "string"), "version": (2, "string")}
_PARAMETERS = "map InferParameter"
_DURATION = "StatisticDuration"
_TENSOR: Fields = {
    "name": (1, "string"),
    "datatype": (2, "string"),
    "shape": (3, "int64[]"),
    "parameters": (4, _PARAMETERS),
    "contents": (5, "InferTensorContents"),
}

FIELDS: dict[str, Fields] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": (1, "string"), "version": (2, "string"), "extensions": (3, "string[]")},
    "ModelReadyRequest": _NAME_VERSION,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ModelMetadataRequest": _NAME_VERSION,
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "string[]"),
        "platform": (3, "string"),
        "inputs": (4, "ModelMetadataResponse.TensorMetadata[]"),
        "outputs": (5, "ModelMetadataResponse.TensorMetadata[]"),
    },
    "ModelMetadataResponse.TensorMetadata": {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64[]")},
    "InferParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "double_param": (4, "double"),
        "uint64_param": (5, "uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "bool[]"),
        "int_contents": (2, "int32[]"),
        "int64_contents": (3, "int64[]"),
        "uint_contents": (4, "uint32[]"),
        "uint64_contents": (5, "uint64[]"),
        "fp32_contents": (6, "float[]"),
        "fp64_contents": (7, "double[]"),
        "bytes_contents": (8, "bytes[]"),
    },
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, _PARAMETERS),
        "inputs": (5, "ModelInferRequest.InferInputTensor[]"),
        "outputs": (6, "ModelInferRequest.InferRequestedOutputTensor[]"),
        "raw_input_contents": (7, "bytes[]"),
    },
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, _PARAMETERS)},
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, _PARAMETERS),
        "outputs": (5, "ModelInferResponse.InferOutputTensor[]"),
        "raw_output_contents": (6, "bytes[]"),
    },
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "ModelStreamInferResponse": {"error_message": (1, "string"), "infer_response": (2, "ModelInferResponse")},
    "ModelStatisticsRequest": _NAME_VERSION,
    "ModelStatisticsResponse": {"model_stats": (1, "ModelStatistics[]")},
    "ModelStatistics": {
        "name": (1, "string"),
        "version": (2, "string"),
        "last_inference": (3, "uint64"),
        "inference_count": (4, "uint64"),
        "execution_count": (5, "uint64"),
        "inference_stats": (6, "InferStatistics"),
        "batch_stats": (7, "InferBatchStatistics[]"),
        "memory_usage": (8, "MemoryUsage[]"),
        "response_stats": (9, "map InferResponseStatistics"),
    },
    "StatisticDuration": {"count": (1, "uint64"), "ns": (2, "uint64")},
    "InferStatistics": {
        "success": (1, _DURATION),
        "fail": (2, _DURATION),
        "queue": (3, _DURATION),
        "compute_input": (4, _DURATION),
        "compute_infer": (5, _DURATION),
        "compute_output": (6, _DURATION),
        "cache_hit": (7, _DURATION),
        "cache_miss": (8, _DURATION),
    },
    "InferBatchStatistics": {
        "batch_size": (1, "uint64"),
        "compute_input": (2, _DURATION),
        "compute_infer": (3, _DURATION),
        "compute_output": (4, _DURATION),
    },
    "InferResponseStatistics": {
        "compute_infer": (1, _DURATION),
        "compute_output": (2, _DURATION),
        "success": (3, _DURATION),
        "fail": (4, _DURATION),
        "empty_response": (5, _DURATION),
        "cancel": (6, _DURATION),
    },
    "MemoryUsage": {"type": (1, "string"), "id": (2, "int64"), "byte_size": (3, "uint64")},
    "ModelConfigRequest": _NAME_VERSION,
    "ModelConfigResponse": {"config": (1, "ModelConfig")},
    "ModelConfig": {
        "name": (1, "string"),
        "platform": (2, "string"),
        "version_policy": (3, "ModelVersionPolicy"),
        "max_batch_size": (4, "int32"),
        "input": (5, "ModelInput[]"),
        "output": (6, "ModelOutput[]"),
        "instance_group": (7, "ModelInstanceGroup[]"),
        "default_model_filename": (8, "string"),
        "dynamic_batching": (11, "ModelDynamicBatching"),
        "sequence_batching": (13, "ModelSequenceBatching"),
        "parameters": (14, "map ModelParameter"),
        "backend": (17, "string"),
        "model_transaction_policy": (19, "ModelTransactionPolicy"),
    },
    "ModelInput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "format": (3, "ModelInput.Format"),
        "dims": (4, "int64[]"),
        "is_shape_tensor": (6, "bool"),
        "allow_ragged_batch": (7, "bool"),
        "optional": (8, "bool"),
    },
    "ModelOutput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (3, "int64[]"),
        "label_filename": (4, "string"),
        "is_shape_tensor": (6, "bool"),
    },
    "ModelInstanceGroup": {
        "name": (1, "string"),
        "count": (2, "int32"),
        "gpus": (3, "int32[]"),
        "kind": (4, "ModelInstanceGroup.Kind"),
    },
    "ModelVersionPolicy": {
        "latest": (1, "ModelVersionPolicy.Latest"),
        "all": (2, "ModelVersionPolicy.All"),
        "specific": (3, "ModelVersionPolicy.Specific"),
    },
    "ModelVersionPolicy.Latest": {"num_versions": (1, "uint32")},
    "ModelVersionPolicy.All": {},
    "ModelVersionPolicy.Specific": {"versions": (1, "int64[]")},
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, "int32[]"),
        "max_queue_delay_microseconds": (2, "uint64"),
        "preserve_ordering": (3, "bool"),
        "priority_levels": (4, "uint64"),
        "default_priority_level": (5, "uint64"),
    },
    "ModelSequenceBatching": {
        "max_sequence_idle_microseconds": (1, "uint64"),
        "direct": (3, "ModelSequenceBatching.StrategyDirect"),
        "oldest": (4, "ModelSequenceBatching.StrategyOldest"),
        "state": (5, "ModelSequenceBatching.State[]"),
    },
    "ModelSequenceBatching.State": {
        "input_name": (1, "string"),
        "output_name": (2, "string"),
        "data_type": (3, "DataType"),
        "dims": (4, "int64[]"),
    },
    "ModelSequenceBatching.StrategyDirect": {
        "max_queue_delay_microseconds": (1, "uint64"),
        "minimum_slot_utilization": (2, "float"),
    },
    "ModelSequenceBatching.StrategyOldest": {
        "max_candidate_sequences": (1, "int32"),
        "preferred_batch_size": (2, "int32[]"),
        "max_queue_delay_microseconds": (3, "uint64"),
        "preserve_ordering": (4, "bool"),
    },
    "ModelParameter": {"string_value": (1, "string")},
    "ModelTransactionPolicy": {"decoupled": (1, "bool")},
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse": {"models": (1, "RepositoryIndexResponse.ModelIndex[]")},
    "RepositoryIndexResponse.ModelIndex": {
        "name": (1, "string"),
        "version": (2, "string"),
        "state": (3, "string"),
        "reason": (4, "string"),
    },
    "ModelRepositoryParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "bytes_param": (4, "bytes"),
    },
    "RepositoryModelLoadRequest": {
        "repository_name": (1, "string"),
        "model_name": (2, "string"),
        "parameters": (3, "map ModelRepositoryParameter"),
    },
    "RepositoryModelLoadResponse": {},
    "RepositoryModelUnloadRequest": {
        "repository_name": (1, "string"),
        "model_name": (2, "string"),
        "parameters": (3, "map ModelRepositoryParameter"),
    },
    "RepositoryModelUnloadResponse": {},
    "SystemSharedMemoryStatusRequest": {"name": (1, "string")},
    "SystemSharedMemoryStatusResponse": {"regions": (1, "map SystemSharedMemoryStatusResponse.RegionStatus")},
    "SystemSharedMemoryStatusResponse.RegionStatus": {
        "name": (1, "string"),
        "key": (2, "string"),
        "offset": (3, "uint64"),
        "byte_size": (4, "uint64"),
    },
    "SystemSharedMemoryRegisterRequest": {
        "name": (1, "string"),
        "key": (2, "string"),
        "offset": (3, "uint64"),
        "byte_size": (4, "uint64"),
    },
    "SystemSharedMemoryRegisterResponse": {},
    "SystemSharedMemoryUnregisterRequest": {"name": (1, "string")},
    "SystemSharedMemoryUnregisterResponse": {},
}
"""Each message's fields: number and type. ``x[]`` is repeated, ``map x`` goes from strings to x; a dotted name lies within another."""

ONE_OF: dict[str, tuple[str, frozenset[str]]] = {
    "InferParameter": ("parameter_choice", frozenset(FIELDS["InferParameter"])),
    "ModelRepositoryParameter": ("parameter_choice", frozenset(FIELDS["ModelRepositoryParameter"])),
    "ModelVersionPolicy": ("policy_choice", frozenset(FIELDS["ModelVersionPolicy"])),
    "ModelConfig": ("scheduling_choice", frozenset({"dynamic_batching", "sequence_batching"})),
    "ModelSequenceBatching": ("strategy_choice", frozenset({"direct", "oldest"})),
}
"""The fields of which a message has one at most, and what that choice is called."""

ENUMS: dict[str, tuple[str, ...]] = {
    "DataType": (
        "TYPE_INVALID",
        "TYPE_BOOL",
        "TYPE_UINT8",
        "TYPE_UINT16",
        "TYPE_UINT32",
        "TYPE_UINT64",
        "TYPE_INT8",
        "TYPE_INT16",
        "TYPE_INT32",
        "TYPE_INT64",
        "TYPE_FP16",
        "TYPE_FP32",
        "TYPE_FP64",
        "TYPE_STRING",
        "TYPE_BF16",
    ),
    "ModelInput.Format": ("FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"),
    "ModelInstanceGroup.Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
"""Values by their number, from 0."""


def _file() -> Message:
    file = descriptor_pb2.FileDescriptorProto(name="skerry/grpc_messages.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Message] = {}
    for path in FIELDS:
        parent, _, name = path.rpartition(".")
        made[path] = (made[parent].nested_type if parent else file.message_type).add(name=name)
    for path, values in ENUMS.items():
        parent, _, name = path.rpartition(".")
        enum = (made[parent] if parent else file).enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for path, message in made.items():
        choice, chosen = ONE_OF.get(path, ("", frozenset()))
        if choice:
            message.oneof_decl.add(name=choice)
        for name, (number, kind) in FIELDS[path].items():
            field = _add_field(message, path, name, number, kind)
            if name in chosen:
                field.oneof_index = 0
    return file


def _add_field(message: Message, path: str, name: str, number: int, kind: str) -> Message:
    field = message.field.add(name=name, number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL)
    if kind.startswith("map "):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _set_type(entry.field.add(name="key", number=1, label=field.label), "string")
        _set_type(entry.field.add(name="value", number=2, label=field.label), kind.removeprefix("map "))
        kind = f"{path}.{entry.name}[]"
    if kind.endswith("[]"):
        field.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    _set_type(field, kind.removesuffix("[]"))
    return field


def _set_type(field: Message, kind: str) -> None:
    types = descriptor_pb2.FieldDescriptorProto.Type
    scalar = f"TYPE_{kind.upper()}"
    if scalar in types.keys():  # noqa: SIM118 - protobuf's wrapper of an enum is no mapping
        field.type = types.Value(scalar)
        return
    field.type = types.Value("TYPE_ENUM" if kind in ENUMS else "TYPE_MESSAGE")
    field.type_name = f".{PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return {path: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{path}")) for path in FIELDS}


MESSAGES: dict[str, Any] = _classes()
"""The class of each message, by its name within the package."""

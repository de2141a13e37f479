"""The messages of `GRPCInferenceService`: the Open Inference Protocol and Triton's extensions.

The classes are made from a table when the module is imported. Generated code would need a build step, and works with
few versions of protobuf. Their pool is their own, because clients in the same process define the same names.

Names of messages are no part of the protocol's bytes. So methods share messages, and nested messages are not nested.

Specification: https://github.com/kserve/open-inference-protocol and
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mexit.errors import BadInput, requires_extra

with requires_extra("grpc", "Serving over gRPC"):
    from google.protobuf import descriptor_pool, json_format, message_factory
    from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
    from google.protobuf.message import DecodeError

SERVICE = "inference.GRPCInferenceService"
_PACKAGE = "inference"
_NAMED_MODEL = "string name 1, string version 2"
_CHANGED_MODEL = "string repository_name 1, string model_name 2, map ModelRepositoryParameter parameters 3"
_TENSOR_PARAMETERS = "string name 1, string datatype 2, repeated int64 shape 3, map InferParameter parameters 4"

# Message to fields: an optional "repeated", "map" (with string keys) or "oneof", type, name, number.
_FIELDS: Mapping[str, str] = {
    "Empty": "",
    "ServerLiveResponse": "bool live 1",
    "ServerReadyResponse": "bool ready 1",
    "ServerMetadataResponse": "string name 1, string version 2, repeated string extensions 3",
    "ModelReadyRequest": _NAMED_MODEL,
    "ModelReadyResponse": "bool ready 1",
    "ModelMetadataRequest": _NAMED_MODEL,
    "TensorMetadata": "string name 1, string datatype 2, repeated int64 shape 3",
    "ModelMetadataResponse": (
        "string name 1, repeated string versions 2, string platform 3, repeated TensorMetadata inputs 4, "
        "repeated TensorMetadata outputs 5, map string properties 6"
    ),
    "InferParameter": (
        "oneof bool bool_param 1, oneof int64 int64_param 2, oneof string string_param 3, oneof double double_param 4, "
        "oneof uint64 uint64_param 5"
    ),
    "InferTensorContents": (
        "repeated bool bool_contents 1, repeated int32 int_contents 2, repeated int64 int64_contents 3, "
        "repeated uint32 uint_contents 4, repeated uint64 uint64_contents 5, repeated float fp32_contents 6, "
        "repeated double fp64_contents 7, repeated bytes bytes_contents 8"
    ),
    "InferTensor": f"{_TENSOR_PARAMETERS}, InferTensorContents contents 5",
    "InferRequestedOutput": "string name 1, map InferParameter parameters 2",
    "ModelInferRequest": (
        "string model_name 1, string model_version 2, string id 3, map InferParameter parameters 4, "
        "repeated InferTensor inputs 5, repeated InferRequestedOutput outputs 6, repeated bytes raw_input_contents 7"
    ),
    "ModelInferResponse": (
        "string model_name 1, string model_version 2, string id 3, map InferParameter parameters 4, "
        "repeated InferTensor outputs 5, repeated bytes raw_output_contents 6"
    ),
    "ModelStreamInferResponse": "string error_message 1, ModelInferResponse infer_response 2",
    "ModelConfigRequest": _NAMED_MODEL,
    "ModelInput": "string name 1, int32 data_type 2, repeated int64 dims 4",
    "ModelOutput": "string name 1, int32 data_type 2, repeated int64 dims 3",
    "ModelConfig": (
        "string name 1, string platform 2, int32 max_batch_size 4, repeated ModelInput input 5, "
        "repeated ModelOutput output 6, string backend 17"
    ),
    "ModelConfigResponse": "ModelConfig config 1",
    "ModelStatisticsRequest": _NAMED_MODEL,
    "StatisticDuration": "uint64 count 1, uint64 ns 2",
    "InferStatistics": ", ".join(
        f"StatisticDuration {name} {number}"
        for number, name in enumerate(
            ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"), 1
        )
    ),
    "ModelStatistics": (
        "string name 1, string version 2, uint64 last_inference 3, uint64 inference_count 4, uint64 execution_count 5, "
        "InferStatistics inference_stats 6"
    ),
    "ModelStatisticsResponse": "repeated ModelStatistics model_stats 1",
    "RepositoryIndexRequest": "string repository_name 1, bool ready 2",
    "ModelIndex": "string name 1, string version 2, string state 3, string reason 4",
    "RepositoryIndexResponse": "repeated ModelIndex models 1",
    "ModelRepositoryParameter": (
        "oneof bool bool_param 1, oneof int64 int64_param 2, oneof string string_param 3, oneof bytes bytes_param 4"
    ),
    "RepositoryModelLoadRequest": _CHANGED_MODEL,
    "RepositoryModelUnloadRequest": _CHANGED_MODEL,
}
DATA_TYPES = {"TYPE_INT32": 8, "TYPE_INT64": 9, "TYPE_FP32": 11}  # of Triton's model configuration


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="mexit/open_inference.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for text in filter(None, fields.split(", ")):
            *label, kind, field_name, number = text.split()
            _add_field(message, label, kind, field_name, int(number))
    return file


def _add_field(message: DescriptorProto, label: list[str], kind: str, name: str, number: int) -> None:
    field = message.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
    if label == ["map"]:
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, [], "string", "key", 1)
        _add_field(entry, [], kind, "value", 2)
        kind = f"{message.name}.{entry.name}"
    if label in (["map"], ["repeated"]):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    if label == ["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    scalar = getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}", None)
    if scalar is None:
        field.type_name = f".{_PACKAGE}.{kind}"
    field.type = scalar or FieldDescriptorProto.TYPE_MESSAGE


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(_file().SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _FIELDS}


_CLASSES = _classes()


def new(name: str, **fields: Any) -> Any:
    """A message from its fields."""
    return _CLASSES[name](**fields)


def parse(name: str, content: bytes) -> Any:
    """A message from its bytes. Raises `BadInput` for bytes that are no such message."""
    try:
        return _CLASSES[name].FromString(content)
    except DecodeError:
        raise BadInput(f"the message is not a valid {name}") from None


def from_json(name: str, value: Mapping[str, Any]) -> Any:
    """A message from a JSON value; fields that the message lacks are left out."""
    return json_format.ParseDict(value, _CLASSES[name](), ignore_unknown_fields=True)

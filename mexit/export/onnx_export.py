"""Export one segment to ONNX with torch's exporter: weights inside the file, dynamic batch dimension."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnxscript  # noqa: F401  torch's exporter needs it, and its own error message is less clear
import torch

from mexit.core.manifest import TensorSpec
from mexit.export.segments import TorchSegment

OPSET = 20
BATCH = "batch"  # the batch size in the shapes of a graph
STACK_TRACE = "pkg.torch.onnx.stack_trace"  # of the exporter, in the metadata of every node
MAX_BATCH = 1 << 20


@dataclass(frozen=True)
class OnnxSegment:
    """A segment in ONNX.

    Attributes:
        model: the protobuf, shapes inferred.
        content: the bytes of the file.
        inputs, outputs: names, shapes (batch = -1) and dtypes; the last output is the logits.
        parameters: number of trained values in the torch module; the file may store equal tensors once.
        head_parameters: those of them that only the logits need; 0 for the last segment.
    """

    model: onnx.ModelProto
    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    head_parameters: int = 0


def export_segment(segment: TorchSegment) -> OnnxSegment:
    """Export one segment in float32."""
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    with _quiet_exporter():
        program = torch.onnx.export(
            segment.module,
            segment.example,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=list(segment.inputs),
            output_names=list(segment.outputs),
            dynamic_shapes=(tuple({0: batch} for _ in segment.inputs),),  # nested: forward takes *carried
            verbose=False,
        )
    assert program is not None
    model = program.model_proto  # a new one at each access
    _remove_stack_traces(model)
    parameters = sum(parameter.numel() for parameter in segment.module.parameters())
    return finalize(model, parameters, segment.head_parameters)


def finalize(model: onnx.ModelProto, parameters: int, head_parameters: int = 0) -> OnnxSegment:
    """Infer all shapes of a segment's model, check it and serialise it."""
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    inputs, outputs = _tensor_specs(model.graph.input), _tensor_specs(model.graph.output)
    return OnnxSegment(model, model.SerializeToString(), inputs, outputs, parameters, head_parameters)


def _remove_stack_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces: they hold paths of this machine, and the bytes would depend on the folder."""
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != STACK_TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def _tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            value.name,
            tuple(int(dim.dim_value) or -1 for dim in value.type.tensor_type.shape.dim),
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
        )
        for value in values
    )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the exporter's log lines about torchvision and its warnings about its own deprecated calls."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

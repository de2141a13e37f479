"""One ONNX file a segment, through torch's own exporter, weights inside, the batch dimension named."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mexit.core.manifest import TensorSpec
from mexit.errors import missing_extra
from mexit.export.segments import Cut

OPSET = 20


@dataclass(frozen=True)
class OnnxSegment:
    """A segment in ONNX.

    Attributes:
        model: the parsed protobuf, for counting.
        content: the bytes of the file.
        inputs, outputs: what the file declares, batch as -1.
        parameters: trained numbers; the file may hold equal ones once.
    """

    model: Any
    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int


def to_onnx(cut: Cut) -> OnnxSegment:
    """Export one segment. Raises `MissingExtra` without onnx or onnxscript."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "train", "Exporting a network") from None
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    with _quiet():
        program = torch.onnx.export(
            cut.module,
            cut.example,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=list(cut.inputs),
            output_names=list(cut.outputs),
            dynamic_shapes=(tuple({0: batch} for _ in cut.inputs),),  # nested: forward takes *carried
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return finished(program.model_proto, sum(parameter.numel() for parameter in cut.module.parameters()))


def finished(model: Any, parameters: int) -> OnnxSegment:
    """A ModelProto with every shape inferred, checked, as a segment."""
    import onnx

    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    return OnnxSegment(model, model.SerializeToString(), _specs(graph.input), _specs(graph.output), parameters)


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(int(dim.dim_value) if dim.dim_value else -1 for dim in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        specs.append(TensorSpec(value.name, shape, dtype))
    return tuple(specs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs about torchvision's absence and warns of its own deprecated calls."""
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

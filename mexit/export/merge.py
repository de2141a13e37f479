"""Merge consecutive segments in ONNX, in every precision: the exits between them disappear, with their heads."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from mexit.core.onnx_merge import merge_models
from mexit.export.onnx_export import OnnxSegment


def merge_segments(segments: Sequence[OnnxSegment]) -> OnnxSegment:
    """Merge consecutive segments into one, which has the carried features and the logits of the last one.

    Args:
        segments: at least one, in order. One segment is returned as it is.
    """
    return segments[0] if len(segments) == 1 else _merged(segments, only_logits=False)


def static_network(segments: Sequence[OnnxSegment]) -> OnnxSegment:
    """The static network: from the image to the logits of the last of these segments alone."""
    return _merged(segments, only_logits=True)


def _merged(segments: Sequence[OnnxSegment], *, only_logits: bool) -> OnnxSegment:
    last = segments[-1]
    content = merge_models([one.content for one in segments], last.outputs[-1].name, only_logits=only_logits)
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    parameters = sum(one.parameters for one in segments) - sum(one.head_parameters for one in segments[:-1])
    outputs = last.outputs[-1:] if only_logits else last.outputs
    return OnnxSegment(model, content, segments[0].inputs, outputs, parameters, last.head_parameters)

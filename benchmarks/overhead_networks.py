"""Networks with random weights for timing, their exported graphs and a bound call; also a ResNet-50 with four exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

from mexit.core.bundle import Bundle
from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.data import digits, splits
from mexit.export.bundle_writer import BundleContents, build_bundle
from mexit.export.nested_if import build_single_file
from mexit.export.onnx_export import OnnxSegment, export_segment
from mexit.export.segments import cut_segments
from mexit.models import MultiExit, Stage, build_model, model_spec

CLASSES, LARGE = 10, "resnet50"
IMAGENET = InputSpec("input", "float32", "NCHW", 3, (224, 224), (0.0, 1.0), PrepareSpec(fit="cover"))


@dataclass(frozen=True)
class Network:
    """An exported network, one graph of all its exits, and its single file."""

    name: str
    bundle: Bundle
    one_graph: bytes
    nested: bytes


def export(name: str, folder: Path = Path()) -> Network:
    """Export a network with random weights. The bundle stays in memory until its `write`."""
    network = random_weights(name)
    spec = IMAGENET if name == LARGE else model_spec(name).input
    segments = [export_segment(segment) for segment in cut_segments(network, spec.name)]
    data, names = digits.load(), [str(label) for label in range(CLASSES)]
    bundle = build_bundle(folder / name, BundleContents(names, spec, splits.split(data), {"fp32": segments}))
    return Network(name, bundle, chained(segments), build_single_file([segment.model for segment in segments]))


def bound(session: Any) -> Callable[[Any], None]:
    """Return a function that runs a graph on one image, with image and logits in bound buffers."""
    [given], found = session.get_inputs(), session.get_outputs()
    image = np.zeros((1, *given.shape[1:]), np.float32)
    logits = [np.zeros((1, *output.shape[1:]), np.float32) for output in found]
    binding = session.io_binding()
    binding.bind_input(given.name, "cpu", 0, np.float32, image.shape, image.ctypes.data)
    for output, array in zip(found, logits, strict=True):
        binding.bind_output(output.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def call(part: Any, buffers: Any = (image, logits)) -> None:  # keeps the bound arrays alive
        np.copyto(buffers[0], part)
        session.run_with_iobinding(binding)

    return call


def random_weights(name: str) -> MultiExit:
    """Build a network in eval mode, with the same weights in each call."""
    torch.manual_seed(0)
    return (resnet50() if name == LARGE else build_model(name, CLASSES)).eval()


class Bottleneck(nn.Module):
    """The residual block of 1x1, 3x3 and 1x1 convolutions (He et al., 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            *conv(width_in, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU(), *conv(width, wide, 1)
        )
        same_shape = stride == 1 and width_in == wide
        self.shortcut = nn.Identity() if same_shape else nn.Sequential(*conv(width_in, wide, 1, stride))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, width_in, H, W) to (B, 4 width, H / stride, W / stride)."""
        return torch.relu(self.body(features) + self.shortcut(features))


def conv(width_in: int, width: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its BatchNorm."""
    return [nn.Conv2d(width_in, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width)]


def resnet50() -> MultiExit:
    """ResNet-50 on 224 pixels, with an exit behind each of its four groups of blocks."""
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages, width_in = [], 64
    for group, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**group
        for block in range(blocks):
            layers.append(Bottleneck(width_in, width, 2 if group and not block else 1))
            width_in = 4 * width
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, CLASSES))
        stages.append(Stage(nn.Sequential(*layers), head))
        layers = []
    return MultiExit(stages, (3, 224, 224), CLASSES)


def chained(segments: Sequence[OnnxSegment]) -> bytes:
    """Join the segments to one graph that returns the logits of every exit."""
    nodes, weights, logits = [], [], []
    for k, segment in enumerate(segments, start=1):
        graph = onnx.compose.add_prefix_graph(segment.model.graph, f"{k}/", rename_inputs=False, rename_outputs=False)
        nodes, weights = [*nodes, *graph.node], [*weights, *graph.initializer]
        logits.append(graph.output[-1])
    first = segments[0].model
    made = helper.make_graph(nodes, "all exits", first.graph.input, logits, weights)
    model = helper.make_model(made, opset_imports=first.opset_import, ir_version=first.ir_version)
    content: bytes = model.SerializeToString()
    return content

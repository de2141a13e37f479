"""The networks of `engines.py`, their images, and their engines, static and adaptive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from overhead_networks import IMAGENET, LARGE, random_weights
from torch import nn

from mexit.core.bundle import Bundle
from mexit.core.manifest import InputSpec
from mexit.core.progress import Silent
from mexit.data import digits, registry, splits
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import MexitError
from mexit.export import segments as export_segments
from mexit.export.bundle_writer import BundleContents, build_bundle
from mexit.export.onnx_export import export_segment
from mexit.flows.precision_variants import convert_segments
from mexit.models import MultiExit, model_spec
from mexit.runtime.backends.registry import open_backend
from mexit.train import checkpoint

ENGINES = ("ort", "ort:int8", "openvino", "openvino:bf16", "openvino:int8")


@dataclass(frozen=True)
class BenchmarkNetwork:
    """A network and its data.

    Attributes:
        name: name on the page.
        make: makes a copy of the network, in eval mode.
        spec: its input.
        data, parts: its images and their splits.
        trained: whether it is trained, so that its accuracy has a meaning.
        timed: number of timed images.
    """

    name: str
    make: Callable[[], MultiExit]
    spec: InputSpec
    data: DataSet
    parts: Splits
    trained: bool
    timed: int = 64

    @staticmethod
    def of(run_or_name: str) -> BenchmarkNetwork:
        """Load the network of a run directory, or build a network by name, with random weights and digits as images."""
        if Path(run_or_name).is_dir():
            _, settings, parts = checkpoint.load_model(Path(run_or_name))
            data, spec = registry.load(settings.data), settings.model_spec().input
            name = f"{settings.model}, {settings.method} on {settings.data}"
            return BenchmarkNetwork(name, lambda: checkpoint.load_model(Path(run_or_name))[0], spec, data, parts, True)
        data, large = digits.load(), run_or_name == LARGE
        spec, timed = (IMAGENET, 8) if large else (model_spec(run_or_name).input, 64)
        return BenchmarkNetwork(
            run_or_name, lambda: random_weights(run_or_name), spec, data, splits.split(data), False, timed
        )

    def some(self, part: str, limit: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """At most `limit` evenly spaced images of a split, (N, C, H, W), and their labels, (N,)."""
        index = self.parts.part(part)
        index = index[:: max(1, len(index) // limit)][:limit]
        return self.data.batch(index, self.spec), self.data.labels[index]


class LastExit(nn.Module):
    """The network with its last exit only."""

    def __init__(self, model: MultiExit) -> None:
        super().__init__()
        self.model = model

    def forward(self, *carried: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model.forward_exit(carried[0], self.model.exits),)


@dataclass(frozen=True)
class TorchCarried:
    """Carried features as torch tensors."""

    tensors: tuple[torch.Tensor, ...]

    @property
    def rows(self) -> int:
        return len(self.tensors[0])

    def take(self, rows: NDArray[np.intp]) -> TorchCarried:
        return TorchCarried(tuple(tensor[torch.from_numpy(rows)] for tensor in self.tensors))


@dataclass(frozen=True)
class TorchSegment:
    """A segment that runs as a torch module."""

    module: Callable[..., Any]

    def run(self, carried: TorchCarried) -> tuple[TorchCarried, NDArray[np.float32]]:
        with torch.inference_mode():
            *features, logits = self.module(*carried.tensors)
        return TorchCarried(tuple(features)), logits.float().numpy()


class TorchBackend:
    """torch in float32, or in bfloat16 with the memory format channels_last."""

    engine, variant, static = "torch", "fp32", None

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, compiled: bool = False) -> None:
        self.precision = "fp32" if dtype is torch.float32 else "bf16"
        self._dtype = dtype
        self._layout = torch.contiguous_format if dtype is torch.float32 else torch.channels_last
        moved = [one.to(dtype=dtype, memory_format=self._layout) for one in modules]
        self.segments = [TorchSegment(torch.compile(one, dynamic=False) if compiled else one) for one in moved]

    def carry(self, images: NDArray[np.float32]) -> TorchCarried:
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        return TorchCarried((tensor.to(dtype=self._dtype, memory_format=self._layout),))


@dataclass(frozen=True)
class Opened:
    """A network in one engine, static and adaptive (None if the engine runs only the static network)."""

    engine: str
    static: Any
    adaptive: Any | None


Costs = tuple[int, NDArray[np.int64]]


def engines_of(network: BenchmarkNetwork, compiled: bool) -> tuple[list[Opened], Costs, list[str]]:
    """Return the engines that open, the MACs of the static and the adaptive network, and the errors of the others."""
    model, name = network.make(), network.spec.name
    whole = [
        export_segments.TorchSegment(LastExit(model), (name,), ("logits_1",), (torch.rand(2, *model.input_shape),))
    ]
    bundles = [_bundle(network, segments) for segments in (whole, export_segments.cut_segments(model, name))]
    opened, failed = [], []
    for engine in ENGINES:
        try:
            opened.append(Opened(engine, *(open_backend(bundle, engine) for bundle in bundles)))
        except MexitError as error:
            failed.append(f"{network.name}, {engine}: {error}")
    for dtype in (torch.float32, torch.bfloat16):
        static = TorchBackend([LastExit(network.make())], dtype)
        adaptive = TorchBackend([one.module for one in export_segments.cut_segments(network.make())], dtype)
        opened.append(Opened(f"torch eager {static.precision}", static, adaptive))
        if compiled:
            compiled_static = TorchBackend([LastExit(network.make())], dtype, compiled=True)
            opened.append(Opened(f"torch compiled {compiled_static.precision}", compiled_static, None))
    static_macs, adaptive_macs = (bundle.manifest.cumulative_macs for bundle in bundles)
    return opened, (static_macs[-1], np.array(adaptive_macs)), failed


def _bundle(network: BenchmarkNetwork, segments: Sequence[export_segments.TorchSegment]) -> Bundle:
    """A bundle in memory with the variants fp32 and int8 of these segments."""
    fp32 = [export_segment(segment) for segment in segments]
    int8, _ = convert_segments(segments, fp32, "int8", network.data, network.parts, network.spec, Silent())
    variants = {"fp32": fp32, "int8": int8}
    return build_bundle(Path("compared"), BundleContents(network.data.classes, network.spec, network.parts, variants))

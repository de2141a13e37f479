"""The networks of `engines.py`, their images, and their engines, static and cut at the exits."""

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
from mexit.export import segments as cutting
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
    def of(given: str) -> BenchmarkNetwork:
        """The network of a run directory, or a network by name, with random weights and images of digits."""
        if Path(given).is_dir():
            _, settings, parts = checkpoint.load_model(Path(given))
            data, spec = registry.load(settings.data), model_spec(settings.model).input
            name = f"{settings.model}, {settings.method} on {settings.data}"
            return BenchmarkNetwork(name, lambda: checkpoint.load_model(Path(given))[0], spec, data, parts, True)
        data, large = digits.load(), given == LARGE
        spec, timed = (IMAGENET, 8) if large else (model_spec(given).input, 64)
        return BenchmarkNetwork(given, lambda: random_weights(given), spec, data, splits.split(data), False, timed)

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

    engine, variant, drops_heads = "torch", "fp32", False

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
    """A network in one engine: static, and cut at its exits (None if it is not)."""

    engine: str
    static: Any
    adaptive: Any | None


Costs = tuple[int, NDArray[np.int64]]


def engines_of(network: BenchmarkNetwork, compiled: bool) -> tuple[list[Opened], Costs, list[str]]:
    """Every engine that opens, the MACs of the static and the cut network, and the errors of the other engines."""
    model, name = network.make(), network.spec.name
    whole = [cutting.TorchSegment(LastExit(model), (name,), ("logits_1",), (torch.rand(2, *model.input_shape),))]
    bundles = [_bundle(network, cuts) for cuts in (whole, cutting.cut_segments(model, name))]
    opened, failed = [], []
    for engine in ENGINES:
        try:
            opened.append(Opened(engine, *(open_backend(bundle, engine) for bundle in bundles)))
        except MexitError as error:
            failed.append(f"{network.name}, {engine}: {error}")
    for dtype in (torch.float32, torch.bfloat16):
        static = TorchBackend([LastExit(network.make())], dtype)
        cut = TorchBackend([one.module for one in cutting.cut_segments(network.make())], dtype)
        opened.append(Opened(f"torch eager {static.precision}", static, cut))
        if compiled:
            again = TorchBackend([LastExit(network.make())], dtype, compiled=True)
            opened.append(Opened(f"torch compiled {again.precision}", again, None))
    static_macs, cut_macs = (bundle.manifest.cumulative_macs for bundle in bundles)
    return opened, (static_macs[-1], np.array(cut_macs)), failed


def _bundle(network: BenchmarkNetwork, cuts: Sequence[cutting.TorchSegment]) -> Bundle:
    """A bundle in memory with the variants fp32 and int8 of these segments."""
    fp32 = [export_segment(cut) for cut in cuts]
    int8, _ = convert_segments(cuts, fp32, "int8", network.data, network.parts, network.spec, Silent())
    variants = {"fp32": fp32, "int8": int8}
    return build_bundle(Path("compared"), BundleContents(network.data.classes, network.spec, network.parts, variants))

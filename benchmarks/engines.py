"""Engines and early exit together: microseconds an image, static and adaptive, per engine and batch.

    python benchmarks/engines.py [NETWORK...] [--seconds N]

Networks of random weights on digits images (nothing here is about accuracy), one thread. `static` is the network
without its other exits, as its users would deploy it: one graph, the last logits alone. The adaptive rows run
the segments with thresholds (MSDNet's geometric protocol, from that engine's own scores on these images) whose
mean cost is the budget. Every path answers the same 64 images in batches of that size; a pass is one sample,
passes take turns. Speed-up is against the fastest static engine of the same class: fp32, bf16 or int8. Processor
time (cpu us) is what remains comparable where other programs run beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from page import table, write_page
from torch import nn

from mexit.calibrate.thresholds import Ranking, geometric
from mexit.core.budget import NAMED_FRACTIONS
from mexit.core.bundle import Bundle
from mexit.core.policy import Policy, first_exit
from mexit.data import digits, splits
from mexit.errors import MexitError
from mexit.export import segments as cutting
from mexit.export.to_onnx import to_onnx
from mexit.export.write import assemble
from mexit.flows.progress import Silent
from mexit.flows.variants import convert
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.catalog import open_backend
from mexit.runtime.engine import answer
from mexit.runtime.reference import run_all_exits
from mexit.train.models import MultiExit, build, preset

NETWORKS = ("small-cnn", "msdnet-cifar10", "resnet38")
ENGINES = ("ort", "ort:int8", "openvino", "openvino:bf16", "openvino:int8")
BATCHES = (1, 8, 64)
IMAGES, CLASSES, WARM_UP, MIN_ROUNDS, SECONDS = 64, 10, 1, 3, 20.0
QS = np.geomspace(1e-3, 1e3, 121)


class LastExit(nn.Module):
    """The network as one that never had other exits."""

    def __init__(self, model: MultiExit) -> None:
        super().__init__()
        self.model = model

    def forward(self, *carried: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model.one_exit(carried[0], self.model.exits),)


class TorchCarried:
    """Features as tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)

    def take(self, rows: NDArray[np.intp]) -> TorchCarried:
        return TorchCarried([tensor[torch.from_numpy(rows)] for tensor in self.tensors])


@dataclass(frozen=True)
class TorchSegment:
    """A segment's module, eager."""

    module: nn.Module

    def run(self, carried: TorchCarried) -> tuple[TorchCarried, NDArray[np.float32]]:
        with torch.inference_mode():
            *features, logits = self.module(*carried.tensors)
        return TorchCarried(features), logits.float().numpy()


class TorchBackend:
    """torch eager: float32, or bfloat16 with channels last."""

    engine, variant = "torch", "fp32"

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.precision = "fp32" if dtype is torch.float32 else "bf16"
        self._dtype = dtype
        self._layout = torch.contiguous_format if dtype is torch.float32 else torch.channels_last
        self.segments = [TorchSegment(one.to(dtype=dtype, memory_format=self._layout)) for one in modules]

    def carry(self, images: NDArray[np.float32]) -> TorchCarried:
        tensor = torch.from_numpy(np.ascontiguousarray(images))
        return TorchCarried([tensor.to(dtype=self._dtype, memory_format=self._layout)])


@dataclass(frozen=True)
class Route:
    """One way to answer images, and its mean cost on them in MACs."""

    engine: str
    precision: str
    name: str
    run: Callable[[NDArray[np.float32]], Any]
    macs: float


def make_bundle(network: str, cuts: Sequence[cutting.Cut]) -> Bundle:
    """The variants fp32 and int8 of these cuts, in memory."""
    data, spec = digits.load(), preset(network).input
    parts = splits.split(data)
    exported = [to_onnx(cut) for cut in cuts]
    other = convert(cuts, exported, "int8", data, parts, spec, Silent())
    found = assemble(network, data.classes, spec, exported, parts, {}, None, {"int8": other.segments})
    return Bundle.from_parts(Path(network), found.manifest, found.files)


def torch_backends(network: str, whole: bool) -> list[TorchBackend]:
    """Fresh modules each: `to` changes them in place."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(network)
        modules = [LastExit(model)] if whole else [cut.module for cut in cutting.cut(model)]
        found.append(TorchBackend(modules, dtype))
    return found


def make_model(network: str) -> MultiExit:
    torch.manual_seed(0)
    return build(network, CLASSES).eval()


def paths_of(network: str, images: NDArray[np.float32]) -> tuple[list[Route], list[str]]:
    """Every path of a network, and what could not be opened."""
    model = make_model(network)
    name = preset(network).input.name
    whole = [cutting.Cut(LastExit(model), (name,), ("logits_1",), (torch.rand(2, *model.input_shape),))]
    bundles = {"adaptive": make_bundle(network, cutting.cut(model, name))}
    bundles["static"] = make_bundle(network, whole)
    costs = {kind: np.array(bundle.manifest.cumulative_macs) for kind, bundle in bundles.items()}
    opened: list[tuple[str, Backend, Backend]] = []
    failed = []
    for engine in ENGINES:
        try:
            opened.append((engine, *(open_backend(bundles[kind], engine) for kind in ("static", "adaptive"))))
        except MexitError as error:
            failed.append(f"{network}, {engine}: {error}")
    for static, adaptive in zip(torch_backends(network, True), torch_backends(network, False), strict=True):
        opened.append((f"torch eager {static.precision}", static, adaptive))
    paths = []
    for engine, static, adaptive in opened:
        paths.append(
            Route(engine, static.precision, "static", lambda part, one=static: run_all_exits(one, part),
                  float(costs["static"][-1]))
        )  # fmt: skip
        paths += adaptive_paths(engine, adaptive, images, costs["adaptive"])
    return paths, failed


def adaptive_paths(
    engine: str, backend: Backend, images: NDArray[np.float32], costs: NDArray[np.int64]
) -> list[Route]:
    """One path a named budget: the geometric thresholds whose mean cost is nearest to it."""
    logits = run_all_exits(backend, images)
    exits = len(costs)
    bare = Policy("max-probability", False, (1.0,) * exits, (None,) * (exits - 1))
    scores = bare.scorer(CLASSES).score(logits)
    candidates = [geometric(Ranking.of(scores), q) for q in QS]
    means = np.array([costs[first_exit(scores, one) - 1].mean() for one in candidates])
    paths = []
    for name, share in NAMED_FRACTIONS.items():
        best = int(np.abs(means - (costs[0] + share * (costs[-1] - costs[0]))).argmin())
        policy = Policy("max-probability", False, (1.0,) * exits, candidates[best])
        paths.append(
            Route(engine, backend.precision, name,
                  lambda part, policy=policy: answer(backend, part, policy, CLASSES), float(means[best]))
        )  # fmt: skip
    return paths


def take_turns(
    paths: Sequence[Route], images: NDArray[np.float32], batch: int, seconds: float
) -> NDArray[np.float64]:
    """Microseconds an image by the clock and of this process's processor time, (rounds, 2, paths)."""
    rounds: list[list[list[float]]] = []
    begin = time.perf_counter()
    while len(rounds) < WARM_UP + MIN_ROUNDS or time.perf_counter() - begin < seconds:
        spent = [[0.0] * len(paths), [0.0] * len(paths)]
        for place in np.roll(range(len(paths)), -len(rounds)):
            start, start_cpu = time.perf_counter(), time.process_time()
            for first in range(0, len(images), batch):
                paths[place].run(images[first : first + batch])
            spent[0][place] = (time.perf_counter() - start) / len(images) * 1e6
            spent[1][place] = (time.process_time() - start_cpu) / len(images) * 1e6
        rounds.append(spent)
    return np.array(rounds[WARM_UP:])


def rows_of(paths: Sequence[Route], times: NDArray[np.float64]) -> list[list[str]]:
    """The rows of one network and batch."""
    middle, processor = np.median(times, axis=0)
    quarters = np.quantile(times[:, 0], [0.25, 0.75], axis=0)
    rows = []
    for place, path in enumerate(paths):
        rivals = [
            one for one, other in enumerate(paths) if (other.precision, other.name) == (path.precision, "static")
        ]
        best = min(rivals, key=lambda one: middle[one])
        spread = f"{quarters[0, place]:.0f} to {quarters[1, place]:.0f}"
        speed_up, fewer_macs = middle[best] / middle[place], paths[best].macs / path.macs
        rows.append([
            path.engine, path.name, f"{middle[place]:.0f}", spread, f"{processor[place]:.0f}",
            f"{speed_up:.2f}", f"{fewer_macs:.2f}", paths[best].engine,
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each network and batch")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = digits.load()
    index = splits.split(data).part("test")[:IMAGES]
    parts, missing = [], []
    for network in given.networks:
        images = data.batch(index, preset(network).input)
        paths, failed = paths_of(network, images)
        missing += failed
        for batch in BATCHES:
            times = take_turns(paths, images, batch, given.seconds)
            parts.append(f"## {network}, batch {batch}\n\n{len(times)} rounds.")
            columns = [
                "engine",
                "path",
                "us an image",
                "quartiles",
                "cpu us",
                "speed-up",
                "MAC ratio",
                "against static",
            ]
            parts.append(table(columns, rows_of(paths, times)))
    said = [str(__doc__).split("\n\n", 2)[2].strip()]
    said.append("torch.compile is left out: it takes minutes to compile MSDNet and ResNet-38.")
    write_page("engines", "2-core-cpu", "Engines and early exit", [*said, *missing, *parts])


if __name__ == "__main__":
    main()

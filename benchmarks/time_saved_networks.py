"""The trained networks of `time_saved.py`: how each is trained, exported, calibrated, and cut into smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_networks import ENGINES
from numpy.typing import NDArray
from torch import Tensor, nn
from training_runs import train_or_resume

from mexit import Runtime
from mexit.core.atomic_io import to_npz, write_bytes
from mexit.core.bundle import Bundle
from mexit.core.manifest import InputSpec
from mexit.core.progress import Silent
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import MexitError
from mexit.export.bundle_writer import BundleContents, build_bundle
from mexit.export.onnx_export import export_segment
from mexit.export.segments import TorchSegment
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.precision_variants import convert_segments
from mexit.flows.train import TrainOptions
from mexit.models import MultiExit
from mexit.runtime.backends.registry import open_backend
from mexit.runtime.reference import run_all_exits
from mexit.train import checkpoint

PARTS = ("certification", "test")
CHUNK = 100  # images of one pass
_CLEAN: dict[str, Any] = {
    "method": "clean", "lr_schedule": "one-cycle", "warmup": 0.15, "nesterov": True, "decay_norms": False,
    "weight_decay": 5e-4, "ema": 0.998, "batch": 128, "lr": 0.05, "validate_every": 5,
}  # fmt: skip
_CIFAR = _CLEAN | {"augment": "reflect-crop-flip", "recompute_norms": 10_000}
_FROZEN: dict[str, Any] = {"model": "efficientnet-lite0", "freeze": True}
FINETUNE_EPOCHS = 10
MOST_CUTS = 8  # networks that end at an exit, evenly spaced


@dataclass(frozen=True)
class Recipe:
    """How a network of the page is trained.

    Attributes:
        data: the data set, as `--data` takes it; `folder:NAME` is a folder inside that of the data sets.
        settings: settings of the run.
        target_ratio: largest share of the static network's time that a budget may take, float32, batch 1; None = no
            target beyond "never slower".
        against_fastest: whether that is against the fastest static engine instead of the same engine.
    """

    data: str
    settings: Mapping[str, Any]
    target_ratio: float | None = None
    against_fastest: bool = False

    @property
    def heads_only(self) -> bool:
        """Whether the network stays frozen."""
        return "freeze" in self.settings and "finetune" not in self.settings


RECIPES = {
    "small-cnn": Recipe("mnist", _CLEAN | {"model": "small-cnn", "epochs": 10, "lr": 0.02, "augment": "shift"}),
    "wide-cnn": Recipe("cifar10", _CIFAR | {"model": "wide-cnn", "epochs": 12}),
    "msdnet-cifar10": Recipe("cifar10", _CIFAR | {"model": "msdnet-cifar10", "epochs": 10}),
    "resnet38": Recipe("cifar10", _CIFAR | {"model": "resnet38", "epochs": 16}, 0.83),
    **{
        f"lite0-{data}{suffix}": Recipe(f"folder:{data}", _FROZEN | more, target, True)
        for data in ("imagenette-mini", "gtsrb")
        for suffix, more, target in (("", {}, 1 / 1.3), ("-finetuned", {"finetune": FINETUNE_EPOCHS}, 1 / 2))
    },
}
MINIATURE = {
    "digits": Recipe("digits", {"method": "clean", "model": "digits-cnn", "epochs": 2, "batch": 64}),
    "digits-frozen": Recipe("digits", {"model": "digits-cnn", "freeze": True}),
}


class CutNetwork(nn.Module):
    """A network that ends at one of its exits, without the other heads.

    Args:
        model: the whole network.
        exit_number: the exit, from 1.
    """

    def __init__(self, model: MultiExit, exit_number: int) -> None:
        super().__init__()
        self.model, self.exit_number = model, exit_number

    def forward(self, *carried: Tensor) -> tuple[Tensor]:
        return (self.model.forward_exit(carried[0], self.exit_number),)


@dataclass(frozen=True)
class PageNetwork:
    """A network of the page, in a folder of its own.

    Attributes:
        name: its name on the page.
        recipe: how it is trained.
        folder: holds its run, its bundles and the stored logits.
        data_dir: folder of the data sets; None = `MEXIT_DATA`.
        threads: of training.
    """

    name: str
    recipe: Recipe
    folder: Path
    data_dir: Path | None = None
    threads: int | None = None
    failed: dict[str, str] = field(default_factory=dict, compare=False)  # engine to the reason why it is left out

    @property
    def run(self) -> Path:
        return self.folder / self.name

    @property
    def bundle(self) -> Path:
        return self.folder / "bundles" / self.name

    @property
    def data_name(self) -> str:
        """The data set as `mexit train --data` takes it."""
        data = self.recipe.data
        if data.startswith("folder:") and self.data_dir is not None:
            return f"folder:{self.data_dir / data.removeprefix('folder:')}"
        return data

    def train(self) -> None:
        """Train the network, or go on with an interrupted run; a finished run stays as it is."""
        data, settings = self.data_name, self.recipe.settings
        preset = None if "freeze" in settings else {"digits": "demo"}.get(data, "neo_kd")
        train_or_resume(self.run, data, preset, settings, TrainOptions(threads=self.threads), self.data_dir)

    @cached_property
    def _loaded(self) -> tuple[MultiExit, Any, Splits, DataSet]:
        model, settings, splits = checkpoint.load_model(self.run)
        return model, settings, splits, registry.load(settings.data, self.data_dir)

    @property
    def model(self) -> MultiExit:
        return self._loaded[0]

    @property
    def settings(self) -> Any:
        return self._loaded[1]

    @property
    def splits(self) -> Splits:
        return self._loaded[2]

    @property
    def data(self) -> DataSet:
        return self._loaded[3]

    @property
    def spec(self) -> InputSpec:
        spec: InputSpec = self.settings.model_spec().input
        return spec

    def images(self, part: str, limit: int | None = None) -> NDArray[np.float32]:
        """The prepared images of a split, or the first `limit` of them, (N, C, H, W)."""
        return self.data.batch(self.splits.part(part)[:limit], self.spec)

    def labels(self, part: str) -> NDArray[np.int64]:
        """The labels of a split, (N,)."""
        return self.data.labels[self.splits.part(part)]

    def export(self) -> None:
        """Export the bundle with the exits that save time here, and calibrate every engine; once."""
        if not self.bundle.exists():
            options = ExportOptions(precision="int8", exits="auto")
            export_bundle(self.run, out=self.bundle, data_dir=self.data_dir, options=options)
        for engine in ENGINES:
            try:
                if not Runtime.open(self.bundle, "full", backend=engine).calibrated:
                    calibrate_bundle(self.bundle, options=CalibrateOptions(), data_dir=self.data_dir, backend=engine)
            except MexitError as error:
                self.failed[engine] = str(error)

    @property
    def engines(self) -> list[str]:
        """The engines that serve the bundle here."""
        return [engine for engine in ENGINES if engine not in self.failed]

    @cached_property
    def cuts(self) -> Mapping[int, Path]:
        """Bundles of the network that ends at an exit, in float32 and int8, by its number; written once.

        The last exit is among them, and at most `MOST_CUTS` in all.
        """
        exits = self.model.exits
        count = min(exits, MOST_CUTS)
        numbers = [exits * i // count for i in range(1, count + 1)]
        paths = {k: self.folder / "bundles" / f"{self.name}-exit-{k}" for k in numbers}
        for k, path in paths.items():
            if not path.exists():
                self._cut(path, k).write()
        return paths

    def _cut(self, path: Path, k: int) -> Bundle:
        name = self.spec.name
        module = CutNetwork(self.model.eval(), k)
        example = self.images("calibration", 2)
        segments = [TorchSegment(module, (name,), ("logits_1",), (torch.from_numpy(example),))]
        fp32 = [export_segment(segment) for segment in segments]
        int8, _ = convert_segments(segments, fp32, "int8", self.data, self.splits, self.spec, Silent())
        contents = BundleContents(self.data.classes, self.spec, self.splits, {"fp32": fp32, "int8": int8})
        return build_bundle(path, contents)

    def logits(self, bundle: Path, engine: str, part: str) -> NDArray[np.float32]:
        """The logits of every exit of a bundle in an engine on a split, (E, N, C); computed once."""
        path = self.folder / "logits" / f"{bundle.name}-{engine.replace(':', '-')}-{part}.npz"
        if not path.exists():
            backend = open_backend(Bundle.open(bundle), engine)
            index = self.splits.part(part)
            chunks = [index[first : first + CHUNK] for first in range(0, len(index), CHUNK)]
            logits = [run_all_exits(backend, self.data.batch(chunk, self.spec)) for chunk in chunks]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, to_npz(logits=np.concatenate(logits, axis=1)))
        with np.load(path) as stored:
            return np.asarray(stored["logits"])

    def prepare(self) -> None:
        """Everything that needs no quiet machine: training, the cut networks and their answers."""
        self.train()
        for path in self.cuts.values():
            for engine in ENGINES:
                try:
                    for part in PARTS:
                        self.logits(path, engine, part)
                except MexitError as error:
                    self.failed[engine] = str(error)

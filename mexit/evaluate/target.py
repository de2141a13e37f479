"""What is evaluated: a run in torch, or a bundle as it is deployed; and the network that gives gradients for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mexit.core.artifact_paths import BUNDLES, is_bundle
from mexit.core.bundle import Bundle
from mexit.core.cost import Costs
from mexit.core.exit_policy import Policy
from mexit.core.manifest import InputSpec
from mexit.core.policies_file import PARITY, PolicyEntry
from mexit.core.printable import shell_path
from mexit.data import registry
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.data.splits import Splits
from mexit.errors import NotFound, StalePolicy, UsageError
from mexit.models import MultiExit
from mexit.models.device import device_of, resolve_device
from mexit.models.exit_costs import exit_costs
from mexit.models.multi_exit import keep_exits
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime
from mexit.train import checkpoint
from mexit.train.config import TrainSettings
from mexit.train.validation import run_exits

BATCH = {"cpu": 128, "cuda": 512}  # images per pass of the torch network, by the type of its device

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Index = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class GradientSource:
    """The network that gives the gradients for attacks on a run or its bundle, and the settings of the run.

    Attributes:
        model: the network, in eval mode, on any device.
        settings: they hold the radius and steps of the test attack.
        superseded_by: command that exports the newer weights of the run behind a bundle; "" if there are none.
    """

    model: MultiExit
    settings: TrainSettings
    superseded_by: str = ""

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return device_of(self.model)

    def to(self, device: str) -> GradientSource:
        """Move the network to a device, which changes `model` in place; returns the source itself.

        Args:
            device: "auto", "cpu" or "cuda".

        Raises:
            UsageError: the device is unknown or does not exist.
        """
        self.model.to(resolve_device(device))
        return self

    @staticmethod
    def of_bundle(bundle: Bundle) -> GradientSource:
        """The run that a bundle was exported from, with the exits and the settings that the bundle records.

        Raises:
            NotFound: the run does not exist here.
            StalePolicy: the run has other weights than the bundle.
            Damaged: the recorded settings are not those of a run.
        """
        provenance = bundle.manifest.provenance
        run, expected = provenance.get("run"), provenance.get("weights_sha256")
        if not isinstance(run, str) or not any(Path(run).glob("weights*.safetensors")):
            raise NotFound(f"the run {run} that {bundle.path} was exported from does not exist here")
        weights = checkpoint.find_weights(Path(run), expected)
        if weights is None:
            raise StalePolicy(
                f"run {run} was trained again since {bundle.path} was exported: {_export_again(run, bundle.path)}"
            )
        model, settings, _ = checkpoint.load_model(Path(run), weights)
        if "settings" in provenance:  # the run may have been trained longer, with others, since the export
            settings = TrainSettings.from_json(provenance["settings"], f"the provenance of {bundle.path}")
        numbers = bundle.manifest.numbers
        newer = _export_again(run, bundle.path) if checkpoint.is_superseded(Path(run), weights) else ""
        return GradientSource(model if numbers == model.numbers else keep_exits(model, numbers), settings, newer)


def _export_again(run: str, bundle: Path) -> str:
    """The command that exports a run into an existing bundle."""
    out = "" if bundle == BUNDLES / Path(run).name else f" --out {shell_path(bundle)}"
    return f"mexit export {shell_path(run)}{out} --replace"


@dataclass(frozen=True)
class BudgetPolicy:
    """The policy of a named budget.

    Attributes:
        policy: the policy.
        budget_macs: largest mean cost that the budget allows, in MACs.
        exit_macs: cost of leaving at each exit under this policy, E numbers.
    """

    policy: Policy
    budget_macs: float
    exit_macs: tuple[float, ...]


@dataclass(frozen=True)
class EvaluationTarget:
    """A run or a bundle with its test images.

    Attributes:
        path: of the run or the bundle.
        source: the torch network that gives gradients.
        batch: images per pass of the torch network.
        run_batch: images (B, C, H, W) to the logits of every exit (E, B, C): torch for a run, the engine for a
            bundle.
        runtime: of a bundle; None for a run.
        entry: the calibration of a bundle's engine; None for a run, and without calibration.
        budgets: policies by budget name; `open_target` gives those of a bundle with thresholds.
        data: the data set.
        splits: its parts.
        input: the input tensor and the preparation of images.
        costs: MACs of leaving at each exit.
        parameters: of the layers up to each exit, E numbers.
    """

    path: Path
    source: GradientSource
    batch: int
    run_batch: Callable[[Images], Logits]
    runtime: Runtime | None
    entry: PolicyEntry | None
    budgets: Mapping[str, BudgetPolicy]
    data: DataSet
    splits: Splits
    input: InputSpec
    costs: Costs
    parameters: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each exit in the network, (E,)."""
        return self.source.model.numbers

    @property
    def cumulative_macs(self) -> tuple[float, ...]:
        """Cost of each exit if every head on the way runs, E numbers."""
        return self.costs.cumulative

    @property
    def engine(self) -> str:
        """The engine that evaluates the images, as typed after `--backend`; "torch" for a run."""
        if self.runtime is None:
            return "torch"
        backend = self.runtime.backend
        return backend.engine if backend.precision == PARITY else f"{backend.engine}:{backend.precision}"

    def test_index(self, samples: int | None) -> Index:
        """Positions of at most `samples` test images, evenly spaced; None = all.

        Raises:
            UsageError: `samples` is below 1.
        """
        if samples is not None and samples < 1:
            raise UsageError(f"--samples must be at least 1, found {samples}")
        return evenly_spaced(self.splits.part("test"), samples)

    def load(self, index: Index) -> tuple[Images, Labels]:
        """Images (B, C, H, W) and labels (B,) at these positions of the data set."""
        return self.data.batch(index, self.input), self.data.labels[index]

    def exit_logits(self, images: Images) -> Logits:
        """Logits of every exit for any number of images: (N, C, H, W) to (E, N, C)."""
        return np.concatenate([self.run_batch(part) for part in split_batches(images, self.batch)], axis=1)


def open_target(
    path: Path,
    data_dir: str | Path | None,
    backend: str,
    device: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
) -> EvaluationTarget:
    """Open a run or a bundle with its test images.

    Args:
        path: of the run or the bundle.
        data_dir: directory of the data sets; None = `MEXIT_DATA`.
        backend: engine of a bundle.
        device: device of the torch network: "auto", "cpu" or "cuda".
        batch: images per pass of the torch network; None = `BATCH`.
        threads: threads of the engine of a bundle, as in `Runtime.open`.

    Raises:
        NotFound, StalePolicy: the run behind a bundle does not exist here or has other weights.
        UsageError: the device does not exist, or the bundle does not record which images are for testing.
    """
    device = resolve_device(device)
    runtime, entry = None, None
    if is_bundle(path):
        runtime = Runtime.open(path, "full", backend=backend, threads=threads)
        entry = _entry(runtime)
        source = GradientSource.of_bundle(runtime.bundle)
        splits = Splits.of_bundle(runtime.bundle)
    else:
        model, settings, splits = checkpoint.load_model(path)
        source = GradientSource(model, settings)
    data = registry.load(source.settings.data, data_dir)
    splits.check(data)
    costs = exit_costs(source.to(device).model)
    macs = [cost.macs for cost in costs]
    return EvaluationTarget(
        path,
        source,
        batch or BATCH[device],
        partial(run_exits, source.model) if runtime is None else partial(run_all_exits, runtime.backend),
        runtime,
        entry,
        {} if runtime is None else _budgets(runtime, entry),
        data,
        splits,
        source.settings.model_spec().input,
        Costs(tuple(macs), macs[-1] - sum(cost.head_macs for cost in costs[:-1])),
        tuple(cost.parameters for cost in costs),
    )


def _entry(runtime: Runtime) -> PolicyEntry | None:
    """The policies of the engine; None without calibration."""
    if not runtime.calibrated:
        return None
    backend = runtime.backend
    return runtime.bundle.policies().entry(backend.engine, backend.precision, backend.variant)


def _budgets(runtime: Runtime, entry: PolicyEntry | None) -> dict[str, BudgetPolicy]:
    if entry is None:
        return {}
    budgets = {}
    for name, frontier_index in entry.named.items():
        point = entry.frontier[frontier_index]
        policy = entry.policy(point)
        if entry.last_exit_alone:
            policy = policy.alone
        budgets[name] = BudgetPolicy(policy, point.budget_macs, runtime.costs.of_exits(policy.thresholds))
    return budgets

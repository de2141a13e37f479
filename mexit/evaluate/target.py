"""What is evaluated: a run as it was trained, or a bundle as it is deployed. The attacks see no difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.artifact_paths import is_bundle
from mexit.core.manifest import InputSpec
from mexit.core.policy import Policy
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import UsageError, missing_extra
from mexit.evaluate import gradient_source
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime

BATCH = 128

Logits = NDArray[np.float32]
Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Deployed:
    """A named budget.

    Attributes:
        policy: decides who leaves where.
        budget_macs: its promise.
        exit_macs: what leaving at each exit costs under it, (E,).
    """

    policy: Policy
    budget_macs: float
    exit_macs: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationTarget:
    """What is evaluated.

    Attributes:
        path: of the run or the bundle.
        network: what gives gradients.
        answer: images (B, C, H, W) to the logits of every exit (E, B, C): torch of a run, the engine of a bundle.
        runtime: of a bundle; None for a run.
        budgets: by name; empty for a run and for a bundle that is not calibrated.
        data, splits, spec: the images.
        cumulative_macs, parameters: of everything up to each exit, (E,).
    """

    path: Path
    network: gradient_source.Source
    answer: Callable[[Images], Logits]
    runtime: Runtime | None
    budgets: Mapping[str, Deployed]
    data: DataSet
    splits: Splits
    spec: InputSpec
    cumulative_macs: tuple[int, ...]
    parameters: tuple[int, ...]

    def test_places(self, samples: int | None) -> Labels:
        """At most so many test images, evenly spaced; None = all."""
        if samples is not None and samples < 1:
            raise UsageError(f"--samples must be at least 1, found {samples}")
        index = self.splits.part("test")
        return index[spaced(len(index), samples)]

    def batch(self, index: Labels) -> tuple[Images, Labels]:
        """Images (B, C, H, W) and labels (B,) at these places of the data set."""
        return self.data.batch(index, self.spec), self.data.labels[index]

    def replay(self, images: Images) -> Logits:
        """`answer` in batches: (N, C, H, W) to (E, N, C)."""
        parts = np.array_split(images, range(BATCH, len(images), BATCH))
        return np.concatenate([self.answer(part) for part in parts], axis=1)


def spaced(count: int, wanted: int | None) -> NDArray[np.int64]:
    """At most `wanted` places below `count`, evenly spaced."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, wanted).astype(np.int64)


def open_subject(path: Path, data_dir: str | Path | None, backend: str) -> EvaluationTarget:
    """A run or a bundle with its test images.

    Raises:
        MissingExtra: torch is not installed.
        NotFound, StalePolicy: the run behind a bundle is gone or another one.
        UsageError: a bundle that does not say which images are for testing.
    """
    if is_bundle(path):
        runtime = Runtime.open(path, "full", backend=backend)
        network = gradient_source.of_bundle(runtime.bundle)
        stored = runtime.bundle.splits()
        if stored is None:
            raise UsageError(f"{path} stores no splits, so it is not known which images are for testing")
        splits = Splits.from_bytes(stored, path / "splits.npz")
    else:
        runtime, (network, splits) = None, open_run(path)
    data = registry.load(network.settings.data, data_dir)
    splits.check(data)
    return EvaluationTarget(
        path,
        network,
        _torch_answer(network) if runtime is None else _bundle_answer(runtime),
        runtime,
        {} if runtime is None else _budgets(runtime),
        data,
        splits,
        _spec(network),
        *_costs(network),
    )


def open_run(run: Path) -> tuple[gradient_source.Source, Splits]:
    """A finished run: what gives gradients, and its splits."""
    try:
        from mexit.train import checkpoint
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Evaluating a run") from None
    model, settings, splits = checkpoint.load_model(run)
    return gradient_source.Source(model, settings), splits


def _budgets(runtime: Runtime) -> dict[str, Deployed]:
    if not runtime.calibrated:
        return {}
    backend = runtime.backend
    entry = runtime.bundle.policies().usable(backend.engine, backend.precision, backend.variant)
    found = {}
    for name, place in entry.named.items():
        policy = entry.policy(entry.frontier[place])
        found[name] = Deployed(policy, entry.frontier[place].budget_macs, runtime.costs.under(policy.active_heads))
    return found


def _torch_answer(network: gradient_source.Source) -> Callable[[Images], Logits]:
    from mexit.train.validation import run_exits

    return lambda images: run_exits(network.model, images)


def _bundle_answer(runtime: Runtime) -> Callable[[Images], Logits]:
    return lambda images: run_all_exits(runtime.backend, images)


def _costs(network: gradient_source.Source) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """MACs and parameters; the same numbers as in the manifest, counted on the network."""
    from mexit.models.exit_costs import exit_costs

    costs = exit_costs(network.model)
    return tuple(cost.macs for cost in costs), tuple(cost.parameters for cost in costs)


def _spec(network: gradient_source.Source) -> InputSpec:
    from mexit.models import model_spec

    return model_spec(network.settings.model).input

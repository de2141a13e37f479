"""`mexit calibrate`: record what the bundle answers on held-out data, set thresholds, say what they promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.frontier import Judge, frontier, uncalibrated
from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.policies import PolicyEntry
from mexit.core.trace import Trace
from mexit.data import catalog
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits, split
from mexit.errors import UsageError
from mexit.flows import gradients, plots
from mexit.flows.defaults import BUNDLES, newest
from mexit.flows.progress import Progress, Silent
from mexit.runtime.record import Batch, record
from mexit.runtime.runtime import Runtime

BATCH = 64
ATTACKED_SAMPLES = 1000
REPORT = Path("reports") / "calibration.png"


@dataclass(frozen=True)
class CalibrateResult:
    """What was calibrated.

    Attributes:
        bundle: its directory.
        entry: what was written to `policies.json`.
        cumulative_macs: cost of each exit, (E,).
        picture: accuracy against MACs; None without matplotlib.
        why_not_attacked: the reason why nothing is promised under attack; empty if something is.
    """

    bundle: Path
    entry: PolicyEntry
    cumulative_macs: tuple[int, ...]
    picture: Path | None
    why_not_attacked: str


def calibrate(
    bundle: Path | None = None,
    *,
    data: str | None = None,
    data_dir: str | Path | None = None,
    budgets: Mapping[str, str] | None = None,
    measure: str = "max-probability",
    ensemble: bool = False,
    attack: str = "average",
    backend: str = "auto",
    threads: int = 1,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Calibrate a bundle for one engine.

    Args:
        bundle: a directory; default the newest bundle.
        data: default the bundle's own data set with its stored splits; another (`folder:PATH`) is split anew.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        budgets: further budgets by name, as typed (`{"mine": "40%"}`).
        measure, ensemble: see `core.policy.Policy`.
        attack: `average`, `max-average` or `none`: under which the promise is also measured.
        backend, threads: the engine to calibrate.
        progress: who listens.

    Raises:
        NotFound, Damaged, UsageError, BadInput: bundle or data are not what they should be.
        BudgetInfeasible: a budget below the cost of exit 1.
    """
    progress = progress or Silent()
    path = bundle or newest(BUNDLES, progress)
    runtime = Runtime.open(path, "full", backend=backend, threads=threads)
    opened = runtime.bundle
    typed = {name: Budget.parse(text) for name, text in (budgets or {}).items()}
    for budget in typed.values():
        budget.macs(opened.manifest.cumulative_macs)
    data_set, splits = _data(opened, data, data_dir)
    source, why_not = (None, "no attack was asked for")
    if attack != "none" and data is None:
        source, why_not = gradients.of_bundle_or_why_not(opened)
    elif attack != "none":
        why_not = f"{data} is not the data that the run was trained on"
    recorder = _Recorder(runtime, data_set, splits, progress)
    calibration = recorder.clean("calibration")
    held_out = recorder.clean("certification")
    attacked = recorder.attacked("certification", source, attack) if source else None
    entry = _entry(runtime, calibration, held_out, attacked, measure, ensemble, typed)
    opened.save_policies(opened.policies_or_empty().with_entry(entry))
    picture = _picture(path, entry, opened.manifest.name) if plots.available() else None
    if why_not:
        progress.note(f"nothing is promised under attack: {why_not}")
    return CalibrateResult(path, entry, opened.manifest.cumulative_macs, picture, why_not)


def _data(bundle: Bundle, data: str | None, data_dir: str | Path | None) -> tuple[DataSet, Splits]:
    stored = bundle.splits()
    if data is not None:
        data_set = catalog.load(data, data_dir)
        if data_set.classes != bundle.manifest.classes:
            raise UsageError(f"{data} has the classes {data_set.classes}, {bundle.path} {bundle.manifest.classes}")
        if bundle.manifest.splits is None or data_set.sha256 != bundle.manifest.splits.sha256:
            return data_set, split(data_set)
    elif bundle.manifest.splits is None:
        raise UsageError(f"{bundle.path} stores no splits: add --data")
    else:
        data_set = catalog.load(bundle.manifest.splits.data_set, data_dir)
    assert stored is not None
    splits = Splits.from_bytes(stored, bundle.path / "splits.npz")
    splits.check(data_set)
    return data_set, splits


@dataclass(frozen=True)
class _Recorder:
    """Makes traces of one engine."""

    runtime: Runtime
    data: DataSet
    splits: Splits
    progress: Progress

    def clean(self, part: str) -> Trace:
        return self._record(part, self.splits.part(part), "clean", None)

    def attacked(self, part: str, source: gradients.Source, objective: str) -> Trace:
        """Of at most `ATTACKED_SAMPLES`, evenly spaced; reported robustness is computed in float32, slowly."""
        index = self.splits.part(part)
        if len(index) > ATTACKED_SAMPLES:
            index = index[np.linspace(0, len(index) - 1, ATTACKED_SAMPLES).astype(np.int64)]
        attack = source.attack(objective, None, None)
        return self._record(part, index, attack.describe(), source.crafter(attack))

    def _record(
        self,
        part: str,
        index: NDArray[np.int64],
        condition: str,
        craft: Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] | None,
    ) -> Trace:
        bundle = self.runtime.bundle
        title = f"recording {part}, {'clean' if craft is None else 'attacked'}"
        with self.progress.track(title, len(index)) as advance:
            return record(
                self.runtime.backend,
                self._batches(index, craft),
                model=bundle.id,
                split=part,
                condition=condition,
                data_sha256=self.data.sha256,
                progress=lambda count: advance(count, ""),
            )

    def _batches(
        self,
        index: NDArray[np.int64],
        craft: Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]] | None,
    ) -> Iterator[Batch]:
        for part in np.array_split(index, range(BATCH, len(index), BATCH)):
            images = self.data.batch(part, self.runtime.bundle.manifest.input)
            labels = self.data.labels[part]
            yield (images if craft is None else craft(images, labels, part)), labels, part


def _entry(
    runtime: Runtime,
    calibration: Trace,
    held_out: Trace,
    attacked: Trace | None,
    measure: str,
    ensemble: bool,
    budgets: Mapping[str, Budget],
) -> PolicyEntry:
    manifest, backend = runtime.bundle.manifest, runtime.backend
    policy = uncalibrated(measure, len(manifest.exits), ensemble=ensemble)
    scorer = policy.scorer(len(manifest.classes))

    def judge(trace: Trace) -> Judge:
        return Judge(trace, scorer, manifest.cumulative_macs)

    points, named = frontier(judge(calibration), judge(held_out), judge(attacked) if attacked else None, budgets)
    evidence = [runtime.bundle.save_trace(trace) for trace in (held_out, attacked) if trace]
    return PolicyEntry(
        engine=backend.engine,
        precision=backend.precision,
        variant=backend.variant,
        trace=runtime.bundle.save_trace(calibration),
        evidence=tuple(evidence),
        measure=measure,
        ensemble=ensemble,
        temperatures=policy.temperatures,
        frontier=points,
        named=named,
        certificates=(),
        drift={},
    )


def _picture(bundle: Path, entry: PolicyEntry, name: str) -> Path:
    lines: dict[str, list[tuple[float, float]]] = {"clean": [], "attacked": []}
    for point in entry.frontier:
        for condition, outcome in (("clean", point.held_out), ("attacked", point.attacked)):
            if outcome is not None and outcome.accuracy is not None:
                lines[condition].append((outcome.mean_macs, outcome.accuracy))
    drawn = {f"{condition}, certification split": pairs for condition, pairs in lines.items() if pairs}
    marks = {name: entry.frontier[index].budget_macs for name, index in entry.named.items()}
    plots.accuracy_against_macs(drawn, marks, bundle / REPORT, f"{name}: promised")
    return bundle / REPORT

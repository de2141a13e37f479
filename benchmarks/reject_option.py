"""Measure whether the reject option keeps its bound, over random divisions of the held-out images of a bundle.

    python benchmarks/reject_option.py BUNDLE [--max-error 0.02 0.005] [--confidence 0.95] [--coverage 0.95]
        [--splits 20] [--unknown folder:PATH] [--max-unknown 0.1] [--data-dir DIR]

The held-out images are those of the splits calibration, certification and test, on which the network was not trained.
Their logits are recorded once. Each division cuts them at random, by group where there are groups, into three thirds.
One third calibrates (temperatures, score, thresholds, candidates), one certifies, and one measures the coverage and the
error among the answered. Images of the class that the run was trained without (`mexit train --omit-class`) are the
pictures of other things; for another bundle `--unknown` names them. The share of them that is answered is measured
twice: where they select no threshold, and where a third of them calibrates and a third certifies, as with
`mexit calibrate --reject-from`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from page import table, write_page

from mexit.calibrate.calibration import CalibrationConfig, CalibrationTraces, calibrate
from mexit.calibrate.reject import RejectRequest, RejectSamples, reject_outcome
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.commands.output import RichProgress
from mexit.core.trace import UNKNOWN, Origin, Trace
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import RiskInfeasible
from mexit.flows.calibrate import record_samples
from mexit.flows.sample_sources import SampleBatches
from mexit.runtime import Runtime
from mexit.runtime.reference import run_all_exits

HELD_OUT = ("calibration", "certification", "test")
NEEDED = 0.85  # share of the divisions that must keep the bound
BUDGETS = ("low", "medium", "high", "full")


@dataclass(frozen=True)
class Recorded:
    """The traces of all held-out images."""

    runtime: Runtime
    known: Trace
    unknown: Trace | None
    omitted: str


@dataclass(frozen=True)
class Measured:
    """One budget in one division, on the third that selected nothing."""

    coverage: float
    error: float
    unknown: float | None


def record(path: Path, unknown: str | None, data_dir: Path | None) -> Recorded:
    """Record the logits of the held-out images, known and unknown."""
    runtime = Runtime.open(path, "full", use_policies=False)
    data, splits = registry.load_bundle_data(runtime.bundle, data_dir)
    index = np.sort(np.concatenate([splits.part(name) for name in HELD_OUT]))
    settings = runtime.bundle.manifest.provenance.get("settings")
    omitted = settings.get("omit_class") if isinstance(settings, Mapping) else None
    others = None
    if omitted:
        of_class = data.labels[index] == data.classes.index(omitted)
        others, index = _trace(runtime, data, splits, index[of_class], UNKNOWN), index[~of_class]
    elif unknown:
        pictures = registry.load_any(unknown, data_dir)
        everything = np.arange(len(pictures), dtype=np.int64)
        others = _trace(runtime, pictures, None, everything, UNKNOWN)
    return Recorded(runtime, _trace(runtime, data, splits, index, "clean"), others, omitted or Path(unknown or "").name)


def _trace(runtime: Runtime, data: DataSet, splits: Splits | None, index: NDArray[np.int64], condition: str) -> Trace:
    spec, backend = runtime.bundle.manifest.input, runtime.backend
    batches = (
        (data.batch(rows, spec), data.labels[rows], rows) for rows in np.array_split(index, -(-len(index) // 64))
    )
    groups = None if splits is None else splits.groups_of(index)
    origin = Origin(runtime.bundle.id, backend.variant, backend.engine, backend.precision, "", "", data.sha256)
    samples = SampleBatches("held-out", condition, len(index), batches, groups)
    trace = record_samples(partial(run_all_exits, backend), samples, origin, RichProgress())
    return replace(trace, labels=None) if condition == UNKNOWN else trace


def thirds(trace: Trace, rng: np.random.Generator) -> list[Trace]:
    """Three random parts of a trace; a group lies in one part."""
    ids = np.arange(len(trace.index)) if trace.groups is None else trace.groups
    parts = np.array_split(rng.permutation(np.unique(ids)), 3)
    return [_rows(trace, np.flatnonzero(np.isin(ids, part))) for part in parts]


def _rows(trace: Trace, rows: NDArray[np.intp]) -> Trace:
    labels, groups = (None if array is None else array[rows] for array in (trace.labels, trace.groups))
    return Trace(trace.logits[:, rows], labels, trace.index[rows], trace.origin, groups)


def measure(recorded: Recorded, request: RejectRequest, seed: int, *, use_unknown: bool) -> dict[str, Measured]:
    """Calibrate on two thirds and measure on the last one, per named budget. Raises `RiskInfeasible`."""
    rng = np.random.default_rng(seed)
    costs = recorded.runtime.costs
    calibration, certification, test = thirds(recorded.known, rng)
    others = [None] * 3 if recorded.unknown is None else thirds(recorded.unknown, rng)
    selecting = others[:2] if use_unknown else (None, None)
    traces = CalibrationTraces(calibration, None, certification, None, *selecting)
    result = calibrate(traces, costs, CalibrationConfig(reject=request))
    unknown = None if others[2] is None else TraceEvaluator.of(others[2], result.scorer, costs)
    samples = RejectSamples(TraceEvaluator.of(test, result.scorer, costs), unknown)
    measured = {}
    for name, index in result.named.items():
        outcome = reject_outcome(samples, result.frontier[index])
        assert outcome is not None
        measured[name] = Measured(outcome.coverage, outcome.error, outcome.unknown_answered)
    return measured


def summarise(
    recorded: Recorded, request: RejectRequest, splits: int, target: float | None, *, use_unknown: bool
) -> list[str]:
    """A table with one row per budget, and the messages of divisions without a threshold.

    Args:
        recorded: the traces.
        request: the bound.
        splits: number of divisions.
        target: smallest median coverage that is asked for; None = nothing is asked for.
        use_unknown: whether pictures of other things select and test the thresholds too.
    """
    found, infeasible = [], []
    for seed in range(splits):
        try:
            found.append(measure(recorded, request, seed, use_unknown=use_unknown))
        except RiskInfeasible as error:
            infeasible.append(f"Division {seed}, exit code 3: {error}.")
    rows: list[list[object]] = []
    for name in BUDGETS:
        results = [one[name] for one in found if name in one]
        cells = _row(results, request, target, use_unknown=use_unknown)
        if 0 < len(results) < splits:
            cells[-1] = f"{cells[-1]}, where there is a threshold: {len(results)} of {splits}"
        rows.append([name, f"{len(results)} of {splits}", *cells])
    columns = ["budget", "with threshold", "bound kept", "error", "coverage", "other things answered", "verdict"]
    text = [table(columns, rows), *infeasible[:3]]
    if len(infeasible) > 3:
        text.append(f"{len(infeasible) - 3} further divisions end with exit code 3 too.")
    return text


def _row(
    results: Sequence[Measured], request: RejectRequest, target: float | None, *, use_unknown: bool
) -> list[object]:
    if not results:
        return ["-"] * 4 + ["no threshold"]
    coverages, errors = [one.coverage for one in results], [one.error for one in results]
    unknown = [one.unknown for one in results if one.unknown is not None]
    kept = sum(error <= request.max_error for error in errors)
    answered = _spread(unknown, 1) if unknown else "-"
    enough = kept >= NEEDED * len(results)
    if use_unknown:
        few = sum(share <= request.max_unknown for share in unknown)
        answered += f", within the bound in {few} of {len(unknown)}"
        enough = enough and few >= NEEDED * len(results)
    verdict = "kept" if enough else "not kept"
    if target is not None:
        verdict = "met" if enough and float(np.median(coverages)) >= target else "not met"
    return [f"{kept} of {len(results)}", _spread(errors, 2), _spread(coverages, 1), answered, verdict]


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{100 * value:.{digits}f}" for value in (min(values), float(np.median(values)), max(values)))
    return f"{middle} % ({low} to {high})"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--max-error", type=float, nargs="+", default=[0.02], help="the target is for the first one")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--coverage", type=float, default=0.95, help="target of the median coverage")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--unknown", help="pictures of other things: folder:PATH or a data set")
    parser.add_argument("--max-unknown", type=float, default=0.1)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    recorded = record(arguments.bundle, arguments.unknown, arguments.data_dir)
    manifest, known = recorded.runtime.bundle.manifest, recorded.known
    groups = "" if known.groups is None else f" in {len(np.unique(known.groups))} groups"
    wrong = known.logits[-1].argmax(axis=1) != known.labels
    parts = [
        f"Bundle `{manifest.name}`: {len(known.index)} held-out images{groups}; the last exit is wrong on "
        f"{wrong.mean():.2%} of them. Confidence {arguments.confidence:.0%}. Each row is one budget over "
        f"{arguments.splits} divisions: the divisions with a threshold, those that keep the bound on the third that "
        "selected nothing, and median, smallest and largest value there. A bound is kept if it holds in at least "
        f"{NEEDED:.0%} of the divisions with a threshold; a target is met if also the median coverage there is at "
        f"least {arguments.coverage:.0%}. The verdict names the number of these divisions unless it is all."
    ]
    for number, max_error in enumerate(arguments.max_error):
        request = RejectRequest(max_error, arguments.confidence, arguments.max_unknown)
        parts.append(f"## At most {max_error:.2%} wrong answers")
        target = arguments.coverage if number == 0 else None
        parts += summarise(recorded, request, arguments.splits, target, use_unknown=False)
        if recorded.unknown is not None:
            count, bound = len(recorded.unknown.index), request.max_unknown
            parts.append(
                f"Other things are {count} images of `{recorded.omitted}`. The table above does not use them to set "
                f"thresholds. With them, and at most {bound:.0%} of them answered (`--reject-from`):"
            )
            parts += summarise(recorded, request, arguments.splits, None, use_unknown=True)
    write_page(f"reject_option_{manifest.name}", "2-core-cpu", "Error and coverage of the reject option", parts)


if __name__ == "__main__":
    main()

"""`mexit calibrate`: record what the bundle answers on held-out data, set thresholds, say what they promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.calibrate.calibration import AUTO, CalibrationConfig, CalibrationResult, Traces
from mexit.calibrate.calibration import calibrate as decide
from mexit.calibrate.calibration_report import report
from mexit.calibrate.certificates import Request, to_json_value
from mexit.calibrate.score_selection import ScoreQuality
from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.atomic_io import to_json, write_bytes
from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.policies import PolicyEntry
from mexit.core.progress import Progress, Silent
from mexit.core.trace import Trace
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits, split
from mexit.errors import MexitError, UsageError
from mexit.evaluate import gradient_source, plots
from mexit.flows.sample_sources import BundleSource, DatasetSource, Samples, SampleSource, UnlabelledSource
from mexit.runtime.runtime import Runtime
from mexit.runtime.trace_recorder import record

IN_BUNDLE = "bundle"
REPORTS = Path("reports")


@dataclass(frozen=True)
class CalibrateResult:
    """What was calibrated.

    Attributes:
        bundle: its directory.
        entry: what was written to `policies.json`.
        cumulative_macs: cost of each exit, (E,).
        scores: how well each score ranks right above wrong answers.
        written: report and, with matplotlib, picture.
        why_not_attacked: the reason why nothing is promised under attack; empty if something is.
    """

    bundle: Path
    entry: PolicyEntry
    cumulative_macs: tuple[int, ...]
    scores: tuple[ScoreQuality, ...]
    written: tuple[Path, ...]
    why_not_attacked: str


def calibrate_bundle(
    bundle: Path | None = None,
    *,
    data: str | None = None,
    data_dir: str | Path | None = None,
    budgets: Mapping[str, str] | None = None,
    measure: str = AUTO,
    ensemble: bool | None = None,
    policy: str = "search",
    attack: str = "average",
    max_risk: float | None = None,
    confidence: float = 0.95,
    loss: str = "early-error",
    risk_method: str = AUTO,
    max_cost: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Calibrate a bundle for one engine.

    Args:
        bundle: a directory; default the newest bundle.
        data: default the bundle's own data set with its stored splits, or the images in the bundle where that is
            not at hand; `bundle` insists on those; another (`folder:PATH`) is split anew. Pictures without class
            folders have no labels: temperatures stay 1, the score is the first unless one is named, thresholds are
            geometric, and of the losses only `disagreement` can be certified.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        budgets: further budgets by name, as typed (`{"mine": "40%"}`).
        measure, ensemble, policy: see `calibrate.calibration.CalibrationConfig`.
        attack: `average`, `max-average` or `none`: under which the promise is also measured.
        max_risk, confidence, loss, risk_method, max_cost: see `calibrate.certificates.Request`; no certificate without
            `max_risk`.
        backend, threads: the engine to calibrate.
        progress: who listens.

    Raises:
        NotFound, Damaged, UsageError, BadInput: bundle or data are not what they should be.
        BudgetInfeasible: a budget below the cost of exit 1.
        RiskInfeasible: the risk cannot be certified on this much data; nothing was changed.
    """
    progress = progress or Silent()
    path = bundle or newest(BUNDLES, progress)
    runtime = Runtime.open(path, "full", backend=backend, threads=threads, use_policies=False)
    costs = runtime.bundle.manifest.cumulative_macs
    typed = {_free(name): Budget.parse(text) for name, text in (budgets or {}).items()}
    bound = None if max_cost is None else Budget.parse(max_cost).macs(costs)
    for budget in typed.values():
        budget.macs(costs)
    request = None if max_risk is None else Request(max_risk, confidence, loss, risk_method, bound)
    wish = CalibrationConfig(measure, ensemble, policy, typed, request)
    pool, why_not = _pool(runtime.bundle, data, data_dir, attack, progress)
    _need_labels(pool, request)
    traces = _record(runtime, pool, attack, progress)
    found = decide(traces, runtime.costs, wish)
    entry = _entry(runtime.bundle, traces, found)
    runtime.bundle.save_policies(runtime.bundle.policies_or_empty().with_entry(entry))
    written = _write_report(path, runtime.bundle.manifest.name, entry, report(found, traces.certification))
    if why_not:
        progress.note(f"nothing is promised under attack: {why_not}")
    return CalibrateResult(path, entry, costs, found.scores, written, why_not)


def _free(name: str) -> str:
    """A name that does not mean a budget already."""
    try:
        Budget.parse(name)
    except UsageError:
        return name
    raise UsageError(f"'{name}' means a budget already: choose another name for yours")


def _need_labels(pool: SampleSource, request: Request | None) -> None:
    if isinstance(pool, UnlabelledSource) and request is not None and request.loss != "disagreement":
        raise UsageError(
            f"{pool.pictures.name} has no labels, which the loss {request.loss} needs: add --loss disagreement, "
            "or put the pictures into one folder a class"
        )


def _record(runtime: Runtime, pool: SampleSource, attack: str, progress: Progress) -> Traces:
    """The traces of this engine."""

    def trace(samples: Samples) -> Trace:
        with progress.track(f"recording {samples.split}, {samples.condition[:24]}", samples.n) as advance:
            return record(
                runtime.backend,
                samples.batches,
                model=runtime.bundle.id,
                split=samples.split,
                condition=samples.condition,
                data_sha256=pool.data_sha256,
                progress=lambda count: advance(count, ""),
            )

    found: dict[str, Trace | None] = {}
    for split_name in ("calibration", "certification"):
        attacked = pool.attacked(split_name) if attack != "none" else None
        found[split_name] = trace(pool.clean(split_name))
        found[f"{split_name}_attacked"] = trace(attacked) if attacked else None
    calibration, certification = found["calibration"], found["certification"]
    assert calibration is not None
    assert certification is not None
    attacked_traces = found["calibration_attacked"], found["certification_attacked"]
    return Traces(calibration, attacked_traces[0], certification, attacked_traces[1])


def _pool(
    bundle: Bundle, data: str | None, data_dir: str | Path | None, attack: str, progress: Progress
) -> tuple[SampleSource, str]:
    """Where samples come from: what was named, else the bundle's own data set, else the images in the bundle.

    Also why there are none under attack (empty if there are).
    """
    travelling = BundleSource.of(bundle)
    if data == IN_BUNDLE or (data is None and travelling is not None and not _at_hand(bundle, data_dir)):
        if travelling is None:
            raise UsageError(
                f"{bundle.path} carries no images: mexit export --with-calibration-images puts them in"
            )
        progress.note(f"using the images in {bundle.path}")
        why_not = "" if travelling.attacked("certification") else "the bundle carries no attacked images"
        return travelling, "no attack was asked for" if attack == "none" else why_not
    pictures = None if data is None else registry.load_unlabelled(data)
    if pictures is not None:
        progress.note(f"{data} has no labels: of its {len(pictures)} pictures half calibrate and half certify")
        why_not = "no attack was asked for" if attack == "none" else f"{data} has no labels to attack"
        return UnlabelledSource(pictures, bundle.manifest.input), why_not
    data_set, splits = _data(bundle, data, data_dir)
    source, why_not = (None, "no attack was asked for")
    if attack != "none" and data is None:
        source, why_not = gradient_source.of_bundle_or_why_not(bundle)
    elif attack != "none":
        why_not = f"{data} is not the data that the run was trained on"
    return DatasetSource(data_set, splits, bundle.manifest.input, source, attack), why_not


def _at_hand(bundle: Bundle, data_dir: str | Path | None) -> bool:
    """Whether the data set that the bundle was made from can be read here."""
    try:
        _data(bundle, None, data_dir)
    except MexitError:
        return False
    return True


def _data(bundle: Bundle, data: str | None, data_dir: str | Path | None) -> tuple[DataSet, Splits]:
    stored = bundle.splits()
    if data is not None:
        data_set = registry.load(data, data_dir)
        if data_set.classes != bundle.manifest.classes:
            raise UsageError(f"{data} has the classes {data_set.classes}, {bundle.path} {bundle.manifest.classes}")
        if bundle.manifest.splits is None or data_set.sha256 != bundle.manifest.splits.sha256:
            return data_set, split(data_set)
    elif bundle.manifest.splits is None:
        raise UsageError(f"{bundle.path} stores no splits: add --data")
    else:
        data_set = registry.load(bundle.manifest.splits.data_set, data_dir)
    assert stored is not None
    splits = Splits.from_bytes(stored, bundle.path / "splits.npz")
    splits.check(data_set)
    return data_set, splits


def _entry(bundle: Bundle, traces: Traces, found: CalibrationResult) -> PolicyEntry:
    origin = traces.calibration.origin
    refs = [bundle.save_trace(trace) for trace in traces.all]
    return PolicyEntry(
        engine=origin.engine,
        precision=origin.precision,
        variant=origin.variant,
        trace=refs[0],
        evidence=tuple(refs[1:]),
        measure=found.scorer.measure,
        ensemble=found.scorer.ensemble,
        temperatures=found.scorer.temperatures,
        frontier=found.frontier,
        named=found.named,
        certificates=(to_json_value(found.certificate),) if found.certificate else (),
        drift=found.drift,
    )


def _write_report(bundle: Path, name: str, entry: PolicyEntry, content: Mapping[str, Any]) -> tuple[Path, ...]:
    written = [bundle / REPORTS / "calibration.json"]
    write_bytes(written[0], to_json(content))
    if plots.available():
        written.append(bundle / REPORTS / "calibration.png")
        marks = {budget: entry.frontier[index].budget_macs for budget, index in entry.named.items()}
        plots.calibration(content, marks, written[-1], name)
    return tuple(written)

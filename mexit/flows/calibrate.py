"""`mexit calibrate`: record traces of a bundle on held-out data, select thresholds, and store both in the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mexit.calibrate import expected
from mexit.calibrate.calibration import (
    AUTO,
    CalibrationConfig,
    CalibrationResult,
    CalibrationTraces,
    calibrate,
    report,
)
from mexit.calibrate.certificates import CertificateRequest
from mexit.calibrate.hypothesis_tests import check_share
from mexit.calibrate.lost_settings import LostSettings, lost_settings
from mexit.calibrate.reject import RejectRequest
from mexit.calibrate.score_selection import ScoreQuality
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.atomic_io import to_json, write_bytes
from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.cost import Costs
from mexit.core.policies_file import PolicyEntry
from mexit.core.progress import Progress, Silent
from mexit.core.scores import Scorer
from mexit.core.trace import Origin, Trace
from mexit.errors import MexitError, UsageError
from mexit.evaluate import plots
from mexit.flows.calibration_source import choose_source, default_attack, unknown_source
from mexit.flows.sample_sources import Images, Logits, SampleBatches, SampleSource, UnlabelledSource
from mexit.runtime.latency_profile import Profile
from mexit.runtime.profile_cache import stored_profile
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime
from mexit.runtime.time_policies import note_timing
from mexit.runtime.trace_recorder import record_trace

REPORTS = Path("reports")
ATTACKS = ("none", "single", "average", "max-average")
_MAX_RISK = (("max_risk",), "--max-risk, such as 0.02")
_BELONGS_TO = {  # an option to the options of which one must be given too, and the words for them
    "loss": _MAX_RISK,
    "risk_method": _MAX_RISK,
    "max_cost": _MAX_RISK,
    "confidence": (("max_risk", "max_error", "target_drop"), "--max-risk, --target-drop or --max-error"),
    "reject_from": (("max_error",), "--max-error, such as 0.02"),
    "max_unknown": (("reject_from",), "--reject-from, such as folder:PATH"),
}
CLEAN_RUN = "the run was trained on clean images (--attack average measures it)"


@dataclass(frozen=True)
class CalibrateOptions:
    """The settings of `calibrate_bundle`.

    Attributes:
        budgets: further budgets by name, as typed after `--budget`, such as `{"night": "30%"}`.
        measure: confidence score: "max-probability", "margin", "entropy", "agreement", or "auto" = selected.
        ensemble: exit k answers with the mean of exits 1..k; None = selected with "auto", else off.
        policy: how thresholds are selected: "search", or "geometric" (MSDNet).
        attack: attack under which cost and accuracy are measured too: "single", "average", "max-average" or "none".
            None = "none" for a run that was trained on clean images, else "average".
        max_risk: certify that the mean loss is at most this value, in (0, 1); None = no certificate.
        confidence: of the certificates and of the reject option, in (0, 1), of each for itself; None = 0.95.
        loss: certified loss: "early-error", "disagreement" or "accuracy-gap"; None = "early-error".
        risk_method: test: "binomial", "betting", or "auto"; None = "auto".
        max_cost: certify this bound on the mean cost too, written as a budget, such as "50%".
        max_error: reject option: of the answers given at most this share is wrong, in (0, 1); other inputs are
            "unsure". None = every input has an answer.
        target_drop: certify the budget `target`: the cheapest one that loses at most this share of the accuracy of the
            static network, in (0, 1).
        cost: "time": measure and select budgets in time too, for the device cache; "macs": only the stored policies.
        reject_from: pictures of other things that the reject option must withhold: "folder:PATH" or a data set.
        max_unknown: largest share of such pictures that is answered, in (0, 1); None = 0.1.
        device: device of the torch network that crafts the attack: "auto", "cpu" or "cuda".

    Raises:
        UsageError: an option without the one that it belongs to, such as `loss` without `max_risk`, an unknown attack,
            or a `target_drop` outside (0, 1).
    """

    budgets: Mapping[str, str] = field(default_factory=dict)
    measure: str = AUTO
    ensemble: bool | None = None
    policy: str = "search"
    attack: str | None = None
    max_risk: float | None = None
    confidence: float | None = None
    loss: str | None = None
    risk_method: str | None = None
    max_cost: str | None = None
    max_error: float | None = None
    target_drop: float | None = None
    cost: str = "macs"
    reject_from: str | None = None
    max_unknown: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, (others, remedy) in _BELONGS_TO.items():
            if getattr(self, name) is not None and all(getattr(self, other) is None for other in others):
                raise UsageError(f"--{name.replace('_', '-')} has no effect alone: add {remedy}")
        if self.attack not in (None, *ATTACKS):
            raise UsageError(f"unknown attack '{self.attack}': choose from {', '.join(ATTACKS)}")
        if self.target_drop is not None:
            check_share("--target-drop", self.target_drop)

    def config(self, costs: Costs) -> CalibrationConfig:
        """Parse the budgets and the certificate for a bundle with these costs of its exits.

        Raises:
            UsageError: an unknown setting, or a budget name that already is a budget.
            BudgetInfeasible: a budget below the cost of exit 1.
        """
        budgets = {_check_name(name): Budget.parse(text) for name, text in self.budgets.items()}
        for budget in budgets.values():
            budget.cost(costs)
        max_macs = None if self.max_cost is None else Budget.parse(self.max_cost).cost(costs)
        request = (
            None
            if self.max_risk is None
            else CertificateRequest(
                self.max_risk,
                max_macs=max_macs,
                **_given(confidence=self.confidence, loss=self.loss, method=self.risk_method),
            )
        )
        reject = (
            None
            if self.max_error is None
            else RejectRequest(self.max_error, **_given(confidence=self.confidence, max_unknown=self.max_unknown))
        )
        target = (
            None
            if self.target_drop is None
            else CertificateRequest(self.target_drop, loss="accuracy-gap", **_given(confidence=self.confidence))
        )
        return CalibrationConfig(self.measure, self.ensemble, self.policy, budgets, request, reject, target)


@dataclass(frozen=True)
class CalibrateResult:
    """The result of `calibrate_bundle`.

    Attributes:
        bundle: its directory.
        entry: the policies written to `policies.json`.
        cumulative_macs: cost of each exit in MACs, (E,).
        scores: how well each confidence score ranks correct above wrong predictions.
        written: the reports and, with matplotlib, the plot.
        expected: expected and test results of each budget, see `calibrate.expected.expected_and_test`.
        why_not_attacked: the reason why nothing is measured under attack; empty if it is.
        unavailable: named budgets that cannot keep the bound of the reject option.
        timed: the policies in time that were stored in the device cache; None where none were requested or possible.
        profile: times of this device, measured for `timed` or earlier; None where none were measured.
        lost: what the replaced calibration had and this one has not.
    """

    bundle: Path
    entry: PolicyEntry
    cumulative_macs: tuple[int, ...]
    scores: tuple[ScoreQuality, ...]
    written: tuple[Path, ...]
    why_not_attacked: str
    expected: Mapping[str, Any]
    unavailable: tuple[str, ...] = ()
    timed: PolicyEntry | None = None
    profile: Profile | None = None
    lost: tuple[LostSettings, ...] = ()


def calibrate_bundle(
    bundle: Path | str | None = None,
    *,
    options: CalibrateOptions = CalibrateOptions(),
    data: str | None = None,
    data_dir: str | Path | None = None,
    backend: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Calibrate a bundle for one engine.

    Args:
        bundle: its directory; default the newest bundle.
        options: budgets, score, attack and certificate.
        data: the samples. Default: the bundle's own data set with its stored splits, or, where that cannot be read,
            the images in the bundle. "bundle" takes those images. Another data set ("folder:PATH") is split anew.
            A folder of pictures without class folders has no labels: temperatures stay 1, the score is
            max-probability unless named, thresholds are geometric, and only `disagreement` can be certified.
        data_dir: directory of data sets; default `MEXIT_DATA`.
        backend, threads: the engine to calibrate, and its number of threads.
        progress: receives notes and progress; default none.

    Raises:
        NotFound, Damaged, UsageError, BadInput: the bundle or the data cannot be used.
        BudgetInfeasible: a budget below the cost of exit 1.
        RiskInfeasible: the risk or the error among the answered cannot be certified on this data; the bundle is
            unchanged.
    """
    progress = progress or Silent()
    path = Path(bundle) if bundle else newest(BUNDLES, progress)
    runtime = Runtime.open(path, "full", backend=backend, threads=threads, use_policies=False)
    cumulative_macs = runtime.bundle.manifest.cumulative_macs
    config = options.config(runtime.costs)
    attack = options.attack or default_attack(runtime.bundle.manifest.provenance.get("settings"))
    source, why_not = choose_source(runtime.bundle, data, data_dir, attack, options.device, progress)
    if options.attack is None and attack == "none":
        why_not = CLEAN_RUN
    _check_labels(source, config)
    unknown = unknown_source(runtime.bundle, options.reject_from, data_dir, progress)
    traces = _record_traces(runtime, source, unknown, attack, progress)
    result = calibrate(traces, runtime.costs, config)
    before = runtime.bundle.policies_or_empty()
    entry = _store(runtime.bundle, traces, result, options)
    written = _write_report(
        path, runtime.bundle.manifest.name, entry, report(result, traces.certification, runtime.bundle.manifest.numbers)
    )
    table = _measure_test(runtime, source, traces.certification, entry, progress)
    written = (*written, expected.save(path, runtime.bundle.id, table))
    unavailable = result.rejection.unavailable if result.rejection else ()
    timed, profile = None, stored_profile(runtime.bundle, runtime.backend, runtime.threads)
    if options.cost == "time":
        again = Runtime(runtime.bundle, runtime.backend, "full", threads=runtime.threads)
        again.use_time(again=True)
        note_timing(again.timing, again.why_not_time, progress.note)
        if again.timing is not None:
            timed, profile = again.timing.entry, again.timing.profile
    if why_not:
        progress.note(f"nothing is promised under attack: {why_not}")
    lost = lost_settings(before, runtime.bundle.policies(), path)
    return CalibrateResult(
        path, entry, cumulative_macs, result.scores, written, why_not, table, unavailable, timed, profile, lost
    )


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _check_name(name: str) -> str:
    """A name that is not itself a budget."""
    try:
        Budget.parse(name)
    except UsageError:
        return name
    raise UsageError(f"'{name}' means a budget already: choose another name for yours")


def _check_labels(source: SampleSource, config: CalibrationConfig) -> None:
    if not isinstance(source, UnlabelledSource):
        return
    name, request = source.images.name, config.certify
    if config.reject is not None or config.target is not None:
        option = "--max-error" if config.reject is not None else "--target-drop"
        raise UsageError(f"{name} has no labels, which {option} needs: put the pictures into one folder per class")
    if request is not None and request.loss != "disagreement":
        raise UsageError(
            f"{name} has no labels, which the loss {request.loss} needs: add --loss disagreement, "
            "or put the pictures into one folder per class"
        )


def record_samples(
    run_batch: Callable[[Images], Logits], samples: SampleBatches, origin: Origin, progress: Progress
) -> Trace:
    """Record the trace of some samples.

    Args:
        run_batch: images (B, C, H, W) to the logits of every exit (E, B, C).
        samples: of one split under one condition.
        origin: its split and condition are replaced by those of the samples.
        progress: shows the number of samples.
    """
    origin = replace(origin, split=samples.split, condition=samples.condition)
    with progress.track(f"recording {samples.split}, {samples.condition[:24]}", samples.n) as advance:
        trace = record_trace(run_batch, samples.batches, origin, lambda count: advance(count, ""))
    return replace(trace, groups=samples.groups)


def _measure_test(
    runtime: Runtime, source: SampleSource, certification: Trace, entry: PolicyEntry, progress: Progress
) -> dict[str, Any]:
    """Expected and test results. The test split is read here for the first time, after everything was selected."""
    scorer = Scorer(entry.measure, entry.ensemble, entry.temperatures, certification.logits.shape[2])
    evaluator = TraceEvaluator.of(certification, scorer, runtime.costs)
    try:
        test = source.test()
        if test.samples is None:
            return expected.expected_and_test(entry, evaluator, None, missing=test.missing)
        run_batch = partial(run_all_exits, runtime.backend)
        trace = record_samples(run_batch, test.samples, certification.origin, progress)
    except MexitError as error:  # the bundle is calibrated without test results
        return expected.expected_and_test(entry, evaluator, None, missing=f"the test images cannot be used: {error}")
    tested, classes = TraceEvaluator.of(trace, scorer, runtime.costs), runtime.bundle.manifest.classes
    return expected.expected_and_test(entry, evaluator, tested, of=test.of, classes=classes)


def _record_traces(
    runtime: Runtime, source: SampleSource, unknown: SampleSource | None, attack: str, progress: Progress
) -> CalibrationTraces:
    backend = runtime.backend

    def trace(samples: SampleBatches, source: SampleSource = source) -> Trace:
        key = (runtime.bundle.id, backend.variant, backend.engine, backend.precision)
        origin = Origin(*key, "", "", source.data_sha256)
        return record_samples(partial(run_all_exits, backend), samples, origin, progress)

    def both(split_name: str) -> tuple[Trace, Trace | None]:
        attacked = source.attacked(split_name) if attack != "none" else None
        return trace(source.clean(split_name)), trace(attacked) if attacked else None

    others = (
        () if unknown is None else (trace(unknown.clean(name), unknown) for name in ("calibration", "certification"))
    )
    return replace(CalibrationTraces(*both("calibration"), *both("certification"), *others), data_size=source.size)


def _store(
    bundle: Bundle, traces: CalibrationTraces, result: CalibrationResult, options: CalibrateOptions
) -> PolicyEntry:
    """Save the traces and the policies in the bundle."""
    origin = traces.calibration.origin
    refs = [bundle.save_trace(trace) for trace in traces.all]
    entry = PolicyEntry(
        engine=origin.engine,
        precision=origin.precision,
        variant=origin.variant,
        trace=refs[0],
        evidence=tuple(refs[1:]),
        measure=result.scorer.measure,
        ensemble=result.scorer.ensemble,
        temperatures=result.scorer.temperatures,
        frontier=result.frontier,
        named=result.named,
        certificates=tuple(asdict(certificate) for certificate in result.certificates),
        drift=result.drift,
        reject=replace(result.rejection.terms, reject_from=options.reject_from) if result.rejection else None,
        budgets=dict(options.budgets),
    )
    bundle.save_policies(bundle.policies_or_empty().with_entry(entry))
    return entry


def _write_report(bundle: Path, name: str, entry: PolicyEntry, content: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write the report and, with matplotlib, the plot."""
    written = [bundle / REPORTS / "calibration.json"]
    write_bytes(written[0], to_json(content))
    if plots.available():
        written.append(bundle / REPORTS / "calibration.png")
        budgets = {", ".join(names): point.budget_macs for names, point in entry.by_policy()}
        plots.calibration(content, budgets, written[-1], name)
    return tuple(written)

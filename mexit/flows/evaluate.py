"""`mexit evaluate`: accuracy on the test split, per exit and per budget, clean and under attack.

A run is judged in torch. A bundle is judged as deployed: attacked images are made with the gradients of the run
behind it, answered by the exported segments, and decided by the calibrated policies. Which attacks: `attack_plan`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.artifact_paths import BUNDLES, RUNS, newest
from mexit.core.atomic_io import to_json, write_bytes
from mexit.core.progress import Progress, Silent
from mexit.errors import UsageError
from mexit.evaluate import plots
from mexit.evaluate.config import EvaluationConfig
from mexit.evaluate.model_card import model_card
from mexit.evaluate.results import AttackResults, curve, per_budget, per_exit, transfer
from mexit.evaluate.target import BATCH, EvaluationTarget, Labels, Logits, open_run, open_subject, spaced

SAMPLES = 1000
REPORTS = Path("reports")
JSON, PICTURE, TRANSFER, CURVE, CARD = (
    "evaluation.json",
    "evaluation.png",
    "transfer.png",
    "accuracy_against_eps.png",
    "model_card.md",
)


@dataclass(frozen=True)
class EvaluateResult:
    """What was found.

    Attributes:
        report: as `--json` prints it: exits, budgets, transfer, curve, checks, flags, settings.
        written: JSON, pictures, model card.
    """

    report: Mapping[str, Any]
    written: tuple[Path, ...]


def evaluate_model(
    source: Path | None = None,
    *,
    data_dir: str | Path | None = None,
    samples: int | None = SAMPLES,
    eps: float | None = None,
    steps: int | None = None,
    backend: str = "auto",
    plan: EvaluationConfig | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Evaluate a run or a bundle on the test split.

    Args:
        source: a run or a bundle; default the newest bundle, else the newest run.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        samples: at most so many test images, evenly spaced; None = all.
        eps, steps: of the attacks; default the run's own test setting.
        backend: the engine of a bundle.
        plan: which attacks; None = PGD.
        progress: who listens.

    Raises:
        UsageError: numbers that cannot be.
        NotFound, StalePolicy: the run behind a bundle is gone or another one.
        MissingExtra: torch, or for some attacks `pyautoattack`, is not installed.
    """
    progress, plan, begin = progress or Silent(), plan or EvaluationConfig(), time.monotonic()
    subject = open_subject(source or _newest(progress), data_dir, backend)
    _check(plan, subject)
    index = subject.test_places(samples)
    strong = spaced(len(index), plan.strong_samples)
    attack = subject.network.attack("average", eps, steps)
    attack = replace(attack, pgd=replace(attack.pgd, restarts=plan.restarts))
    evidence = AttackResults(subject.data.labels[index], strong, _judge(subject, index, attack.pgd, progress))
    more = _strong_groups(subject, plan, index[strong], attack.pgd, evidence, progress)
    report = {
        "exits": per_exit(evidence),
        "budgets": per_budget(evidence, subject),
        "transfer": transfer(evidence),
        **more,
        "settings": _settings(subject, plan, index, strong, attack)
        | {"seconds": round(time.monotonic() - begin, 1)},
    }
    return EvaluateResult(report, _write(subject, report))


def _newest(progress: Progress) -> Path:
    return newest(BUNDLES if (BUNDLES / "latest").exists() else RUNS, progress)


def _check(plan: EvaluationConfig, subject: EvaluationTarget) -> None:
    """What would otherwise fail after long work."""
    from mexit.attacks.autoattack import import_pyautoattack

    plan.chosen_exits(subject.network.model.exits)
    if plan.wants("policy") or plan.wants("autoattack"):
        import_pyautoattack()
    if plan.transfer is not None:
        other = open_run(plan.transfer)[0].model
        model = subject.network.model
        if (other.input_shape, other.classes) != (model.input_shape, model.classes):
            raise UsageError(
                f"--transfer {plan.transfer} takes {other.input_shape} images of {other.classes} classes, this "
                f"network {model.input_shape} of {model.classes}: name a run on the same data"
            )


def _judge(subject: EvaluationTarget, index: Labels, steps: Any, progress: Progress) -> dict[str, Logits]:
    """Logits (E, N, C) under every condition of `pgd`: clean, noise, average, max-average, one attack an exit."""
    from mexit.evaluate.suites import pgd_suite

    model = subject.network.model
    found: dict[str, list[Logits]] = {}
    with progress.track(f"attacking {len(index)} test images", len(index)) as advance:
        for part in np.array_split(index, range(BATCH, len(index), BATCH)):
            images, labels = subject.batch(part)
            for name, attacked in pgd_suite(model, images, labels, part, steps).items():
                found.setdefault(name, []).append(subject.answer(attacked))
            advance(len(part), "")
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}


def _strong_groups(
    subject: EvaluationTarget,
    plan: EvaluationConfig,
    index: Labels,
    steps: Any,
    evidence: AttackResults,
    progress: Progress,
) -> dict[str, Any]:
    """Adds to the evidence; returns the parts of the report that are no accuracy of an exit or a budget."""
    from mexit.evaluate import flow_checks, suites

    images, labels = subject.batch(index)
    place = suites.AttackContext(subject, plan, progress, images, labels, index, steps)
    points: list[dict[str, Any]] = []
    found = []
    if plan.wants("policy"):
        suites.attack_policies(place, evidence)
    if plan.wants("autoattack"):
        warnings = suites.auto_attack_all(place, evidence)
        found += flow_checks.of_autoattack(place, evidence, warnings)
    if plan.wants("slowdown"):
        suites.slow_policies(place, evidence)
    if plan.wants("sanity"):
        judged = suites.radii(place)
        points = curve(judged, labels, subject)
        found += flow_checks.of_curve(place, judged)
    found = [*flow_checks.cheap(place, evidence), *flow_checks.of_black_box(place, evidence), *found]
    flags = [f"{check.name}: {check.found}, expected {check.expected}; {check.means}" for check in found
             if not check.passed]  # fmt: skip
    return {"curve": points, "checks": [flow_checks.to_json(check) for check in found], "flags": flags}


def _settings(
    subject: EvaluationTarget, plan: EvaluationConfig, index: Labels, strong: NDArray[np.int64], attack: Any
) -> dict[str, Any]:
    steps = attack.pgd
    return {
        "source": str(subject.path),
        "data": subject.data.name,
        "data_sha256": subject.data.sha256,
        "split": "test",
        "n": len(index),
        "strong_n": len(strong) if set(plan.groups) - {"pgd"} else 0,
        "of": len(subject.splits.part("test")),
        "attack": attack.describe(),
        "eps": steps.eps,
        "step": steps.step_size,
        "steps": steps.steps,
        "restarts": steps.restarts,
        "attacks": list(plan.groups),
        "exits": ",".join(map(str, plan.exits)) if plan.exits else "all",
        "targets": plan.targets,
        "queries": plan.queries,
        "autoattack_steps": plan.autoattack_steps,
        "transfer_from": None if plan.transfer is None else str(plan.transfer),
        "seed": 0,
        "precision": "fp32",
    }


def _write(subject: EvaluationTarget, report: Mapping[str, Any]) -> tuple[Path, ...]:
    folder = subject.path / REPORTS
    written = [folder / JSON]
    write_bytes(written[0], to_json(report))
    if plots.available():
        title = f"{subject.path.name}: test split"
        written.append(folder / PICTURE)
        plots.accuracy_against_macs(*_picture(subject, report), written[-1], title)
        written.append(folder / TRANSFER)
        plots.transfer([[cell["value"] for cell in row] for row in report["transfer"]], written[-1], title)
        if report["curve"]:
            written.append(folder / CURVE)
            plots.accuracy_against_eps(report["curve"], report["settings"]["eps"], written[-1], title)
    written.append(folder / CARD)
    write_bytes(written[-1], model_card(subject, report).encode())
    return tuple(written)


def _picture(subject: EvaluationTarget, report: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    costs = subject.cumulative_macs
    lines: dict[str, Any] = {}
    for name, condition in (("clean", "clean"), ("attacked", "average")):
        if report["budgets"]:
            lines[f"{name}, per budget"] = [
                (row[condition]["mean_macs"], row[condition]["value"]) for row in report["budgets"].values()
            ]
        lines[f"{name}, single exits"] = [
            (costs[row["exit"] - 1], row[condition]["value"]) for row in report["exits"]
        ]
    return lines, {name: row["budget_macs"] for name, row in report["budgets"].items()}

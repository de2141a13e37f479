"""The group corruptions: accuracy and cost of every exit and budget under the 15 common corruptions.

No gradient is needed, so the network may have been trained in any way. Standard errors of means are over images: the
conditions of one image are averaged first, because they are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.attacks.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mexit.attacks.soft_policy import Decision, decide
from mexit.calibrate.clusters import mean_with_error
from mexit.core.cost import exit_counts, mean_macs
from mexit.core.progress import Progress
from mexit.data.dataset import split_batches
from mexit.evaluate.results import accuracy, accuracy_and_cost
from mexit.evaluate.target import EvaluationTarget, Index, Labels, Logits
from mexit.train.validation import correct_predictions

Condition = tuple[str, int]
PerImage = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What the exits and budgets answered under one condition. Logits are not kept: there are 75 conditions.

    Attributes:
        correct: whether each exit was correct, (E, N).
        decisions: exits and classes by budget, (N,) each.
    """

    correct: NDArray[np.bool_]
    decisions: Mapping[str, Decision]

    @staticmethod
    def of(logits: Logits, labels: Labels, target: EvaluationTarget) -> Outcome:
        """The outcome of logits (E, N, C) with labels (N,)."""
        decisions = {name: decide(budget.policy, logits) for name, budget in target.budgets.items()}
        return Outcome(correct_predictions(logits, labels), decisions)

    @staticmethod
    def join(parts: Sequence[Outcome]) -> Outcome:
        """The outcome of several batches."""
        decisions = {
            name: Decision(
                np.concatenate([part.decisions[name].exits for part in parts]),
                np.concatenate([part.decisions[name].classes for part in parts]),
            )
            for name in parts[0].decisions
        }
        return Outcome(np.concatenate([part.correct for part in parts], axis=1), decisions)


def run_corruptions_group(target: EvaluationTarget, index: Index, progress: Progress) -> dict[Condition, Outcome]:
    """The group corruptions: the outcome under every corruption and severity on the images at `index`, (N,)."""
    conditions = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    parts: dict[Condition, list[Outcome]] = {condition: [] for condition in conditions}
    progress.note(f"corruptions: {len(index)} images, {len(CORRUPTIONS)} corruptions x {len(SEVERITIES)} severities")
    with progress.track("corrupting images", len(index) * len(conditions)) as advance:
        for batch in split_batches(index, target.batch):
            images, labels = target.load(batch)
            for name, severity in conditions:
                logits = target.run_batch(corrupt(images, batch, name, severity))
                parts[name, severity].append(Outcome.of(logits, labels, target))
                advance(len(batch), name)
    return {condition: Outcome.join(outcomes) for condition, outcomes in parts.items()}


def corruption_report(
    outcomes: Mapping[Condition, Outcome],
    clean_logits: Logits,
    labels: Labels,
    target: EvaluationTarget,
    groups: Index | None = None,
) -> dict[str, Any]:
    """The report's `corruptions`.

    Args:
        outcomes: by condition, of N images.
        clean_logits: of the same images without corruption, (E, N, C).
        labels: (N,).
        target: its budgets and costs.
        groups: group ids (N,), which standard errors count; None without groups.

    Returns:
        `clean`, `conditions` (one row for each corruption and severity), `per_corruption` (means over severities) and
        `mean` (over all conditions). Means have `drop`: clean minus corrupted accuracy, paired over images.
    """
    clean = Outcome.of(clean_logits, labels, target)
    names = dict.fromkeys(name for name, _ in outcomes)
    severities = {name: [outcome for (one, _), outcome in outcomes.items() if one == name] for name in names}
    return {
        "clean": _condition_row(clean, labels, target, groups),
        "conditions": [
            {"corruption": name, "severity": severity} | _condition_row(outcome, labels, target, groups)
            for (name, severity), outcome in outcomes.items()
        ],
        "per_corruption": [
            {"corruption": name} | _mean_row(own, clean, labels, target, groups) for name, own in severities.items()
        ],
        "mean": _mean_row(list(outcomes.values()), clean, labels, target, groups),
    }


def _condition_row(outcome: Outcome, labels: Labels, target: EvaluationTarget, groups: Index | None) -> dict[str, Any]:
    """Accuracy of every exit, and accuracy and cost of every budget, under one condition."""
    budgets = {
        name: accuracy_and_cost(budget, outcome.decisions[name], labels, target.costs, groups)
        for name, budget in target.budgets.items()
    }
    return {"exits": [accuracy(correct, groups) for correct in outcome.correct], "budgets": budgets}


def _mean_row(
    own: Sequence[Outcome], clean: Outcome, labels: Labels, target: EvaluationTarget, groups: Index | None
) -> dict[str, Any]:
    """Means over several conditions; cost and exits taken are those of all images under all of them."""
    exits = [
        _mean_accuracy((outcome.correct[k] for outcome in own), clean.correct[k], groups)
        for k in range(len(clean.correct))
    ]
    budgets = {}
    for name, budget in target.budgets.items():
        right = (outcome.decisions[name].classes == labels for outcome in own)
        taken = np.concatenate([outcome.decisions[name].exits for outcome in own])
        cost, counts = mean_macs(taken, budget.exit_macs), exit_counts(taken, len(exits))
        budgets[name] = _mean_accuracy(right, clean.decisions[name].classes == labels, groups) | {
            "mean_macs": cost,
            "saved": 1 - cost / target.costs.static,
            "exit_shares": (counts / len(taken)).tolist(),
        }
    return {"exits": exits, "budgets": budgets}


def _mean_accuracy(
    conditions: Iterable[NDArray[np.bool_]], clean: NDArray[np.bool_], groups: Index | None
) -> dict[str, Any]:
    """Mean accuracy and drop from whether each image was correct, (N,), under several conditions and clean."""
    per_image: PerImage = np.mean(list(conditions), axis=0)
    value, stderr = _mean_and_error(per_image, groups)
    drop, drop_stderr = _mean_and_error(clean - per_image, groups)
    return {"value": value, "n": len(clean), "stderr": stderr, "drop": drop, "drop_stderr": drop_stderr}


def _mean_and_error(values: PerImage, groups: Index | None) -> tuple[float, float]:
    """The mean of (N,) and its standard error, which counts groups where there are some."""
    if groups is not None and len(np.unique(groups)) > 1:
        estimate = mean_with_error(values, groups)
        return estimate.value, estimate.stderr
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))

"""From logits under attack to what a report says: accuracy per exit and per budget, cost, the worst case.

The worst case is taken for each sample: it counts as right only if every image made from it is answered rightly.
It is over the samples that every attack saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.cost import exit_counts, mean_macs
from mexit.evaluate.target import Deployed, EvaluationTarget, Labels, Logits

SHOWN = ("clean", "average", "max-average")
NOISE = "noise"

Right = NDArray[np.bool_]


@dataclass
class AttackResults:
    """Every condition that samples were judged under, each as logits (E, N, C).

    Attributes:
        labels: of all N samples.
        strong: places among them of the S samples that the stronger attacks saw.
        everywhere: by condition, of all N: clean, noise, average, max-average, exit 1, ...
        subset: by condition, of the S, made for no budget in particular.
        budgets: by budget and condition, of the S.
        autoattack: by exit (from 1), of the S.
    """

    labels: Labels
    strong: NDArray[np.int64]
    everywhere: dict[str, Logits]
    subset: dict[str, Logits] = field(default_factory=dict)
    budgets: dict[str, dict[str, Logits]] = field(default_factory=dict)
    autoattack: dict[int, Logits] = field(default_factory=dict)

    @property
    def exits(self) -> int:
        """E."""
        return len(self.everywhere["clean"])

    @property
    def judged(self) -> NDArray[np.int64]:
        """The samples that every attack saw."""
        more = self.subset or self.budgets or self.autoattack
        return self.strong if more else np.arange(len(self.labels))

    def attacks(self, budget: str | None = None) -> dict[str, Logits]:
        """Every condition but noise, on the samples `judged`; those of one budget too if it is named."""
        rows = self.judged
        found = {name: logits[:, rows] for name, logits in self.everywhere.items() if name != NOISE}
        found |= self.subset | {f"autoattack exit {k}": logits for k, logits in self.autoattack.items()}
        return found | self.budgets.get(budget or "", {})


def accuracy(right: Right) -> dict[str, float | int]:
    """A share of right answers with its binomial standard error."""
    value, n = float(right.mean()), len(right)
    return {"value": value, "n": n, "stderr": float(np.sqrt(value * (1 - value) / n))}


def per_exit(evidence: AttackResults) -> list[dict[str, Any]]:
    """The rows of `exits`."""
    worst = worst_per_exit(evidence)
    rows: list[dict[str, Any]] = []
    for k in range(1, evidence.exits + 1):
        row: dict[str, Any] = {"exit": k}
        row |= {name: accuracy(_right(evidence.everywhere[name], evidence.labels)[k - 1]) for name in SHOWN}
        if k in evidence.autoattack:
            labels = evidence.labels[evidence.strong]
            row["autoattack"] = accuracy(_right(evidence.autoattack[k], labels)[k - 1])
        rows.append(row | {"worst": accuracy(worst[k - 1])})
    return rows


def worst_per_exit(evidence: AttackResults) -> Right:
    """Which samples (S,) stand against everything at each exit, (E, S)."""
    labels = evidence.labels[evidence.judged]
    conditions = list(evidence.attacks().values())
    conditions += [logits for own in evidence.budgets.values() for logits in own.values()]
    return _all([_right(logits, labels) for logits in conditions])


def transfer(evidence: AttackResults) -> list[list[dict[str, Any]]]:
    """Row: the exit that was attacked; column: the exit that answers."""
    attacked = [evidence.everywhere[f"exit {k}"] for k in range(1, evidence.exits + 1)]
    return [[accuracy(row) for row in _right(logits, evidence.labels)] for logits in attacked]


def per_budget(evidence: AttackResults, subject: EvaluationTarget) -> dict[str, Any]:
    """The rows of `budgets`."""
    rows: dict[str, Any] = {}
    subset = evidence.labels[evidence.strong]
    for name, deployed in subject.budgets.items():
        row: dict[str, Any] = {"budget_macs": deployed.budget_macs}
        for condition in SHOWN:
            logits = evidence.everywhere[condition]
            row[condition] = answered(deployed, logits, evidence.labels, subject.cumulative_macs)
        for condition, logits in evidence.budgets.get(name, {}).items():
            row[condition] = answered(deployed, logits, subset, subject.cumulative_macs)
        rows[name] = row | {"worst": accuracy(robust_under(evidence, name, deployed, evidence.attacks(name)))}
    return rows


def robust_under(evidence: AttackResults, budget: str, deployed: Deployed, conditions: Iterable[str]) -> Right:
    """Which samples (S,) a budget answers rightly under all these conditions."""
    from mexit.attacks.soft_policy import decide

    every, labels = evidence.attacks(budget), evidence.labels[evidence.judged]
    return _all([decide(deployed.policy, every[name]).classes == labels for name in conditions])


def answered(
    deployed: Deployed, logits: Logits, labels: Labels, cumulative_macs: tuple[int, ...]
) -> dict[str, Any]:
    """Accuracy, cost and exits of a budget under one condition: logits (E, N, C), labels (N,)."""
    from mexit.attacks.slowdown import efficacy
    from mexit.attacks.soft_policy import decide

    found = decide(deployed.policy, logits)
    cost = mean_macs(found.exits, deployed.exit_macs)
    return accuracy(found.classes == labels) | {
        "mean_macs": cost,
        "saved": 1 - cost / cumulative_macs[-1],
        "exits": exit_counts(found.exits, len(cumulative_macs)).tolist(),
        "efficacy": efficacy(found.exits, cumulative_macs),
    }


def curve(
    points: Mapping[float, Mapping[str, Logits]], labels: Labels, subject: EvaluationTarget
) -> list[dict[str, Any]]:
    """The rows of `curve`: at each radius each exit under the attack on itself, each budget under all of them."""
    from mexit.attacks.soft_policy import decide

    rows = []
    for eps, judged in sorted(points.items()):
        exits = [accuracy(right_at(logits, labels, k)) for k, logits in enumerate(judged.values(), start=1)]
        budgets = {}
        for name, deployed in subject.budgets.items():
            right = [decide(deployed.policy, logits).classes == labels for logits in judged.values()]
            budgets[name] = accuracy(_all(right))
        rows.append({"eps": eps, "exits": exits, "budgets": budgets})
    return rows


def right_at(logits: Logits, labels: Labels, k: int) -> Right:
    """Which samples exit k (from 1) answers rightly."""
    found: Right = _right(logits, labels)[k - 1]
    return found


def _all(conditions: Sequence[Right]) -> Right:
    """Which samples are right under every condition."""
    found: Right = np.logical_and.reduce(conditions)
    return found


def _right(logits: Logits, labels: Labels) -> Right:
    from mexit.train.validation import correct_predictions

    return correct_predictions(logits, labels)

"""From logits under attack to the numbers of the report: accuracy per exit and per budget, cost, the worst case.

The worst case is taken per sample: a sample counts as correct only if it is classified correctly under every attack. It
covers the samples on which every attack ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.attacks.slowdown import efficacy
from mexit.attacks.soft_policy import Decision, decide
from mexit.calibrate.clusters import mean_with_error
from mexit.core.cost import Costs, exit_counts, mean_macs
from mexit.core.exit_policy import Policy
from mexit.evaluate.answers import ScoredExits
from mexit.evaluate.target import BudgetPolicy, EvaluationTarget, Index, Labels, Logits
from mexit.train.validation import correct_predictions

SHOWN = ("clean", "average", "max-average")
NOISE = "noise"

Correct = NDArray[np.bool_]


@dataclass
class AttackResults:
    """Logits of every exit under every condition.

    The group pgd runs on N samples, the other groups of attacks on S of them, the strong subset.

    Attributes:
        labels: of all N samples, (N,).
        strong_index: positions of the strong subset among the N samples, (S,).
        pgd: condition to logits (E, N, C): clean, noise, average, max-average, exit 1, ..., exit E; without attacks
            clean alone.
        transfer: condition to logits (E, S, C): images crafted on another run.
        budgets: budget and condition to logits (E, S, C): attacks on the policy of one budget.
        autoattack: number of an exit to logits (E, S, C): AutoAttack on this exit.
        groups: group ids of all N samples, (N,), which standard errors count; None without groups.
        exit_numbers: the number of each exit in the network, (E,); empty = 1..E. Conditions and rows name them.
    """

    labels: Labels
    strong_index: Index
    pgd: dict[str, Logits]
    transfer: dict[str, Logits] = field(default_factory=dict)
    budgets: dict[str, dict[str, Logits]] = field(default_factory=dict)
    autoattack: dict[int, Logits] = field(default_factory=dict)
    groups: Index | None = None
    exit_numbers: tuple[int, ...] = ()

    def groups_at(self, index: Index) -> Index | None:
        """The group ids of the samples at some positions; None without groups."""
        return None if self.groups is None else self.groups[index]

    @property
    def exits(self) -> int:
        """Number of exits, E."""
        return len(self.pgd["clean"])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each exit in the network, (E,)."""
        return self.exit_numbers or tuple(range(1, self.exits + 1))

    @property
    def attacked(self) -> bool:
        """Whether the images were attacked."""
        return len(self.pgd) > 1

    @property
    def common_index(self) -> Index:
        """Positions of the samples on which every attack ran: S if a group beside pgd ran, else N."""
        strong = self.transfer or self.budgets or self.autoattack
        return self.strong_index if strong else np.arange(len(self.labels))

    def add_budget(self, budget: str, condition: str, logits: Logits) -> None:
        """Add an attack on the policy of a budget: logits (E, S, C)."""
        self.budgets.setdefault(budget, {})[condition] = logits

    def attacks(self, budget: str | None = None) -> dict[str, Logits]:
        """Every condition but noise on the common samples; with a budget also the attacks on its policy."""
        rows = self.common_index
        conditions = {name: logits[:, rows] for name, logits in self.pgd.items() if name != NOISE}
        conditions |= self.transfer | {f"autoattack exit {k}": logits for k, logits in self.autoattack.items()}
        return conditions | self.budgets.get(budget or "", {})


def accuracy(correct: Correct, groups: Index | None = None) -> dict[str, float | int]:
    """The share of correct samples with its standard error, from (N,) bool.

    The error is binomial; with group ids (N,) it counts groups, see `calibrate.clusters`.
    """
    value, n = float(correct.mean()), len(correct)
    if groups is not None and len(np.unique(groups)) > 1:
        estimate = mean_with_error(correct.astype(np.float64), groups)
        return {"value": value, "n": n, "groups": estimate.groups, "stderr": estimate.stderr}
    return {"value": value, "n": n, "stderr": float(np.sqrt(value * (1 - value) / n))}


def correct_at(logits: Logits, labels: Labels, k: int) -> Correct:
    """Which samples exit k (from 1) classifies correctly, (N,)."""
    correct: Correct = correct_predictions(logits, labels)[k - 1]
    return correct


def exit_rows(results: AttackResults) -> list[dict[str, Any]]:
    """The report's `exits`: accuracy of each exit under each shown condition and in the worst case."""
    worst = worst_per_exit(results)
    strong_labels, strong_groups = results.labels[results.strong_index], results.groups_at(results.strong_index)
    rows: list[dict[str, Any]] = []
    for k, number in enumerate(results.numbers, start=1):
        row: dict[str, Any] = {"exit": number}
        shown = [name for name in SHOWN if name in results.pgd]
        row |= {name: accuracy(correct_at(results.pgd[name], results.labels, k), results.groups) for name in shown}
        row |= {
            name: accuracy(correct_at(logits, strong_labels, k), strong_groups)
            for name, logits in results.transfer.items()
        }
        if number in results.autoattack:
            row["autoattack"] = accuracy(correct_at(results.autoattack[number], strong_labels, k), strong_groups)
        if results.attacked:
            row["worst"] = accuracy(worst[k - 1], results.groups_at(results.common_index))
        rows.append(row)
    return rows


def worst_per_exit(results: AttackResults) -> Correct:
    """Which common samples each exit classifies correctly under every attack, (E, S)."""
    labels = results.labels[results.common_index]
    conditions = list(results.attacks().values())
    conditions += [logits for attacks in results.budgets.values() for logits in attacks.values()]
    return _all([correct_predictions(logits, labels) for logits in conditions])


def transfer_matrix(results: AttackResults) -> list[list[dict[str, Any]]]:
    """The report's `transfer`: row = the attacked exit, column = the exit that answers; empty without attacks."""
    if not results.attacked:
        return []
    attacked = [results.pgd[f"exit {k}"] for k in results.numbers]
    return [
        [accuracy(correct, results.groups) for correct in correct_predictions(logits, results.labels)]
        for logits in attacked
    ]


def budget_rows(results: AttackResults, target: EvaluationTarget) -> dict[str, Any]:
    """The report's `budgets`: accuracy and cost of each budget under each condition and in the worst case.

    Accuracy counts an unsure answer with the class that it withholds. With a reject option, `clean` has the share of
    images that are `answered`, and that of them that are answered correctly, `answered_correctly` (None without any).
    """
    rows: dict[str, Any] = {}
    every, strong = np.arange(len(results.labels)), results.strong_index
    for name, budget in target.budgets.items():
        conditions = {shown: (results.pgd[shown], every) for shown in SHOWN if shown in results.pgd}
        on_strong = results.transfer | results.budgets.get(name, {})
        conditions |= {condition: (logits, strong) for condition, logits in on_strong.items()}
        row: dict[str, Any] = {"budget_macs": budget.budget_macs}
        for condition, (logits, index) in conditions.items():
            labels, groups = results.labels[index], results.groups_at(index)
            decision = decide(budget.policy, logits)
            row[condition] = accuracy_and_cost(budget, decision, labels, target.costs, groups)
        if budget.policy.reject is not None:
            row["clean"] |= _answered(budget.policy, results)
        if results.attacked:
            robust = robust_under(results, name, budget, results.attacks(name))
            row["worst"] = accuracy(robust, results.groups_at(results.common_index))
        rows[name] = row
    return rows


def _answered(policy: Policy, results: AttackResults) -> dict[str, float | None]:
    logits, labels = results.pgd["clean"], results.labels
    answers = ScoredExits.of(policy, logits).answers("", policy, labels, np.arange(len(labels)))
    answered = answers.answered
    correct = float(answers.correct[answered].mean()) if answered.any() else None
    return {"answered": float(answered.mean()), "answered_correctly": correct}


def accuracy_and_cost(
    budget: BudgetPolicy,
    decision: Decision,
    labels: Labels,
    costs: Costs,
    groups: Index | None = None,
) -> dict[str, Any]:
    """Accuracy, cost, exits and efficacy of a policy, from its decisions on N samples with labels, groups (N,).

    `saved` is the share of the static network's cost.
    """
    cost = mean_macs(decision.exits, budget.exit_macs)
    return accuracy(decision.classes == labels, groups) | {
        "mean_macs": cost,
        "saved": 1 - cost / costs.static,
        "exits": exit_counts(decision.exits, len(costs.cumulative)).tolist(),
        "efficacy": efficacy(decision.exits, costs.cumulative),
    }


def robust_under(results: AttackResults, name: str, budget: BudgetPolicy, conditions: Iterable[str]) -> Correct:
    """Which common samples the policy of budget `name` classifies correctly under all given conditions, (S,)."""
    attacks, labels = results.attacks(name), results.labels[results.common_index]
    return _all([decide(budget.policy, attacks[condition]).classes == labels for condition in conditions])


def curve_rows(
    curve: Mapping[float, Mapping[str, Logits]],
    labels: Labels,
    target: EvaluationTarget,
    groups: Index | None = None,
) -> list[dict[str, Any]]:
    """The report's `curve`: accuracy against the radius.

    Args:
        curve: radius to the attacks on exit 1, ..., exit E, in this order, each logits (E, S, C).
        labels: (S,).
        target: its budgets are evaluated too.
        groups: group ids (S,), or None without groups.

    Returns:
        One row per radius: each exit under the attack on itself, each budget under all of them.
    """
    rows = []
    for eps, attacks in sorted(curve.items()):
        exits = [accuracy(correct_at(logits, labels, k), groups) for k, logits in enumerate(attacks.values(), start=1)]
        budgets = {}
        for name, budget in target.budgets.items():
            correct = [decide(budget.policy, logits).classes == labels for logits in attacks.values()]
            budgets[name] = accuracy(_all(correct), groups)
        rows.append({"eps": eps, "exits": exits, "budgets": budgets})
    return rows


def _all(conditions: Sequence[Correct]) -> Correct:
    """Which samples are correct under every condition."""
    correct: Correct = np.logical_and.reduce(conditions)
    return correct

"""Details of an evaluation: confusion, accuracy per class, the pictures behind errors, and reliability.

They describe the answers to the test images and select nothing. The answers are those of the budget `low`, which the
server uses if a request names none; of the first budget if there is no `low`; and of the last exit without budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mexit.calibrate.temperature import compare_reliability, fit_temperatures
from mexit.core.exit_policy import Policy
from mexit.data.dataset import DataSet, evenly_spaced, split_batches
from mexit.evaluate.answers import Answers, ScoredExits
from mexit.evaluate.class_accuracy import ClassAccuracy, class_accuracies
from mexit.evaluate.confusion import Counts, confusion_matrix, confusions
from mexit.evaluate.contact_sheet import PICTURES, Sheet, tiles
from mexit.evaluate.results import AttackResults, Correct
from mexit.evaluate.target import EvaluationTarget, Index, Labels

_BUDGET = "low"
_TEMPERATURE_IMAGES = 1000


@dataclass(frozen=True)
class Details:
    """What the report shows beside the accuracies.

    Attributes:
        answers: the answers that all but `reliability` describe.
        classes: names, (C,).
        matrix: of `confusion_matrix`, (C, C + 1).
        rows: accuracy of each class.
        sheets: the most wrong and the least certain pictures.
        reliability: of every exit; see `calibrate.temperature.reliability`.
    """

    answers: Answers
    classes: tuple[str, ...]
    matrix: Counts
    rows: tuple[ClassAccuracy, ...]
    sheets: tuple[Sheet, ...]
    reliability: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The report's `details`; classes of `confusion` are class numbers, `accuracy_of` has each budget or exit."""
        wrong, uncertain = ([tile.to_json(self.classes) for tile in sheet.tiles] for sheet in self.sheets)
        return {
            "answers": self.answers.name,
            "classes": [
                {
                    "class": row.name,
                    "n": row.n,
                    "groups": row.groups,
                    "accuracy": row.value,
                    "interval": None if row.low is None else [row.low, row.high],
                    "accuracy_of": dict(row.columns),
                }
                for row in self.rows
            ],
            "confusion": [[error.true, error.predicted, error.n] for error in confusions(self.matrix)],
            "no_answer": int(self.matrix[:, -1].sum()),
            "most_wrong": wrong,
            "least_certain": uncertain,
            "reliability": self.reliability,
        }


def measure_details(target: EvaluationTarget, index: Index, results: AttackResults) -> Details:
    """The details of the answers to the clean test images.

    Args:
        target: the run or bundle.
        index: positions of the test images in the data set, (N,).
        results: of the same images.
    """
    logits, labels = results.pgd["clean"], results.labels
    name, policy = _policy(target, results.exits)
    scored = ScoredExits.of(policy, logits)
    unscaled = Policy("max-probability", False, (1.0,) * results.exits, policy.thresholds)
    rows = compare_reliability(ScoredExits.of(unscaled, logits).top, scored.top, labels)
    answers = scored.answers(name, policy, labels, index, results.groups)
    return describe_answers(answers, _columns(target, scored, labels), rows, target.data)


def describe_answers(
    answers: Answers, columns: Mapping[str, Correct], reliability: list[dict[str, Any]], data: DataSet
) -> Details:
    """The details of some answers.

    Args:
        answers: to N images of the data set.
        columns: further policies or exits of the table of classes: name to whether each answer is correct, (N,).
        reliability: of every exit; see `calibrate.temperature.reliability`.
        data: has the class names and the pictures.
    """
    matrix = confusion_matrix(answers.labels, answers.predicted, len(data.classes))
    rows = tuple(class_accuracies(answers, data.classes, columns, matrix))
    return Details(answers, data.classes, matrix, rows, _sheets(answers, data), reliability)


def _policy(target: EvaluationTarget, exits: int) -> tuple[str, Policy]:
    """What answers, and its name; without budgets the last exit, with temperatures from the calibration split."""
    if target.budgets:
        name = _BUDGET if _BUDGET in target.budgets else next(iter(target.budgets))
        return f"budget {name}", target.budgets[name].policy
    index = evenly_spaced(target.splits.part("calibration"), _TEMPERATURE_IMAGES)
    logits = np.concatenate([target.run_batch(target.load(part)[0]) for part in split_batches(index, target.batch)], 1)
    temperatures = fit_temperatures(logits, target.data.labels[index])
    return f"exit {exits}", Policy("max-probability", False, temperatures, (None,) * (exits - 1))


def _columns(target: EvaluationTarget, scored: ScoredExits, labels: Labels) -> Mapping[str, Correct]:
    """Whether each budget, or without budgets each exit, classifies each image correctly.

    All budgets of an engine have the same scores and differ in thresholds.
    """
    if target.budgets:
        return {name: scored.correct(one.policy, labels) for name, one in target.budgets.items()}
    return {f"exit {k}": classes == labels for k, classes in enumerate(scored.classes, start=1)}


def _sheets(answers: Answers, data: DataSet) -> tuple[Sheet, ...]:
    once = "; one picture of each group" if answers.groups is not None else ""
    selections = (
        ("Most wrong", f"wrong answers with the highest confidence{once}", answers.most_wrong(PICTURES)),
        ("Least certain", f"answers with the lowest confidence, right or wrong{once}", answers.least_certain(PICTURES)),
    )
    return tuple(Sheet(title, note, tiles(answers, rows, data)) for title, note, rows in selections)

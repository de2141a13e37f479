"""The answers that a policy gives to the test images: class, confidence and exit of each image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import Policy, first_exit
from mexit.core.scores import Floats
from mexit.evaluate.target import Index, Labels, Logits

NO_ANSWER = -1


@dataclass(frozen=True)
class Answers:
    """The answers to N test images.

    Attributes:
        name: what answered, such as "budget low" or "exit 3".
        index: positions in the data set, (N,).
        labels: true classes, (N,).
        predicted: the answers, (N,); `NO_ANSWER` where there is none, because the policy is unsure or a logit is NaN.
        confidence: probability of the answer, in [0, 1], (N,).
        exits: exit that answered, from 1, (N,).
        groups: group of each image, (N,); None without groups.
    """

    name: str
    index: Index
    labels: Labels
    predicted: Labels
    confidence: Floats
    exits: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each answer is correct, (N,)."""
        return np.asarray(self.predicted == self.labels)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Whether each image has an answer, (N,)."""
        return np.asarray(self.predicted != NO_ANSWER)

    def most_wrong(self, most: int) -> NDArray[np.int64]:
        """Rows of the wrong answers, the most confident first; at most `most`, and one of each group."""
        return self._first(np.flatnonzero(self.answered & ~self.correct), -self.confidence, most)

    def least_certain(self, most: int) -> NDArray[np.int64]:
        """Rows with the lowest confidence, the lowest first; at most `most`, and one of each group."""
        return self._first(np.arange(len(self)), self.confidence, most)

    def _first(self, rows: NDArray[np.int64], key: Floats, most: int) -> NDArray[np.int64]:
        rows = rows[np.argsort(key[rows], kind="stable")]
        if self.groups is not None:
            _, first = np.unique(self.groups[rows], return_index=True)
            rows = rows[np.sort(first)]
        return rows[:most]


@dataclass(frozen=True)
class ScoredExits:
    """Scores, classes and confidences of every exit, which policies with the same scores share; (E, N) each."""

    scores: Floats
    classes: Labels
    confidence: Floats

    @staticmethod
    def of(policy: Policy, logits: Logits) -> ScoredExits:
        """Score logits (E, N, C) as a policy does."""
        scores, classes, confidence = policy.scorer(logits.shape[-1]).answer_exits(logits)
        return ScoredExits(scores, np.where(np.isnan(scores), NO_ANSWER, classes), confidence)

    @property
    def top(self) -> list[tuple[Floats, Labels]]:
        """Confidence and class of each exit, (N,) each."""
        return list(zip(self.confidence, self.classes, strict=True))

    def correct(self, policy: Policy, labels: Labels) -> NDArray[np.bool_]:
        """Whether a policy with these scores answers each sample correctly, (N,)."""
        return np.asarray(self._choose(policy)[1] == labels)

    def answers(
        self, name: str, policy: Policy, labels: Labels, index: Index, groups: NDArray[np.int64] | None = None
    ) -> Answers:
        """The answers of a policy with these scores; the arguments are those of `Answers`."""
        exits, predicted = self._choose(policy)
        confidence = self.confidence[exits - 1, np.arange(len(labels))]
        return Answers(name, index, labels, predicted, confidence, exits, groups)

    def _choose(self, policy: Policy) -> tuple[NDArray[np.int64], Labels]:
        """The exit that answers each sample, from 1, and its answer, (N,) each."""
        exits = first_exit(self.scores, policy.thresholds)
        chosen = exits - 1, np.arange(len(exits))
        unsure = policy.unsure(exits, self.scores[chosen], exits < len(self.scores))
        predicted = self.classes[chosen]
        return exits, predicted if unsure is None else np.where(unsure, NO_ANSWER, predicted)

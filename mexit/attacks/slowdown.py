"""Slowdown attacks: images on which a deployed policy exits late.

sloth    DeepSloth (S. Hong et al.: A panda? No, it's a sloth, ICLR 2021): drives every exit but the last towards the
         uniform distribution
hinge    -sum_i relu(m_i + d), m the margins to the thresholds: stops pushing an exit once it no longer answers. Our own

Neither attack can exceed the bound on cost that the rate limiter enforces at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.losses import sample_loss
from mexit.attacks.policy_attacks import THRESHOLD_SLACK, AttackSearch, AttackTarget, PolicyLossFn
from mexit.attacks.soft_policy import Decision
from mexit.models.scores_torch import ExitScores

SLOWDOWNS = ("sloth", "hinge")


def slowdown_attack(target: AttackTarget, name: str) -> AttackSearch:
    """Run one of `SLOWDOWNS` on every sample that does not already reach the last exit."""
    search = AttackSearch(target, exit_taken, enough=len(target.policy.policy.temperatures))
    rows = search.remaining()
    if len(rows):
        search.run(name, _sloth_loss(target, rows) if name == "sloth" else _hinge_loss(target), rows)
    return search


def exit_taken(decision: Decision, labels: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG001
    """The damage of a late exit: its number, (B,)."""
    return decision.exits


def efficacy(exits: NDArray[np.int64], cumulative_macs: Sequence[float]) -> float:
    """Efficacy of DeepSloth: area under the share of samples that have left, over the share of the full cost.

    The curve joins (0, 0) and the points (cost of exit k, share that left by exit k) by straight lines, as in the
    paper's code. If all samples reach the last exit, half the cost of the last segment remains under the curve.

    Args:
        exits: exit taken by each sample, from 1, (N,).
        cumulative_macs: cost of each exit, E numbers.

    Returns:
        A number in [0, 1]; larger means earlier exits.
    """
    cost = np.concatenate([[0.0], np.asarray(cumulative_macs, np.float64) / cumulative_macs[-1]])
    counts = np.bincount(exits, minlength=len(cost))
    left = np.cumsum(counts) / len(exits)
    return float(((left[1:] + left[:-1]) / 2 * np.diff(cost)).sum())


def _sloth_loss(target: AttackTarget, rows: NDArray[np.intp]) -> PolicyLossFn:
    labels = target.labels[rows]

    def loss_fn(logits: Tensor, _: ExitScores) -> Tensor:
        return sample_loss("uniform", logits, labels)

    return loss_fn


def _hinge_loss(target: AttackTarget) -> PolicyLossFn:
    def loss_fn(_: Tensor, exit_scores: ExitScores) -> Tensor:
        return -F.relu(target.policy.margins_to_threshold(exit_scores.scores) + THRESHOLD_SLACK).sum(dim=0)

    return loss_fn

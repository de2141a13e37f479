"""Attacks on speed: images on which a deployed policy leaves late.

sloth    DeepSloth (S. Hong et al.: A panda? No, it's a sloth, ICLR 2021): every exit but the last is driven to the
         uniform distribution
hinge    -sum_i relu(lead_i + d) over the gates: stops pushing at a gate once it is shut. Ours

What neither they nor any training can take away is the bound that the rate limiter holds at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mexit.attacks.losses import sample_loss
from mexit.attacks.policy_attacks import GATE_SLACK, AttackSearch, AttackTarget, LossFn
from mexit.attacks.soft_policy import Decision, ExitScores

NAMES = ("sloth", "hinge")


def late(decision: Decision, labels: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG001
    """The harm of an exit: its number."""
    return decision.exits


def slow_down(victim: AttackTarget, name: str) -> AttackSearch:
    """One of `NAMES`, on every sample that does not already run to the end."""
    hunt = AttackSearch(victim, late, enough=len(victim.gates.policy.temperatures))
    rows = hunt.standing()
    if len(rows):
        hunt.climb(name, _sloth(victim, rows) if name == "sloth" else _hinge(victim), rows)
    return hunt


def efficacy(exits: NDArray[np.int64], cumulative_macs: Sequence[int]) -> float:
    """Area under DeepSloth's curve: share of the inputs that have left against share of the full cost, in [0, 1].

    Straight lines from (0, 0) over (cost of exit k, share that left by k), as in the paper's code. 1 would be:
    all leave at once; if all run to the last exit, half the cost of the last segment is still under the line.

    Args:
        exits: the exit (from 1) of each input, (N,).
        cumulative_macs: cost of each exit, (E,).
    """
    cost = np.concatenate([[0.0], np.asarray(cumulative_macs, np.float64) / cumulative_macs[-1]])
    counts = np.bincount(exits, minlength=len(cost))
    left = np.cumsum(counts) / len(exits)
    return float(((left[1:] + left[:-1]) / 2 * np.diff(cost)).sum())


def _sloth(victim: AttackTarget, rows: NDArray[np.intp]) -> LossFn:
    labels = victim.labels[rows]
    return lambda logits, judged: sample_loss("uniform", logits, labels)  # noqa: ARG005


def _hinge(victim: AttackTarget) -> LossFn:
    def loss(_: Tensor, judged: ExitScores) -> Tensor:
        return -F.relu(victim.gates.leads(judged.scores) + GATE_SLACK).sum(dim=0)

    return loss

"""A differentiable form of a deployed policy, for attacks that need the gradient of its answer.

A policy answers with the first exit whose score reaches its threshold. This hard choice has no gradient and hides all
later exits from an attack on the answer. `SoftPolicy` replaces it by a mixture:

margin of exit i   m_i = (score_i - threshold_i) / spread_i, above 0 where the exit answers; -inf without a threshold
weight of exit i   s(m_i / T) * prod_{k < i} (1 - s(m_k / T)), s the logistic function; for the last exit the first
                   factor is 1. For T -> 0 the weights become the hard choice
mixture            log sum_i weight_i * probabilities_i

`spread_i` is the standard deviation of the scores of exit i on clean images, so T and the margins have the same meaning
for every score measure. `DeployedPolicy` takes its forward pass from core and its backward pass from the mixture
(BPDA: A. Athalye, N. Carlini, D. Wagner, ICML 2018). The mixture is our own construction.

Everything is computed in float64, as in core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mexit.core.exit_policy import Policy, first_exit
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit
from mexit.models.scores_torch import ExitScores, score_exits, straight_through


@dataclass(frozen=True)
class Decision:
    """What a policy decides for a batch.

    Attributes:
        exits: number of the exit that answers, from 1, (B,) int64.
        classes: predicted class, (B,) int64; -1 where the logits hold NaN.
    """

    exits: NDArray[np.int64]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class SoftPolicy:
    """A policy and the scale of its scores.

    Attributes:
        policy: the deployed policy.
        spread: standard deviation of the scores of each exit but the last, E - 1 numbers.
    """

    policy: Policy
    spread: tuple[float, ...]

    @staticmethod
    def fit(policy: Policy, logits: Tensor) -> SoftPolicy:
        """Measure the spread on clean logits (E, N, C). It is at least 1e-3, to avoid a division by 0."""
        with torch.no_grad():
            scores = score_exits(policy, logits).scores[:-1]
        finite = [row[row.isfinite()] for row in scores]
        return SoftPolicy(policy, tuple(max(1e-3, float(row.std())) if len(row) > 1 else 1.0 for row in finite))

    def margins_to_threshold(self, scores: Tensor) -> Tensor:
        """Scores (E, B) to the margins of all exits but the last, (E - 1, B), in spreads; -inf where NaN."""
        rows = []
        for row, threshold, spread in zip(scores, self.policy.thresholds, self.spread, strict=False):
            never = torch.full_like(row, -math.inf)
            rows.append(never if threshold is None else torch.where(row.isnan(), never, (row - threshold) / spread))
        return torch.stack(rows) if rows else scores[:0]

    def log_weights(self, scores: Tensor, temperature: float) -> Tensor:
        """Scores (E, B) to the logarithm of the weight of every exit, (E, B); the weights of a sample sum to 1."""
        margins = self.margins_to_threshold(scores) / temperature
        passed = F.logsigmoid(-margins).cumsum(dim=0)
        reach = torch.cat([torch.zeros_like(scores[:1]), passed])
        leave = torch.cat([F.logsigmoid(margins), torch.zeros_like(scores[:1])])
        return reach + leave

    def mixture(self, exit_scores: ExitScores, temperature: float) -> Tensor:
        """Log-probabilities of the mixture, (B, C) float64."""
        weights = self.log_weights(exit_scores.scores, temperature).unsqueeze(-1)
        return (weights + exit_scores.log_probabilities).logsumexp(dim=0)


class DeployedPolicy(nn.Module):
    """A network with its policy as one classifier: images to log-probabilities, which serve as logits.

    The forward pass is the hard choice of core, the backward pass that of the mixture.

    Args:
        model: the network.
        policy: the policy and its spreads.
        temperature: T of the mixture, in spreads, above 0.

    Raises:
        UsageError: the temperature is not positive and finite.
    """

    def __init__(self, model: MultiExit, policy: SoftPolicy, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise UsageError(f"the temperature of a softened policy must be above 0 and finite, found {temperature}")
        self.model, self.policy, self.temperature = model, policy, temperature

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] to (B, C) float32, a new tensor (Square writes into it)."""
        logits = self.model(images)
        exit_scores = score_exits(self.policy.policy, logits)
        hard = policy_log_probabilities(self.policy.policy, logits, exit_scores)
        if not torch.is_grad_enabled():
            return hard.float()
        return straight_through(hard, self.policy.mixture(exit_scores, self.temperature)).float()


def decide(policy: Policy, logits: NDArray[np.floating]) -> Decision:
    """Apply a policy with the formulas of core: logits (E, B, C), any float dtype."""
    scores, predictions = policy.scorer(logits.shape[-1]).answer(logits)
    exits = first_exit(scores, policy.thresholds)
    rows = np.arange(len(exits))
    classes = np.where(np.isnan(scores[exits - 1, rows]), -1, predictions[exits - 1, rows])
    return Decision(exits, classes.astype(np.int64))


def policy_log_probabilities(policy: Policy, logits: Tensor, exit_scores: ExitScores | None = None) -> Tensor:
    """Log-probabilities of the exit that answers, chosen by core.

    Args:
        policy: the policy.
        logits: (E, B, C).
        exit_scores: scores of the same logits; None = compute them.

    Returns:
        (B, C) float64.
    """
    exit_scores = exit_scores or score_exits(policy, logits)
    exits = torch.from_numpy(decide(policy, numpy_logits(logits)).exits).to(logits.device)
    return exit_scores.log_probabilities[exits - 1, torch.arange(len(exits), device=logits.device)]


def numpy_logits(logits: Tensor) -> NDArray[np.float32]:
    """Logits as a detached float32 array, the input of core's formulas."""
    array: NDArray[np.float32] = logits.detach().float().cpu().numpy()
    return array

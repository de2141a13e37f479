"""The score formulas of `core.scores` in torch, differentiable.

For the same logits the probabilities and scores equal those of `core.scores.Scorer` up to float64 rounding; a test
compares them. Attacks use them to get gradients through confidence scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from mexit.core.exit_policy import Policy


@dataclass(frozen=True)
class ExitScores:
    """Probabilities and confidence scores of every exit.

    Attributes:
        log_probabilities: of the answer of each exit, (E, B, C) float64.
        scores: confidence of each exit, larger is more confident, (E, B) float64.
    """

    log_probabilities: Tensor
    scores: Tensor


def score_exits(policy: Policy, logits: Tensor) -> ExitScores:
    """Probabilities and scores of every exit under a policy's measure, temperatures and ensemble setting.

    Args:
        policy: the policy; its thresholds are not used.
        logits: (E, B, C), any float dtype.
    """
    temperatures = torch.tensor(policy.temperatures, dtype=torch.float64, device=logits.device)
    log_probabilities = (logits.double() / temperatures[:, None, None]).log_softmax(dim=-1)
    if policy.ensemble:
        exits = torch.arange(1, len(logits) + 1, dtype=torch.float64, device=logits.device)
        log_probabilities = log_probabilities.logcumsumexp(dim=0) - exits.log()[:, None, None]
    return ExitScores(log_probabilities, _scores(policy.measure, log_probabilities))


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` in the forward pass with the gradient of `surrogate`; infinite values are allowed."""
    passed: Tensor = _StraightThrough.apply(value, surrogate)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: FunctionCtx, value: Tensor, __: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def _scores(measure: str, log_probabilities: Tensor) -> Tensor:
    if measure == "entropy":
        finite = log_probabilities.masked_fill(log_probabilities.isneginf(), 0)
        return (log_probabilities.exp() * finite).sum(dim=-1)
    if measure == "margin":
        top = log_probabilities.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    log_odds = _log_odds(log_probabilities)
    if measure == "max-probability":
        return log_odds
    return _agreement(log_probabilities) + 0.5 + log_odds.atan() / math.pi


def _log_odds(log_probabilities: Tensor) -> Tensor:
    """Log-odds of the largest probability, (E, B)."""
    top, best = log_probabilities.max(dim=-1, keepdim=True)
    return top.squeeze(-1) - log_probabilities.scatter(-1, best, -math.inf).logsumexp(dim=-1)


def _agreement(log_probabilities: Tensor) -> Tensor:
    """How many consecutive exits up to this one predict its class, (E, B).

    The count is a whole number in the forward pass. The gradient is that of the expected count if every exit drew
    its class independently from its probabilities.
    """
    predicted, probabilities = log_probabilities.argmax(dim=-1), log_probabilities.exp()
    count = expected = torch.ones_like(log_probabilities[0, :, 0])
    counts = [count]
    for k in range(1, len(log_probabilities)):
        count = torch.where(predicted[k] == predicted[k - 1], count + 1, 1.0)
        expected = 1 + expected * (probabilities[k] * probabilities[k - 1]).sum(dim=-1)
        counts.append(straight_through(count, expected))
    return torch.stack(counts)

"""Gradients through the gates: the torch twin of the scores in `core.scores` and of the choice of an exit.

A deployed network answers with the first exit that is sure. That choice has no gradient and hides every later exit
from an attacker who climbs the loss of the answer. Here it gets one:

lead of exit i    (score_i - threshold_i) / spread_i: above 0 it is taken; -inf where the threshold is None
share of exit i   s(lead_i / T) * prod_{m < i} (1 - s(lead_m / T)), s the logistic function; the last exit has no
                  first factor. For T -> 0 this is the choice itself
mixture           log sum_i share_i * answer_i

`spread` is the standard deviation of an exit's scores on some images, so that T and the margins of attacks mean
the same for every measure. The forward pass of `DeployedPolicy` asks core, its backward pass is that of the
mixture (BPDA: A. Athalye, N. Carlini, D. Wagner, ICML 2018). The mixture as such is ours; no paper has it in this
form.

Everything is float64, as in core; logits (E, B, C), scores (E, B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mexit.core.policy import Policy, first_exit
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit


@dataclass(frozen=True)
class Decision:
    """What a policy does with a batch.

    Attributes:
        exits: the exit (from 1) that answers, (B,) int64.
        classes: its answer, (B,) int64; -1 where it is NaN, which is no class.
    """

    exits: NDArray[np.int64]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class ExitScores:
    """The twin of `Scorer.answer`.

    Attributes:
        log_answers: log-probabilities that each exit would answer with, (E, B, C) float64.
        scores: (E, B) float64.
    """

    log_answers: Tensor
    scores: Tensor


@dataclass(frozen=True)
class SoftPolicy:
    """A policy and the scale of its scores.

    Attributes:
        policy: what is deployed.
        spread: standard deviation of the scores of each exit but the last, (E-1,).
    """

    policy: Policy
    spread: tuple[float, ...]

    @staticmethod
    def fit(policy: Policy, logits: Tensor) -> SoftPolicy:
        """Measure the spread on clean logits (E, N, C); it is at least 1e-3, lest equal scores divide by 0."""
        with torch.no_grad():
            scores = score_exits(policy, logits).scores[:-1]
        finite = [row[row.isfinite()] for row in scores]
        return SoftPolicy(policy, tuple(max(1e-3, float(row.std())) if len(row) > 1 else 1.0 for row in finite))

    def leads(self, scores: Tensor) -> Tensor:
        """How far each exit but the last is above its threshold, in spreads: (E, B) to (E-1, B); NaN is -inf."""
        rows = []
        for row, threshold, spread in zip(scores, self.policy.thresholds, self.spread, strict=False):
            never = torch.full_like(row, -math.inf)
            rows.append(
                never if threshold is None else torch.where(row.isnan(), never, (row - threshold) / spread)
            )
        return torch.stack(rows) if rows else scores[:0]

    def log_shares(self, scores: Tensor, temperature: float) -> Tensor:
        """Logarithm of the share of every exit in the answer, (E, B); each column sums to 1 as probabilities."""
        leads = self.leads(scores) / temperature
        stay = F.logsigmoid(-leads).cumsum(dim=0)
        passed = torch.cat([torch.zeros_like(scores[:1]), stay])
        leave = torch.cat([F.logsigmoid(leads), torch.zeros_like(scores[:1])])
        return passed + leave

    def mixture(self, judged: ExitScores, temperature: float) -> Tensor:
        """Log-probabilities of the softened policy, (B, C) float64."""
        shares = self.log_shares(judged.scores, temperature).unsqueeze(-1)
        return (shares + judged.log_answers).logsumexp(dim=0)


class DeployedPolicy(nn.Module):
    """What is deployed, as one network: images to the log-probabilities of the answer, (B, C) float32.

    Log-probabilities are logits like any others. Forward is the real choice, made by core; backward is the
    mixture's.

    Args:
        model: the network behind the policy.
        gates: the policy.
        temperature: T of the mixture, in spreads.
    """

    def __init__(self, model: MultiExit, gates: SoftPolicy, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise UsageError(
                f"the temperature of a softened policy must be above 0 and finite, found {temperature}"
            )
        self.model, self.gates, self.temperature = model, gates, temperature

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] to (B, C); a new tensor each time, since Square writes into it."""
        logits = self.model(images)
        judged = score_exits(self.gates.policy, logits)
        hard = answer(self.gates.policy, logits, judged)
        if not torch.is_grad_enabled():
            return hard.float()
        soft = self.gates.mixture(judged, self.temperature)
        passed: Tensor = _ForwardHardBackwardSoft.apply(hard, soft)  # type: ignore[no-untyped-call]
        return passed.float()


class _ForwardHardBackwardSoft(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, hard: Tensor, __: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def decide(policy: Policy, logits: NDArray[np.floating]) -> Decision:
    """THE decision, by core: logits (E, B, C) of any float type."""
    scores, predictions = policy.scorer(logits.shape[-1]).answer(logits)
    exits = first_exit(scores, policy.thresholds)
    rows = np.arange(len(exits))
    classes = np.where(np.isnan(scores[exits - 1, rows]), -1, predictions[exits - 1, rows])
    return Decision(exits, classes.astype(np.int64))


def answer(policy: Policy, logits: Tensor, judged: ExitScores | None = None) -> Tensor:
    """Log-probabilities of the exit that answers, chosen by core: logits (E, B, C) to (B, C) float64."""
    judged = judged or score_exits(policy, logits)
    exits = torch.from_numpy(decide(policy, numpy_logits(logits)).exits).to(logits.device)
    return judged.log_answers[exits - 1, torch.arange(len(exits), device=logits.device)]


def numpy_logits(logits: Tensor) -> NDArray[np.float32]:
    """Logits as core takes them."""
    found: NDArray[np.float32] = logits.detach().float().cpu().numpy()
    return found


def score_exits(policy: Policy, logits: Tensor) -> ExitScores:
    """Answers and scores of every exit, differentiable: logits (E, B, C).

    The count of agreeing exits is a whole number in the forward pass; backward it is the expected count of exits
    that draw their class independently.
    """
    temperatures = torch.tensor(policy.temperatures, dtype=torch.float64, device=logits.device)
    log_answers = (logits.double() / temperatures[:, None, None]).log_softmax(dim=-1)
    if policy.ensemble:
        exits = torch.arange(1, len(logits) + 1, dtype=torch.float64, device=logits.device)
        log_answers = log_answers.logcumsumexp(dim=0) - exits.log()[:, None, None]
    return ExitScores(log_answers, _scores(policy.measure, log_answers))


def _scores(measure: str, log_answers: Tensor) -> Tensor:
    if measure == "entropy":
        return (log_answers.exp() * log_answers.masked_fill(log_answers.isneginf(), 0)).sum(dim=-1)
    if measure == "margin":
        top = log_answers.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    log_odds = _log_odds(log_answers)
    if measure == "max-probability":
        return log_odds
    return _agreed(log_answers) + 0.5 + log_odds.atan() / math.pi


def _log_odds(log_answers: Tensor) -> Tensor:
    top, best = log_answers.max(dim=-1, keepdim=True)
    return top.squeeze(-1) - log_answers.scatter(-1, best, -math.inf).logsumexp(dim=-1)


def _agreed(log_answers: Tensor) -> Tensor:
    """How many exits in a row name the class of this one, (E, B)."""
    predicted, probabilities = log_answers.argmax(dim=-1), log_answers.exp()
    hard = soft = torch.ones_like(log_answers[0, :, 0])
    counts = [hard]
    for k in range(1, len(log_answers)):
        hard = torch.where(predicted[k] == predicted[k - 1], hard + 1, 1.0)
        soft = 1 + soft * (probabilities[k] * probabilities[k - 1]).sum(dim=-1)
        counts.append(_ForwardHardBackwardSoft.apply(hard, soft))  # type: ignore[no-untyped-call]
    return torch.stack(counts)

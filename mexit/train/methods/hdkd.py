"""`hdkd`: harmonised dense knowledge distillation (X. Wang, Y. Li, AAAI 2021).

    L_train = sum_i gamma_i CE_i + sum_{i<j} gamma_ij KD_ij        exit i learns from every later exit j
    L_val   = alpha sum_i CE_i + (1 - alpha) sum_i softplus( CE_i / EMA_i - 1 )        on the selection split
    gamma  <- max( 0, gamma - gamma_lr d L_val(theta') / d gamma ),  theta' one step ahead

Published, in descriptions of the paper: learned weights on every cross-entropy and on every pair, updated
alternately with the network by the gradient of a held-out loss one step ahead; the second part of that loss is a
soft hinge that compares each exit with a moving average of its own loss; alpha = 0.5. Our readings, because no code
was available: KD is T^2 times the cross-entropy with the detached softmax of the later exit at temperature T, as in
DBT (M. Phuong, C. Lampert, ICCV 2019); the ratio and its moving average; the step size of gamma and the clamp; gamma
is not normalised, so a growing sum acts as a larger learning rate. The paper is about clean images, and so is the
validation loss; with `--attack` the same losses of the attacked images are added to the training loss with the same
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import Autocast
from mexit.errors import UsageError
from mexit.models.multi_exit import MultiExit
from mexit.train.methods.base import Adaptation, Outputs, Setup, TrainingMethod
from mexit.train.methods.distillation import soft_cross_entropy

SMALLEST = 1e-3  # the start of a softplus weight that should be 0, which softplus never reaches


@dataclass
class HDKD(TrainingMethod):
    """Harmonised dense knowledge distillation, and the variants of its ablation.

    Attributes:
        variant: "hdkd"; "naive" = all pairs with constant weights of 1; "hmsdnet" = cross-entropies only; "hdbt" =
            the last exit is the only teacher.
        start: first weights: "dbt" = 1 on cross-entropies and on pairs with the last exit, 0 on other pairs; "ce" =
            1 on cross-entropies, 0 on pairs; "uniform" = 1. The paper reports little difference.
        frozen: constant weights: one per exit, then one per pair (1, 2), (1, 3), ... (E-1, E) of student and
            teacher; () = learned weights.
        temperature: T; DBT starts at 1, its constant variant has 4.
        gamma_lr: step size of the weights.
        every: number of steps between updates of the weights; an update costs about two more steps.
        positive: how weights stay at least 0: "clamp", or "softplus" of a learned value.
        alpha: share of the plain cross-entropy in the validation loss, in [0, 1].
        ema: momentum of each exit's expected validation loss, in [0, 1).
    """

    inputs = "clean, or clean and attacked"
    default_attack = "none"
    attack_use = "optional"
    differentiates_gradients = True

    variant: Literal["hdkd", "naive", "hmsdnet", "hdbt"] = "hdkd"
    start: Literal["dbt", "ce", "uniform"] = "dbt"
    frozen: tuple[float, ...] = ()
    temperature: float = 1.0
    gamma_lr: float = 0.1
    every: int = 1
    positive: Literal["clamp", "softplus"] = "clamp"
    alpha: float = 0.5
    ema: float = 0.9
    exits: int = field(init=False)
    pairs: list[tuple[int, int]] = field(init=False)
    raw: Tensor = field(init=False)
    expected: Tensor = field(init=False)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and 0 <= self.ema < 1 and self.temperature > 0 and self.every >= 1):
            raise UsageError(
                "alpha must lie in [0, 1], ema in [0, 1), temperature above 0, every at 1 or above; found "
                f"{self.alpha}, {self.ema}, {self.temperature}, {self.every}"
            )

    def setup(self, run: Setup) -> None:
        super().setup(run)
        self.exits, self.pairs = run.exits, teacher_pairs(run.exits, self.variant)
        gamma = self._initial_gamma().to(run.device)
        self.raw = gamma.clamp_min(SMALLEST).expm1().log() if self._soft() else gamma
        self.expected = torch.zeros(run.exits, device=run.device)

    def gamma(self) -> Tensor:
        """The weights of the cross-entropy of every exit, then of every pair in `pairs`."""
        return self._positive(self.raw)

    def adapt(self, outputs: Outputs, adaptation: Adaptation) -> None:
        """Move gamma down the gradient of the validation loss one step ahead; with one exit gamma stays."""
        self.steps += 1
        if not self._learned() or (self.steps - 1) % self.every:
            return
        images, labels = adaptation.selection()
        raw = self.raw.clone().requires_grad_()
        gradient = hypergradient(
            adaptation.model,
            (self._positive(raw) * self.losses(outputs)).sum(),
            raw,
            adaptation.lr,
            images,
            lambda logits: self._validation_loss(logits, labels),
            adaptation.autocast,
            partial(self.run.process_group.sum, weight=outputs.step.share),
        )
        raw = self.raw - self.gamma_lr * gradient
        self.raw = raw if self._soft() else raw.clamp_min(0)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """The weighted cross-entropies ("ce") and distillation losses ("kd")."""
        weighted = self.gamma() * self.losses(outputs)
        terms = {"ce": weighted[: self.exits].sum()}
        return terms | {"kd": weighted[self.exits :].sum()} if self.pairs else terms

    def losses(self, outputs: Outputs) -> Tensor:
        """The losses L_k in the order of `gamma`; with an attack, those of clean and attacked images added."""
        return torch.stack([self._losses_of(outputs, view.logits) for view in outputs.views()]).sum(dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"gamma": self.raw, "expected": self.expected, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.raw = state["gamma"].to(self.raw.device)
        self.expected, self.steps = state["expected"].to(self.raw.device), int(state["steps"])

    def report(self) -> dict[str, list[float]]:
        """gamma of the cross-entropies, and of the pairs (1, 2), (1, 3), ... (E-1, E)."""
        gamma = [round(float(value), 6) for value in self.gamma()]
        report = {"gamma ce": gamma[: self.exits]}
        return report | {"gamma kd": gamma[self.exits :]} if self.pairs else report

    def _learned(self) -> bool:
        return not self.frozen and self.variant != "naive" and self.exits > 1

    def _soft(self) -> bool:
        return self.positive == "softplus" and self._learned()

    def _positive(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) if self._soft() else raw

    def _initial_gamma(self) -> Tensor:
        terms = self.exits + len(self.pairs)
        if self.frozen:
            if len(self.frozen) != terms or min(self.frozen) < 0:
                named = ", ".join(f"{student + 1}-{teacher + 1}" for student, teacher in self.pairs) or "none"
                raise UsageError(
                    f"frozen needs {terms} weights of at least 0: {self.exits} exits, then the pairs {named}; "
                    f"found {self.frozen}"
                )
            return torch.tensor(self.frozen, dtype=torch.float32)
        if self.variant == "naive" or self.start == "uniform":
            return torch.ones(terms)
        of_pairs = [float(self.start == "dbt" and teacher == self.exits - 1) for _, teacher in self.pairs]
        return torch.tensor([1.0] * self.exits + of_pairs)

    def _losses_of(self, outputs: Outputs, logits: Tensor) -> Tensor:
        losses = outputs.cross_entropy(logits)
        if not self.pairs:
            return losses
        students, teachers = zip(*self.pairs, strict=True)
        targets = (logits.detach() / self.temperature).softmax(dim=-1)
        soft = soft_cross_entropy(logits[list(students)] / self.temperature, targets[list(teachers)])
        return torch.cat([losses, self.temperature**2 * soft])

    def _validation_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """L_val against the moving average of earlier calls; updates the average."""
        losses = exit_cross_entropy(logits, labels).mean(dim=1)
        current = losses.detach()
        expected = torch.where(self.expected > 0, self.expected, current)
        self.expected = self.ema * expected + (1 - self.ema) * current
        return balanced_loss(losses, expected, self.alpha)


def teacher_pairs(exits: int, variant: str = "hdkd") -> list[tuple[int, int]]:
    """Student and teacher of every distillation term, from 0; the teachers are all later exits, or only the last."""
    if variant == "hmsdnet":
        return []
    return [(i, j) for i, j in combinations(range(exits), 2) if variant != "hdbt" or j == exits - 1]


def balanced_loss(losses: Tensor, expected: Tensor, alpha: float) -> Tensor:
    """L_val from the cross-entropies of the exits and their moving averages, (E,) each: a scalar."""
    return alpha * losses.sum() + (1 - alpha) * F.softplus(losses / expected - 1).sum()


def hypergradient(
    model: MultiExit,
    loss: Tensor,
    gamma: Tensor,
    lr: float,
    images: Tensor,
    validation_loss: Callable[[Tensor], Tensor],
    autocast: Autocast,
    sum_over_processes: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> Tensor:
    """The gradient of a validation loss with respect to the weights of training terms, one gradient step ahead.

    With theta the parameters, gamma the weights and lr the size of the coming step:

        theta' = theta - lr grad_theta L_train(theta, gamma)
        d L_val(theta') / d gamma_k = - lr < grad L_val(theta'), d/d gamma_k grad_theta L_train(theta, gamma) >

    For L_train = sum_k gamma_k L_k the last factor is grad L_k(theta). The result is exact. It costs one
    differentiable backward pass, one pass over validation images, and one backward pass through the first one, for
    any number of weights. The step is plain gradient descent, without momentum and weight decay. Every backward pass
    has the precision of its forward pass, bfloat16 under autocast.

    Args:
        model: not changed, statistics of BatchNorm included; the graph of `loss` stays usable.
        loss: L_train, a scalar with a graph to the model's parameters and to `gamma`.
        gamma: any shape, requires grad.
        lr: the size of the step ahead.
        images: validation images, (B, C, H, W); the network runs in its present mode.
        validation_loss: validation logits (E, B, C) to L_val, a scalar.
        autocast: the context for the pass over them.
        sum_over_processes: gradients of this process to their weighted sums over all processes that share the
            batch of `loss`; see `ProcessGroup.sum`.

    Returns:
        The gradient, shaped as `gamma`, detached.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    ahead = {
        name: (value - lr * gradient).detach().requires_grad_()
        for (name, value), gradient in zip(parameters.items(), sum_over_processes(gradients), strict=True)
    }
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with autocast():
        logits = functional_call(model, ahead | buffers, (images,))
    validation_gradients = torch.autograd.grad(validation_loss(logits), list(ahead.values()))
    product = torch.stack([(a * b).sum() for a, b in zip(gradients, validation_gradients, strict=True)]).sum()
    (gradient,) = sum_over_processes(torch.autograd.grad(product, gamma))
    return -lr * gradient

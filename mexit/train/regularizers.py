"""What composes with any method: a TRADES term, adversarial weight perturbation, averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mexit.train.methods.base import Outputs


def trades_term(outputs: Outputs) -> Tensor:
    """TRADES (H. Zhang et al., ICML 2019): sum over exits of KL( f_k(x) || f_k(x_adv) ), mean over samples.

    The clean side is not detached: with a detached one robust accuracy falls by several points.
    """
    clean = outputs.clean.log_softmax(dim=-1)
    attacked = outputs.require_attacked().log_softmax(dim=-1)
    return (clean.exp() * (clean - attacked)).sum(dim=-1).mean(dim=-1).sum()


@contextmanager
def perturbed_weights(
    model: nn.Module,
    size: float,
    loss: Callable[[], Tensor],
    pool: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> Iterator[None]:
    """AWP (D. Wu, S.-T. Xia, Y. Wang, NeurIPS 2020): inside, the weights have moved uphill.

    Each weight tensor w with two or more dimensions moves by size * |w| * g / |g|, g the gradient of `loss` there;
    leaving takes the move back, so that a gradient found inside is applied to the weights as they were.

    Args:
        model: its parameters are changed in place.
        size: of the move, relative to the norm of each tensor.
        loss: computed afresh from the model.
        pool: where several processes have a part of the loss each, its gradients to their weighted sums over all
            of them; see `ProcessGroup.sum`.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    gradients = pool(torch.autograd.grad(loss(), weights))
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient * (size * weight.norm() / gradient.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


class Average:
    """Exponential moving average of a network's weights and statistics.

    Args:
        decay: share of the old average that is kept at each step; in the first steps less, (1 + t) / (10 + t), so
            that the random initial weights do not linger.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after `step` steps, from 0."""
        if not self.weights:
            self.weights = {name: value.detach().clone() for name, value in weights.items()}
            return
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, value in weights.items():
            if value.is_floating_point():
                self.weights[name].lerp_(value.detach(), 1 - keep)
            else:
                self.weights[name].copy_(value)

"""Regularizers that combine with any method: TRADES, adversarial weight perturbation (AWP), weight averaging (EMA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mexit.train.methods.base import Outputs


def trades_term(outputs: Outputs) -> Tensor:
    """TRADES (H. Zhang et al., ICML 2019): weighted sum over exits of KL( f_k(x) || f_k(x_adv) ), mean over samples.

    The clean side is not detached; detaching it costs several points of robust accuracy.
    """
    clean = outputs.clean.log_softmax(dim=-1)
    attacked = outputs.require_attacked().log_softmax(dim=-1)
    return outputs.weight_exits((clean.exp() * (clean - attacked)).sum(dim=-1).mean(dim=-1)).sum()


@contextmanager
def perturbed_weights(
    model: nn.Module,
    size: float,
    loss: Callable[[], Tensor],
    reduce: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> Iterator[None]:
    """AWP (D. Wu, S.-T. Xia, Y. Wang, NeurIPS 2020): perturb the weights for the duration of a `with` block.

    Each weight tensor w with at least two dimensions becomes w + size * |w| * g / |g|, with g the gradient of `loss`
    at w. On exit the original weights are restored, so that a gradient computed inside is applied to them.

    Args:
        model: its parameters are changed in place.
        size: norm of the perturbation relative to the norm of each tensor.
        loss: computes the loss from the model.
        reduce: sums the gradients over processes, see `ProcessGroup.sum`.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    gradients = reduce(torch.autograd.grad(loss(), weights))
    original = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient * (size * weight.norm() / gradient.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, original, strict=True):
                weight.copy_(value)


class EMA:
    """Exponential moving average of a network's weights and statistics.

    Args:
        decay: fraction of the average that each step keeps. At step t it is at most (1 + t) / (10 + t), which removes
            the random initial weights sooner.

    Attributes:
        weights: the averaged state dict; empty before the first update.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Add the state dict after step `step`, from 0. Integer entries are copied."""
        if not self.weights:
            self.weights = {name: value.detach().clone() for name, value in weights.items()}
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        names = [name for name, value in weights.items() if value.is_floating_point()]
        averages, values = [self.weights[name] for name in names], [weights[name].detach() for name in names]
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(averages, values, step)  # a few kernels instead of one per tensor
        for name in weights.keys() - set(names):
            self.weights[name].copy_(weights[name])

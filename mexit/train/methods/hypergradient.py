"""The gradient of a validation loss with respect to the weights of training terms, one step ahead.

With theta the parameters, gamma the weights and lr the size of the coming step:

    theta' = theta - lr grad_theta L_train(theta, gamma)
    d L_val(theta') / d gamma_k = - lr < grad L_val(theta'), d/d gamma_k grad_theta L_train(theta, gamma) >

For L_train = sum_k gamma_k L_k the last factor is grad L_k(theta). It is exact, and costs one differentiable
backward pass, one pass over validation images, and one backward pass through the first one, however many weights
there are. The step is plain gradient descent: momentum and weight decay are left out. Every pass has the precision
of the forward pass that it belongs to, bfloat16 under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from mexit.attacks.multi_exit_attack import Autocast
from mexit.models.multi_exit import MultiExit


def hypergradient(
    model: MultiExit,
    loss: Tensor,
    gamma: Tensor,
    lr: float,
    images: Tensor,
    judge: Callable[[Tensor], Tensor],
    autocast: Autocast,
    pool: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> Tensor:
    """d L_val(theta') / d gamma.

    Args:
        model: left as it is, statistics of BatchNorm included; the graph of `loss` stays usable.
        loss: L_train, a scalar that depends on the model's parameters and on `gamma`.
        gamma: any shape, requires grad.
        lr: of the step ahead.
        images: validation images, (B, C, H, W); the network runs in its present mode.
        judge: validation logits (E, B, C) to L_val, a scalar.
        autocast: for the pass over them.
        pool: where several processes have a part of `loss` each, its gradients to their weighted sums over all of
            them; see `ProcessGroup.sum`.

    Returns:
        Like `gamma`, detached.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    slope = torch.autograd.grad(loss, list(trained.values()), create_graph=True)
    ahead = {
        name: (value - lr * step).detach().requires_grad_()
        for (name, value), step in zip(trained.items(), pool(slope), strict=True)
    }
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    with autocast():
        logits = functional_call(model, ahead | statistics, (images,))
    uphill = torch.autograd.grad(judge(logits), list(ahead.values()))
    product = torch.stack([(a * b).sum() for a, b in zip(slope, uphill, strict=True)]).sum()
    (gradient,) = pool(torch.autograd.grad(product, gamma))
    return -lr * gradient

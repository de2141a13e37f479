"""The gradient of a validation loss with respect to the weights of training terms, one gradient step ahead.

With theta the parameters, gamma the weights and lr the size of the coming step:

    theta' = theta - lr grad_theta L_train(theta, gamma)
    d L_val(theta') / d gamma_k = - lr < grad L_val(theta'), d/d gamma_k grad_theta L_train(theta, gamma) >

For L_train = sum_k gamma_k L_k the last factor is grad L_k(theta). The result is exact. It costs one differentiable
backward pass, one pass over validation images, and one backward pass through the first one, for any number of
weights. The step is plain gradient descent, without momentum and weight decay. Every backward pass has the precision
of its forward pass, bfloat16 under autocast.
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
    validation_loss: Callable[[Tensor], Tensor],
    autocast: Autocast,
    sum_over_processes: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> Tensor:
    """d L_val(theta') / d gamma.

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

"""THE gradient loop: projected steps uphill inside an L-infinity ball, and inside [0, 1].

A. Madry et al.: Towards deep learning models resistant to adversarial attacks, ICLR 2018. As in RDI-Nets' code,
the random start is uniform in the ball and the last iterate is returned. FGSM is one step of size eps without
a random start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mexit.errors import UsageError


@dataclass(frozen=True)
class Steps:
    """How far and how often.

    Attributes:
        eps: radius of the ball, as a fraction of the pixel range [0, 1].
        size: of one step, likewise.
        count: how many.
        random_start: begin at a uniform point of the ball instead of the image.
    """

    eps: float
    size: float
    count: int
    random_start: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.eps <= 1 and 0 < self.size <= 1 and self.count >= 1):
            raise UsageError(
                f"an attack needs 0 < eps <= 1, 0 < step <= 1 and at least one step, found eps {self.eps}, "
                f"step {self.size}, {self.count} steps (pixels lie in [0, 1]; write 8/255, not 8)"
            )


def ascend(images: Tensor, steps: Steps, loss: Callable[[Tensor], Tensor], noise: Tensor | None) -> Tensor:
    """Climb `loss` from `images`.

    Args:
        images: (B, C, H, W) in [0, 1].
        steps: see `Steps`.
        loss: of a batch like `images`, a scalar; summed over rows, since only signs of the gradient count.
        noise: uniform numbers in [0, 1) like `images` for the random start; None if there is none.

    Returns:
        Attacked images, detached, within eps of `images` and in [0, 1].
    """
    attacked = images
    if steps.random_start and noise is not None:
        attacked = images + (2 * noise - 1) * steps.eps
    low, high = (images - steps.eps).clamp_(min=0), (images + steps.eps).clamp_(max=1)
    for _ in range(steps.count):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        attacked = (attacked.detach() + steps.size * gradient.sign()).clamp_(low, high)
    return attacked.detach()

"""Layers that compute what others do, faster, for bfloat16 on the processor; `optimise_layers` puts them into a network.

Measured: torch's bfloat16 kernels go through float32, so ReLU took a third of an attack on ResNet-38; and in
channels_last the gradients of a concatenation are views with gaps, on which later kernels are far slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mexit.models.msdnet_layers import Growth


class BitReLU(nn.Module):
    """ReLU, bit for bit, on the 16-bit patterns: of a bfloat16 the sign bit is that of the integer.

    The one difference: a NaN whose sign bit is set counts as negative. Other types take the usual path.

    Args:
        inplace: as in `nn.ReLU`.
    """

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, features: Tensor) -> Tensor:
        """Any shape."""
        if features.dtype != torch.bfloat16:
            return torch.relu_(features) if self.inplace else torch.relu(features)
        rectified: Tensor = _BitReLU.apply(features, self.inplace)  # type: ignore[no-untyped-call]
        return rectified


class _BitReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, inplace: bool) -> Tensor:
        bits = features.view(torch.int16)
        if inplace:
            bits.clamp_min_(0)
            ctx.mark_dirty(features)
            out = features
        else:
            out = bits.clamp(min=0).view(torch.bfloat16)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        passed: Tensor = _Pass.apply(gradient, out)  # type: ignore[no-untyped-call]
        return passed, None


class _Pass(torch.autograd.Function):
    """The gradient where the output is above 0, else 0; its own derivative, so that it can be taken twice."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(out)
        bits: Tensor = torch.ops.aten.threshold_backward(gradient.view(torch.int16), out.view(torch.int16), 0)
        return bits.view(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        passed: Tensor = _Pass.apply(gradient, out)  # type: ignore[no-untyped-call]
        return passed, None


class DenseGrowth(nn.Module):
    """MSDNet's `Growth`, with gradients that leave no gaps between the parts of its concatenation.

    Args:
        growth: its modules are shared, under the same names.
    """

    def __init__(self, growth: Growth) -> None:
        super().__init__()
        self.normal, self.down = growth.normal, growth.down

    def forward(self, features: Tensor, finer: Tensor | None) -> Tensor:
        """See `Growth.forward`."""
        down = () if self.down is None else (self.down(finer),)
        joined: Tensor = _Join.apply(features, *down, self.normal(features))  # type: ignore[no-untyped-call]
        return joined


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        last = gradient.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        parts = torch.split(gradient, ctx.widths, dim=1)
        return tuple(part.contiguous(memory_format=layout) for part in parts)


def optimise_layers(network: nn.Module) -> None:
    """Swap the layers of a network that have a faster twin. Names, weights and results stay."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.ReLU:
                setattr(module, name, BitReLU(child.inplace))
            elif isinstance(child, Growth):
                setattr(module, name, DenseGrowth(child))

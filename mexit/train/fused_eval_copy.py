"""A copy of the network that is cheaper to attack: BatchNorm folded into the convolutions, all of it in bfloat16.

In eval mode BatchNorm is an affine map of each channel, so conv + BatchNorm is one convolution:

    w' = w s      b' = beta + (b - mean) s      s = gamma / sqrt(var + eps)

An attack runs the network forth and back several times with the same weights: they are folded and cast once.
The plain path, attacking the network itself, stays beside it: float32 takes it, and every reported figure.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mexit.models.multi_exit import MultiExit
from mexit.train.fast_layers import optimise_layers


@dataclass(frozen=True)
class _Fold:
    """A convolution and its BatchNorm in the network, and the one convolution in the copy."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    target: nn.Conv2d

    def refresh(self) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert self.target.bias is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        self.target.weight.copy_(self.convolution.weight * scale[:, None, None, None])
        before = 0 if self.convolution.bias is None else self.convolution.bias
        self.target.bias.copy_(norm.bias + (before - norm.running_mean) * scale)


class _Enter(nn.Module):
    """From normalised pixels to the type and memory format of the copy."""

    def __init__(self, normalise: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalise, self.dtype = normalise, dtype

    def forward(self, images: Tensor) -> Tensor:
        normalised: Tensor = self.normalise(images)
        return normalised.to(self.dtype, memory_format=torch.channels_last)


class FusedEvalCopy:
    """The copy. Only for attacks in eval mode: it has no batch statistics.

    Args:
        network: followed by `refreshed`.
        dtype: that the copy computes in.
    """

    def __init__(self, network: MultiExit, dtype: torch.dtype = torch.bfloat16) -> None:
        self._copy = copy.deepcopy(network).eval().requires_grad_(False)
        self._folds = _fold(network, self._copy)
        optimise_layers(self._copy)
        for layer in self._copy.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(dtype)
        self._copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._rest = _others(network, self._copy, {fold.target for fold in self._folds})
        self._copy.normalise = _Enter(self._copy.normalise, dtype)

    def refreshed(self) -> MultiExit:
        """The copy, with the network's weights and statistics of now."""
        with torch.no_grad():
            for fold in self._folds:
                fold.refresh()
            for source, target in self._rest:
                target.copy_(source)
        return self._copy


def _fold(network: MultiExit, twin: MultiExit) -> list[_Fold]:
    """Every convolution of `twin` that has a BatchNorm right behind it takes that over; the BatchNorm goes."""
    folds = []
    for name, chain in list(twin.named_modules()):
        if not isinstance(chain, nn.Sequential):
            continue
        for (place, target), (behind, norm) in pairwise(list(chain.named_children())):
            if isinstance(target, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                convolution = network.get_submodule(f"{name}.{place}")
                source = network.get_submodule(f"{name}.{behind}")
                assert isinstance(convolution, nn.Conv2d)
                assert isinstance(source, nn.BatchNorm2d)
                target.bias = nn.Parameter(torch.zeros_like(source.bias), requires_grad=False)
                chain.set_submodule(behind, nn.Identity())
                folds.append(_Fold(convolution, source, target))
    return folds


def _others(network: MultiExit, twin: MultiExit, folded: set[nn.Conv2d]) -> list[tuple[Tensor, Tensor]]:
    """Weights and statistics that are taken over as they are: pairs of the network's and the copy's."""
    done = {id(tensor) for layer in folded for tensor in layer.parameters()}
    sources = dict(network.named_parameters()) | dict(network.named_buffers())
    targets = dict(twin.named_parameters()) | dict(twin.named_buffers())
    return [(sources[name], target) for name, target in targets.items() if id(target) not in done]

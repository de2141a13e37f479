"""`MultiExit`, the container of every network: an ordered list of stages with one classifier after each.

Stage k maps the carried features (a tuple of tensors; MSDNet carries several scales) to the next carried features
and the logits of exit k. Training, attacks, cost counting and export all iterate over this list.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from mexit.errors import UsageError

Features = tuple[Tensor, ...]


class Normalise(nn.Module):
    """Channel-wise (pixels - mean) / std, as a layer.

    Args:
        mean, std: one number per channel, for pixels in [0, 1]. Stored with the weights, not trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] to about zero mean and unit variance."""
        return (images - self.mean) / self.std


class Chain(nn.Module):
    """Like `nn.Sequential`, but the modules take and return several tensors.

    Args:
        links: modules in order. A tuple returned by one module becomes the arguments of the next.
    """

    def __init__(self, links: Sequence[nn.Module]) -> None:
        super().__init__()
        self.links = nn.ModuleList(links)

    def forward(self, *features: Tensor) -> Features:
        """Run all modules on the carried features; returns the next carried features."""
        for link in self.links:
            features = _as_tuple(link(*features))
        return features


class Stage(nn.Module):
    """The layers between two exits, and the head of the exit that follows them.

    Args:
        trunk: maps the carried features to the next ones (a tensor or a tuple of tensors).
        head: maps the next carried features to the logits (B, C) of this exit.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, *features: Tensor) -> tuple[Features, Tensor]:
        """Carried features of B images to the next carried features and the logits (B, C)."""
        features = self.forward_trunk(features)
        return features, self.head(*features)

    def forward_trunk(self, features: Features) -> Features:
        """Carried features to the next carried features, without running the head."""
        return _as_tuple(self.trunk(*features))


class MultiExit(nn.Module):
    """A network with one classifier after every stage.

    Args:
        stages: E stages in order, one exit each.
        input_shape: (channels, H, W) of an image.
        classes: C.
        normalise: maps pixels in [0, 1] to the input of stage 1; None = identity. It is part of the network, so
            attacks, calibration and camera all work on pixels in [0, 1] with the same eps.
        numbers: the number of each exit, (E,), rising; default 1..E. With some exits left out they have gaps.

    Attributes:
        fixed_norms: whether BatchNorm keeps its running statistics in train mode too, as a pretrained network needs
            that is trained on few images.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        input_shape: tuple[int, int, int],
        classes: int,
        normalise: nn.Module | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.normalise = normalise or nn.Identity()
        self.input_shape = input_shape
        self.classes = classes
        self.numbers = tuple(numbers or range(1, len(stages) + 1))
        self.fixed_norms = False

    def train(self, mode: bool = True) -> MultiExit:
        """Set train or eval mode; with `fixed_norms`, BatchNorm stays in eval mode."""
        super().train(mode)
        if self.fixed_norms:
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                    layer.train(False)
        return self

    @property
    def exits(self) -> int:
        """Number of exits, E."""
        return len(self.stages)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] to the logits of every exit, (E, B, C)."""
        features: Features = (self.normalise(images),)
        logits = []
        for stage in self.stages:
            features, exit_logits = stage(*features)
            logits.append(exit_logits)
        return torch.stack(logits)

    def forward_exit(self, images: Tensor, k: int) -> Tensor:
        """Logits of one exit, without running later layers or other heads.

        Args:
            images: (B, channels, H, W) in [0, 1].
            k: number of the exit, 1 to E.

        Returns:
            (B, C).
        """
        features: Features = (self.normalise(images),)
        for stage in self.stages[:k]:
            features = cast("Stage", stage).forward_trunk(features)
        logits: Tensor = cast("Stage", self.stages[k - 1]).head(*features)
        return logits


def keep_exits(network: MultiExit, numbers: Sequence[int]) -> MultiExit:
    """The same network with some of its exits only.

    Args:
        network: its modules are shared with the result, not copied.
        numbers: the exits to keep, from 1, rising.

    Returns:
        A network with one stage for each kept exit, which holds the trunks since the one before; layers behind the
        last kept exit are left out.
    """
    stages = [cast("Stage", stage) for stage in network.stages]
    kept = []
    for before, after in pairwise((0, *numbers)):
        trunks = [stage.trunk for stage in stages[before:after]]
        kept.append(Stage(trunks[0] if len(trunks) == 1 else Chain(trunks), stages[after - 1].head))
    return MultiExit(kept, network.input_shape, network.classes, network.normalise, numbers)


def single_exit(network: MultiExit) -> MultiExit:
    """The static network: the same backbone with its last exit only, the modules shared with the network.

    This is the single-exit baseline of RDI-Nets (T.-K. Hu, T. Chen, H. Wang, Z. Wang, ICLR 2020).
    """
    return keep_exits(network, (network.exits,))


def check_sides(input_shape: tuple[int, int, int], smallest: int) -> None:
    """Raise `UsageError` if a side of the images (channels, H, W) has fewer than `smallest` pixels."""
    if min(input_shape[1:]) < smallest:
        raise UsageError(
            f"this network needs images of at least {smallest} x {smallest} pixels, found "
            f"{input_shape[1]} x {input_shape[2]}: choose a larger --size"
        )


def _as_tuple(output: Tensor | Sequence[Tensor]) -> Features:
    return (output,) if isinstance(output, Tensor) else tuple(output)

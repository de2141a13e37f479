"""A multi-exit network IS an ordered list of stages.

Stage k maps the carried features (a tuple of tensors; MSDNet carries several scales) to the next carried
features and the logits of exit k. Forward, cutting for export, cost counting and the engine all walk this list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

Features = tuple[Tensor, ...]


class Stage(nn.Module):
    """Layers between two exits, and the head of the exit that follows them.

    Args:
        trunk: carried features to the next ones (a tensor or a tuple of tensors).
        head: the next carried features to logits (B, C).
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, *carried: Tensor) -> tuple[Features, Tensor]:
        """Features of B rows to the next features and the logits (B, C)."""
        features = self.carry(carried)
        return features, self.head(*features)

    def carry(self, carried: Features) -> Features:
        """Features of B rows to the next features; the head does not run."""
        out = self.trunk(*carried)
        return cast("Features", tuple(out)) if isinstance(out, tuple | list) else (cast("Tensor", out),)


class MultiExit(nn.Module):
    """A network with one classifier after every stage.

    Args:
        stages: in order; one exit each.
        input_shape: (channels, H, W).
        classes: C.
        normalise: from pixels in [0, 1] to what stage 1 wants; inside the network, so that attacks,
            calibration and camera share one space and one eps.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        input_shape: tuple[int, int, int],
        classes: int,
        normalise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.normalise = normalise or nn.Identity()
        self.input_shape = input_shape
        self.classes = classes

    @property
    def exits(self) -> int:
        """E."""
        return len(self.stages)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] to the logits of every exit, (E, B, C)."""
        carried: Features = (self.normalise(images),)
        logits = []
        for stage in self.stages:
            carried, exit_logits = stage(*carried)
            logits.append(exit_logits)
        return torch.stack(logits)

    def one_exit(self, images: Tensor, k: int) -> Tensor:
        """Images to the logits (B, C) of exit k, from 1, alone: neither later layers nor other heads run.

        That is what makes an attack on one exit cheap.
        """
        carried: Features = (self.normalise(images),)
        for stage in self.stages[:k]:
            carried = cast("Stage", stage).carry(carried)
        logits: Tensor = cast("Stage", self.stages[k - 1]).head(*carried)
        return logits

"""Cut a multi-exit network into one torch module per segment.

Segment k maps the features of segment k-1 to the next features and the logits of exit k. The last segment returns
logits only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mexit.models import MultiExit, Stage


@dataclass(frozen=True)
class TorchSegment:
    """A segment in torch, with the names of its tensors.

    Attributes:
        module: `forward(*inputs)` returns the outputs.
        inputs, outputs: names; the last output is the logits.
        example: inputs with batch size 2 (the exporter takes a batch of 1 for a constant).
        head_parameters: number of trained values that only the logits need; 0 for the last segment.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    head_parameters: int = 0


class StageModule(nn.Module):
    """One stage as a function from tensors to tensors; the first stage also normalises."""

    def __init__(self, stage: Stage, normalise: nn.Module | None, is_last: bool) -> None:
        super().__init__()
        self.stage = stage
        self.normalise = normalise
        self.is_last = is_last

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        """Map carried features to the next features and the logits."""
        if self.normalise is not None:
            carried = (self.normalise(carried[0]),)
        features, logits = self.stage(*carried)
        return (logits,) if self.is_last else (*features, logits)


def cut_segments(model: MultiExit, input_name: str = "input") -> list[TorchSegment]:
    """Cut a network into its segments, in order. The model is put in eval mode."""
    model.eval()
    carried: tuple[Tensor, ...] = (torch.rand(2, *model.input_shape),)
    inputs: tuple[str, ...] = (input_name,)
    segments = []
    for k, stage in enumerate(model.stages, start=1):
        normalise = model.normalise if k == 1 else None
        module = StageModule(cast("Stage", stage), normalise, is_last=k == model.exits).eval()
        with torch.no_grad():
            *features, _ = module(*carried)
        outputs = tuple(f"features_{k}_{i}" for i in range(1, len(features) + 1))
        head = 0 if k == model.exits else sum(value.numel() for value in module.stage.head.parameters())
        segments.append(TorchSegment(module, inputs, (*outputs, f"logits_{k}"), carried, head))
        carried, inputs = tuple(features), outputs
    return segments

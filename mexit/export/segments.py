"""Cut a multi-exit network into one module a segment.

Segment k takes the features that segment k-1 gave and gives the next ones, then the logits of exit k. The last
segment gives logits only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mexit.models import MultiExit, Stage


@dataclass(frozen=True)
class Cut:
    """A segment and the names of what goes in and out.

    Attributes:
        module: `forward(*inputs)` to outputs.
        inputs, outputs: names; the last output is the logits.
        example: inputs for a batch of 2 (a batch of 1 would be taken for a constant).
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]


class Segment(nn.Module):
    """One stage as a function of plain tensors."""

    def __init__(self, stage: Stage, normalise: nn.Module | None, is_last: bool) -> None:
        super().__init__()
        self.stage = stage
        self.normalise = normalise
        self.is_last = is_last

    def forward(self, *carried: Tensor) -> tuple[Tensor, ...]:
        """Carried features to the next features and the logits."""
        if self.normalise is not None:
            carried = (self.normalise(carried[0]),)
        features, logits = self.stage(*carried)
        return (logits,) if self.is_last else (*features, logits)


def cut(model: MultiExit, input_name: str = "input") -> list[Cut]:
    """The segments of a network, in order. The model is put in eval mode."""
    model.eval()
    carried: tuple[Tensor, ...] = (torch.rand(2, *model.input_shape),)
    inputs: tuple[str, ...] = (input_name,)
    cuts = []
    for k, stage in enumerate(model.stages, start=1):
        assert isinstance(stage, Stage)
        module = Segment(stage, model.normalise if k == 1 else None, k == model.exits).eval()
        with torch.no_grad():
            *features, _ = module(*carried)
        outputs = tuple(f"features_{k}_{i}" for i in range(1, len(features) + 1))
        cuts.append(Cut(module, inputs, (*outputs, f"logits_{k}"), carried))
        carried, inputs = tuple(features), outputs
    return cuts

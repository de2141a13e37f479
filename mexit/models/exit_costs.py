"""MACs and parameters of every exit, counted on the torch network.

The rule is the same as for exported graphs: one multiply-add is one MAC. Convolutions and linear layers count;
biases, normalisation, activations and pooling are free. The heads of earlier exits are included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mexit.errors import MexitError
from mexit.models.multi_exit import Features, MultiExit, Stage


@dataclass(frozen=True)
class ExitCost:
    """Cost of one image that leaves at an exit.

    Attributes:
        macs: everything that runs up to this exit, earlier heads included.
        head_macs: the head of this exit alone.
        parameters: of the layers up to this exit, earlier heads included.
    """

    macs: int
    head_macs: int
    parameters: int


def exit_costs(network: MultiExit) -> list[ExitCost]:
    """Cost of every exit, E entries.

    On the device "meta" only shapes are computed, which needs no memory for weights. The mode of the network is kept.

    Raises:
        MexitError: the network has weights in a layer of an unknown kind.
    """
    was_training = network.training
    features: Features = (torch.zeros(1, *network.input_shape, device=next(network.parameters()).device),)
    network.eval()  # BatchNorm in train mode rejects a batch of one
    counter = (
        _CountedOperations if any(isinstance(one, fx.GraphModule) for one in network.modules()) else _CountedLayers
    )
    macs, parameters = 0, 0
    costs: list[ExitCost] = []
    try:
        with torch.no_grad():
            for stage in network.stages:
                with counter(cast("Stage", stage)) as trunk:
                    features = cast("Stage", stage).forward_trunk(
                        features if costs else (network.normalise(*features),)
                    )
                with counter(cast("Stage", stage)) as head:
                    cast("Stage", stage).head(*features)
                macs += trunk.macs + head.macs
                parameters += sum(parameter.numel() for parameter in stage.parameters())
                costs.append(ExitCost(macs, head.macs, parameters))
    finally:
        network.train(was_training)
    return costs


class _CountedLayers:
    """Counts the MACs of the layers of a stage while it runs, by hooks. Raises `MexitError` for an unknown layer."""

    def __init__(self, stage: Stage) -> None:
        self.macs = 0
        self._layers = [layer for layer in stage.modules() if any(True for _ in layer.parameters(recurse=False))]

    def __enter__(self) -> _CountedLayers:
        self._handles = [layer.register_forward_hook(self._add) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            self.macs += output[0].numel() * layer.weight[0].numel()  # each output value takes one row of the weights
        elif not isinstance(layer, nn.BatchNorm2d):
            raise MexitError(f"cannot count the MACs of a layer {type(layer).__name__}")


class _CountedOperations:
    """Counts the MACs of convolutions and matrix products of any code while it runs, attention included."""

    def __init__(self, _: Stage) -> None:
        self.macs = 0

    def __enter__(self) -> _CountedOperations:
        self._counter = FlopCounterMode(display=False)
        self._backend = sdpa_kernel(SDPBackend.MATH)  # as matrix products, which the counter knows
        self._counter.__enter__()  # type: ignore[no-untyped-call]
        self._backend.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._backend.__exit__(*error)
        self._counter.__exit__(*error)  # type: ignore[no-untyped-call]
        self.macs = self._counter.get_total_flops() // 2

"""The network of the demo: three exits on 8x8 grey images, without BatchNorm or dropout, trained in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mexit.models.multi_exit import MultiExit, Normalise, Stage

INPUT_SHAPE = (1, 8, 8)


def build(
    classes: int,
    input_shape: tuple[int, int, int] = INPUT_SHAPE,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> MultiExit:
    """A freshly initialised network with exits after 2, 4 and 6 convolutions.

    Args:
        classes: C.
        input_shape: (channels, H, W).
        mean, std: normalisation of the pixels, one number per channel, for pixels in [0, 1]; () = none.
    """
    network = MultiExit(
        [
            Stage(_block(input_shape[0], 16, 24), _head(24, 4, classes)),
            Stage(_block(24, 40, 40, first_stride=2), _head(40, 2, classes)),
            Stage(_block(40, 64, 64), _head(64, 2, classes)),
        ],
        input_shape,
        classes,
        Normalise(mean, std) if mean else None,
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network


def _block(width_in: int, width: int, width_out: int, first_stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride=first_stride, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width_out, 3, padding=1),
        nn.ReLU(),
    )


def _head(width: int, side: int, classes: int) -> nn.Sequential:
    """Pooling to `side` x `side`, then two linear layers."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(side),
        nn.Flatten(),
        nn.Linear(width * side * side, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )

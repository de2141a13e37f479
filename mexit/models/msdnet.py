"""MSDNet: several scales side by side, densely connected, with a classifier after every block.

G. Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018; the network of
NEO-KD (NeurIPS 2023) and HDKD (AAAI 2021). Names and rounding follow the public PyTorch port (kalviny/MSDNet-PyTorch).
The carried features are the remaining scales, finest first; every block is one stage. A layer takes one tensor per
remaining scale and returns as many or fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise
from math import ceil

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mexit.errors import UsageError
from mexit.models.multi_exit import Chain, MultiExit, Normalise, Stage

STEM_STRIDES = (1, 2, 4)


@dataclass(frozen=True)
class MSDNetConfig:
    """Architecture of an MSDNet. Names in brackets are the options of the PyTorch port.

    Attributes:
        blocks: number of blocks and exits, E (`nBlocks`).
        base: layers of the first block (`base`).
        step: layers of each later block (`step`, with the step mode "even").
        channels: channels of the finest scale after the stem, divided by its growth factor (`nChannels`).
        growth: channels that a layer adds, divided likewise (`growthRate`).
        growth_factors: multiple of `channels` and `growth` in each scale, finest first (`grFactor`). Their number is
            the number of scales.
        bottleneck_factors: inner width of a 3x3 convolution in each scale, as a multiple of its outputs (`bnFactor`);
            None = no bottlenecks.
        reduction: share of the channels that a transition keeps; 0 = no transitions (`reduction`).
        stem: stride of the stem: 1 (3x3), 2 (3x3, stride 2) or 4 (7x7, stride 2, max pooling).
        head_width: channels inside a classifier; None = the number of its input channels.
        input_shape: (channels, H, W).
        mean, std: of the pixels in [0, 1], one number per channel.

    Raises:
        UsageError: values that give no network.
    """

    blocks: int
    base: int
    step: int
    channels: int = 16
    growth: int = 6
    growth_factors: tuple[int, ...] = (1, 2, 4)
    bottleneck_factors: tuple[int, ...] | None = (1, 2, 4)
    reduction: float = 0.5
    stem: int = 1
    head_width: int | None = 128
    input_shape: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.stem not in STEM_STRIDES:
            raise UsageError(f"MSDNet: stem must be one of {', '.join(map(str, STEM_STRIDES))}, found {self.stem}")
        if min(self.blocks, self.base, self.step, self.channels, self.growth) < 1 or not 0 <= self.reduction <= 1:
            raise UsageError(f"MSDNet: counts must be at least 1 and reduction in [0, 1], found {self}")
        if self.bottleneck_factors and len(self.bottleneck_factors) != self.scales:
            raise UsageError(f"MSDNet: {self.scales} scales, bottleneck factors {self.bottleneck_factors}")
        if any(self.growth * factor % 2 for factor in self.growth_factors[1:]):
            raise UsageError(
                f"MSDNet: two paths share the growth {self.growth} times {self.growth_factors}: make it even"
            )
        self._check_size()

    def _check_size(self) -> None:
        # A classifier halves the coarsest scale twice and pools 2x2, which must leave one position.
        for side in self.input_shape[1:]:
            coarsest = ceil(side / (self.stem * 2 ** (self.scales - 1)))
            if ceil(ceil(coarsest / 2) / 2) not in (2, 3):
                raise UsageError(
                    f"MSDNet: {side} pixels leave {coarsest} in the coarsest of {self.scales} scales; its "
                    "classifier needs 5 to 12: change the stem or the number of scales"
                )

    @property
    def scales(self) -> int:
        """Number of scales."""
        return len(self.growth_factors)

    @property
    def block_layers(self) -> tuple[int, ...]:
        """Layers of each block, E numbers."""
        return (self.base, *[self.step] * (self.blocks - 1))


@dataclass(frozen=True)
class LayerShape:
    """Widths and scales of one layer. A scale has its growth factor times as many channels as a width says.

    Attributes:
        width: input width.
        scales_in: number of scales that enter the layer.
        scales_out: number of scales that leave it.
        width_out: output width, after the transition if there is one.
        transition: whether a transition follows.
    """

    width: int
    scales_in: int
    scales_out: int
    width_out: int
    transition: bool


def layer_shapes(config: MSDNetConfig) -> list[list[LayerShape]]:
    """The shapes of all layers, block by block."""
    total, width, numbers = sum(config.block_layers), config.channels, count(1)
    blocks = []
    for layers in config.block_layers:
        block = []
        for number in islice(numbers, layers):
            block.append(_layer_shape(config, number, total, width))
            width = block[-1].width_out
        blocks.append(block)
    return blocks


def build(config: MSDNetConfig, classes: int) -> MultiExit:
    """A freshly initialised network with `classes` classes."""
    stages = []
    for k, shapes in enumerate(layer_shapes(config)):
        links: list[nn.Module] = [] if k else [_stem(config)]
        for shape in shapes:
            links += _modules(config, shape)
        width = shapes[-1].width_out * config.growth_factors[-1]
        stages.append(Stage(Chain(links), Head(width, config.head_width or width, classes)))
    network = MultiExit(stages, config.input_shape, classes, Normalise(config.mean, config.std))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # normal with variance 2 / (k k C_out), as in the Lua code; the port's loop never reaches its convolutions
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network


def _layer_shape(config: MSDNetConfig, layer: int, total: int, width: int) -> LayerShape:
    """The shape of layer 1..total of the whole network, for its input width."""
    scales_in, scales_out = (_scales_after(config, total, number) for number in (max(1, layer - 1), layer))
    wider = width + config.growth
    narrow = config.reduction > 0 and scales_in > scales_out
    return LayerShape(width, scales_in, scales_out, int(config.reduction * wider) if narrow else wider, narrow)


def _scales_after(config: MSDNetConfig, total: int, layer: int) -> int:
    """Number of scales that leave layer `layer`: the fine scales end evenly over the depth (`prune` "max")."""
    return config.scales - (layer - 1) // ceil(total / config.scales)


def _stem(config: MSDNetConfig) -> Stem:
    widths = [config.channels * factor for factor in config.growth_factors]
    return Stem(widths, config.stem, config.input_shape[0])


def _modules(config: MSDNetConfig, shape: LayerShape) -> list[nn.Module]:
    """A layer, and the transition after it if there is one."""
    scales = range(config.scales - shape.scales_out, config.scales)
    dropped = shape.scales_in > shape.scales_out
    modules: list[nn.Module] = [
        Layer([_growth(config, shape.width, scale, dropped or scale > scales[0]) for scale in scales])
    ]
    if shape.transition:
        factors = [config.growth_factors[scale] for scale in scales]
        before = shape.width + config.growth
        modules.append(Transition([(before * factor, shape.width_out * factor) for factor in factors]))
    return modules


def _growth(config: MSDNetConfig, width: int, scale: int, has_finer: bool) -> Growth:
    factors = config.growth_factors
    inner = config.bottleneck_factors or (None,) * config.scales
    out = config.growth * factors[scale]
    half = out // 2 if has_finer else out
    normal = bottleneck_unit(width * factors[scale], half, inner[scale])
    if not has_finer:
        return Growth(normal, None)
    # The bottleneck of the path from the finer scale uses the factor of that scale.
    down = bottleneck_unit(width * factors[scale - 1], half, inner[scale - 1], stride=2)
    return Growth(normal, down)


class Stem(nn.Module):
    """The first layer: computes the finest scale from the image, and every coarser scale from the next finer one.

    Args:
        widths: channels of each scale, finest first.
        stride: of the finest scale: 1 (CIFAR), 2, or 4 (ImageNet: 7x7 and max pooling).
        channels: of the image.
    """

    def __init__(self, widths: Sequence[int], stride: int, channels: int) -> None:
        super().__init__()
        coarser = [unit(before, after, stride=2) for before, after in pairwise(widths)]
        self.scales = nn.ModuleList([_finest_scale(channels, widths[0], stride), *coarser])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images (B, channels, H, W) to one tensor per scale."""
        features = [image]
        for scale in self.scales:
            features.append(scale(features[-1]))
        return tuple(features[1:])


class Growth(nn.Module):
    """One layer at one scale: concatenates [x, normal(x)], or [x, down(finer), normal(x)] if there is a finer scale.

    Args:
        normal: path within the scale.
        down: path of stride 2 from the next finer scale; None = there is none.

    Attributes:
        contiguous_gradients: whether the backward pass copies the gradient of each part. In channels_last a part of
            the whole gradient is a strided view, which slows later kernels down: without the copies a bfloat16
            training step of MSDNet on the CPU takes 16 % longer.
    """

    def __init__(self, normal: nn.Module, down: nn.Module | None) -> None:
        super().__init__()
        self.normal = normal
        self.down = down
        self.contiguous_gradients = False

    def forward(self, features: Tensor, finer: Tensor | None) -> Tensor:
        """This scale (B, width, H, W) and the finer one (B, width', 2H, 2W) to (B, wider, H, W)."""
        down = () if self.down is None else (self.down(finer),)
        parts = (features, *down, self.normal(features))
        if not self.contiguous_gradients:
            return torch.cat(parts, dim=1)
        joined: Tensor = _ContiguousConcat.apply(*parts)  # type: ignore[no-untyped-call]
        return joined


class _ConcatContext(FunctionCtx):
    widths: list[int]


class _ContiguousConcat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ConcatContext, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: _ConcatContext, gradient: Tensor) -> tuple[Tensor, ...]:
        channels_last = gradient.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        parts = torch.split(gradient, ctx.widths, dim=1)
        return tuple(part.contiguous(memory_format=memory_format) for part in parts)


def make_gradients_contiguous(network: nn.Module) -> None:
    """Set `Growth.contiguous_gradients` in every layer of a network."""
    for module in network.modules():
        if isinstance(module, Growth):
            module.contiguous_gradients = True


class Layer(nn.Module):
    """One layer at all scales.

    Args:
        growths: one per output scale, finest first. If the first has a path from a finer scale, this scale ends here.
    """

    def __init__(self, growths: Sequence[Growth]) -> None:
        super().__init__()
        self.growths = nn.ModuleList(growths)

    def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """One tensor per input scale to one per output scale."""
        dropped = len(scales) - len(self.growths)
        return tuple(
            growth(scales[scale], scales[scale - 1] if scale else None)
            for scale, growth in enumerate(self.growths, start=dropped)
        )


class Transition(nn.Module):
    """1x1 units that reduce the channels of every scale.

    Args:
        widths: input and output channels of each scale, finest first.
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(unit(before, after, kernel=1) for before, after in widths)

    def forward(self, *scales: Tensor) -> tuple[Tensor, ...]:
        """One tensor per input scale to one per output scale."""
        return tuple(narrow(features) for narrow, features in zip(self.scales, scales, strict=True))


class Head(nn.Module):
    """The classifier of an exit, on the coarsest scale.

    Args:
        width_in: channels of the coarsest scale.
        width: channels inside the classifier.
        classes: C.
    """

    def __init__(self, width_in: int, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            unit(width_in, width, stride=2),
            unit(width, width, stride=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(width, classes),
        )

    def forward(self, *scales: Tensor) -> Tensor:
        """One tensor per scale to logits (B, C)."""
        logits: Tensor = self.layers(scales[-1])
        return logits


def unit(width_in: int, width_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(inplace=True),
    )


def bottleneck_unit(width_in: int, width_out: int, factor: int | None, stride: int = 1) -> nn.Sequential:
    """A 3x3 unit after a 1x1 unit with at most `factor` times the output channels; None = the 3x3 unit alone."""
    if factor is None:
        return unit(width_in, width_out, stride=stride)
    inner = min(width_in, factor * width_out)
    return nn.Sequential(unit(width_in, inner, kernel=1), unit(inner, width_out, stride=stride))


def _finest_scale(channels: int, width: int, stride: int) -> nn.Sequential:
    if stride != 4:
        return unit(channels, width, stride=stride)
    return nn.Sequential(
        nn.Conv2d(channels, width, 7, stride=2, padding=3),  # with a bias, as in the port
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )

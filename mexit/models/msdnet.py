"""MSDNet: several scales side by side, densely connected, with a classifier after every block.

G. Huang et al.: Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR 2018; the network of
NEO-KD (NeurIPS 2023) and HDKD (AAAI 2021). Names and rounding follow the public PyTorch port (kalviny/MSDNet-PyTorch).
The carried features are the remaining scales, finest first; every block is one stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from math import ceil

from torch import nn

from mexit.errors import UsageError
from mexit.models.msdnet_layers import Growth, Head, Layer, Stem, Transition, bottleneck_unit
from mexit.models.multi_exit import Chain, MultiExit, Normalise, Stage

STEP_MODES = ("even", "lin_grow")
PRUNES = ("max", "min")
STEM_STRIDES = (1, 2, 4)


@dataclass(frozen=True)
class MSDNetConfig:
    """Architecture of an MSDNet. Names in brackets are the options of the PyTorch port.

    Attributes:
        blocks: number of blocks and exits, E (`nBlocks`).
        base: layers of the first block (`base`).
        step: layers of a later block (`step`): `step` each ("even"), or step * (k - 1) + 1 in block k ("lin_grow").
        step_mode: "even" or "lin_grow" (`stepmode`).
        channels: channels of the finest scale after the stem, divided by its growth factor (`nChannels`).
        growth: channels that a layer adds, divided likewise (`growthRate`).
        growth_factors: multiple of `channels` and `growth` in each scale, finest first (`grFactor`). Their number is
            the number of scales.
        bottleneck_factors: inner width of a 3x3 convolution in each scale, as a multiple of its outputs (`bnFactor`);
            None = no bottlenecks.
        prune: where fine scales end (`prune`): evenly over the depth ("max"), or where no later layer reads them
            ("min").
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
    step_mode: str = "even"
    channels: int = 16
    growth: int = 6
    growth_factors: tuple[int, ...] = (1, 2, 4)
    bottleneck_factors: tuple[int, ...] | None = (1, 2, 4)
    prune: str = "max"
    reduction: float = 0.5
    stem: int = 1
    head_width: int | None = 128
    input_shape: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("step_mode", self.step_mode, STEP_MODES),
            ("prune", self.prune, PRUNES),
            ("stem", self.stem, STEM_STRIDES),
        ):
            if value not in choices:
                raise UsageError(f"MSDNet: {name} must be one of {', '.join(map(str, choices))}, found {value!r}")
        if min(self.blocks, self.base, self.step, self.channels, self.growth) < 1 or not 0 <= self.reduction <= 1:
            raise UsageError(f"MSDNet: counts must be at least 1 and reduction in [0, 1], found {self}")
        if self.bottleneck_factors and len(self.bottleneck_factors) != self.scales:
            raise UsageError(f"MSDNet: {self.scales} scales, bottleneck factors {self.bottleneck_factors}")
        if any(self.growth * factor % 2 for factor in self.growth_factors[1:]):
            raise UsageError(
                f"MSDNet: two paths share the growth {self.growth} times {self.growth_factors}: make it even"
            )
        if self.prune == "min" and sum(self.block_layers) < self.scales:
            raise UsageError(f"MSDNet: {sum(self.block_layers)} layers cannot end {self.scales} scales one by one")
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
        later = (self.step if self.step_mode == "even" else self.step * k + 1 for k in range(1, self.blocks))
        return (self.base, *later)


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
    third = layer in (total // 3, 2 * total // 3)
    narrow = config.reduction > 0 and (third if config.prune == "min" else scales_in > scales_out)
    return LayerShape(width, scales_in, scales_out, int(config.reduction * wider) if narrow else wider, narrow)


def _scales_after(config: MSDNetConfig, total: int, layer: int) -> int:
    """Number of scales that leave layer `layer`."""
    if config.prune == "min":
        return min(config.scales, total - layer + 1)
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

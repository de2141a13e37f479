"""A module with exits computes what the module computes, for one or more tensors at a cut, and refuses other cuts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mexit import UsageError, attach_exits
from mexit.models.exit_costs import exit_costs

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPE = (3, 16, 16)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.norm(self.conv(features)).relu()


class Network(nn.Module):
    """Blocks in order; `skip` carries the stem's output past them, and the batch size is read at the start."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor, scale: float | None = None) -> Tensor:
        batch = images.shape[0]
        stem = self.stem(images)
        features = self.blocks(stem) if scale is None else stem
        if self.skip:
            features = features + stem
        result: Tensor = self.fc(self.norm(features).mean((2, 3)).view(batch, -1))
        return result


class Tokens(nn.Module):
    """Attention over patches with a class token."""

    def __init__(self, global_pool: str) -> None:
        super().__init__()
        self.global_pool = global_pool
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(*(Attention() for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), tokens], dim=1)
        tokens = self.blocks(tokens)
        result: Tensor = self.head(tokens[:, 0] if self.global_pool == "token" else tokens[:, 1:].mean(1))
        return result


class Attention(nn.Module):
    """A residual block of attention with one head, with a scale as a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.gamma = nn.LayerNorm(8), nn.Linear(8, 24), nn.Parameter(torch.rand(8))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(tokens)).chunk(3, dim=-1)
        return tokens + self.gamma * F.scaled_dot_product_attention(query, key, value)


def attach(module: nn.Module, after: list[str] | None = None, classes: int = 5):
    return attach_exits(module, after, classes=classes, input_shape=SHAPE, mean=MEAN, std=STD)


def random(module: nn.Module) -> nn.Module:
    """The module with random BatchNorm statistics: fresh ones are identities, and a missing layer would not show."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return module


@pytest.mark.parametrize(
    "module", [Network(), Network(skip=True), Tokens("token"), Tokens("avg")], ids=["maps", "skip", "token", "mean"]
)
def test_the_last_exit_equals_the_module_for_every_batch_size(module: nn.Module) -> None:
    network = attach(random(module), ["blocks.0", "blocks.2"]).eval()
    for batch in (1, 4):
        images = torch.rand(batch, *SHAPE)
        expected = module((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
        assert network.exits == 3
        assert torch.allclose(network(images)[-1], expected, atol=1e-5)


def test_two_tensors_cross_a_cut_inside_a_skip_connection() -> None:
    network = attach(Network(skip=True), ["blocks.1"])
    assert len(network.stages[0].forward_trunk((torch.rand(2, *SHAPE),))) == 2


def test_by_default_exits_follow_all_blocks_but_the_last_and_a_new_classifier_has_the_classes() -> None:
    module = Network()
    network = attach(module, classes=7)
    assert network.exits == 4
    assert network(torch.rand(2, *SHAPE)).shape == (4, 2, 7)
    assert not any(parameter is module.fc.weight for parameter in network.parameters())
    assert any(parameter is module.stem.weight for parameter in network.parameters())


def test_tokens_are_pooled_as_the_module_pools_them() -> None:
    pools = [attach(Tokens(pool), ["blocks.0"]).stages[0].head.pool for pool in ("token", "avg")]
    tokens = torch.rand(2, 17, 8)
    assert torch.equal(pools[0](tokens), tokens[:, 0])
    assert torch.equal(pools[1](tokens), tokens[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            ["blocks.9"],
            "no submodule 'blocks.9': places that can be used as `after`: blocks.0, blocks.1, blocks.2, blocks",
        ),
        (["fc"], "after 'fc': it gives no feature maps and no tokens; places that can be used as `after`: blocks.0, "),
        (["blocks.2", "blocks.0"], "in the order in which they run, found .*, expected blocks.0, blocks.2"),
        (["stem", "stem"], "once each .* found stem, stem, expected stem"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_with_those_that_can(after: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attach(Network(), after)


class Branching(nn.Module):
    """Blocks that run until the features are large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(3) for _ in range(3))

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            if features.sum() < 1e6:
                features = block(features)
        return features


class Dense(nn.Module):
    """Every block reads the features of all blocks before it; a last linear layer reads those of all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Tail(3 + 4 * k, 4) for k in range(3))
        self.fc = nn.Linear(15, 5)

    def forward(self, images: Tensor) -> Tensor:
        found = [images]
        for block in self.blocks:
            found.append(block(torch.cat(found, 1)))
        result: Tensor = self.fc(torch.cat(found, 1).mean((2, 3)))
        return result


class Tail(nn.Module):
    """A convolution as a block."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.conv(features).relu()
        return result


class UShape(nn.Module):
    """Features of the first block are read by the last one too."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up, self.fc = Tail(3, 4), Tail(4, 4), Tail(8, 4), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        down = self.down(images)
        result: Tensor = self.fc(self.up(torch.cat([down, self.middle(down)], 1)).mean((2, 3)))
        return result


class Repeated(nn.Module):
    """Blocks run in the order b, a, c, a: the weights of a are needed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = Block(3), Block(3), Block(3), nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.fc(self.a(self.c(self.a(self.b(images)))).mean((2, 3)))
        return result


class Lists(nn.Module):
    """A block that takes and returns a list of tensors."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(TwoScales() for _ in range(blocks))
        self.fc = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = [images, images]
        for scale in self.scales:
            features = scale(features)
        result: Tensor = self.fc((features[0] + features[1]).mean((2, 3)))
        return result


class TwoScales(nn.Module):
    """One step of `Lists`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        features[0] = self.block(features[0])
        return features


@pytest.mark.parametrize(
    ("module", "after", "message"),
    [
        (Branching(), None, r"torch\.fx cannot trace this Branching, so it cannot be cut: .*control flow"),
        (
            nn.Sequential(Block(3), Branching(), nn.Flatten(), nn.Linear(768, 5)), ["1.blocks.0"],
            r"cannot trace the code that runs 1\.blocks\.0, .*control flow.*can be used as `after`: 0, 1$",
        ),
        (Dense(), None, r"later layers need 2 tensors behind 'blocks\.0'; places .*: blocks\.0, blocks\.1, blocks\.2$"),
        (Repeated(), ["c"], r"after 'c': it lies between two runs of 'a'.*can be used as `after`: b, a$"),
        (Lists(2), None, "'scales.0' gives no feature maps and no tokens; no place can be used"),
        (UShape(), ["fc"], "'fc': it gives no feature maps.*can be used as `after`: down, up$"),
        (nn.Sequential(Block(3), nn.Flatten(), nn.Linear(768, 5)), None, "no other block runs behind '0'; .*: 0$"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), None, "no blocks; places .*: 0, 1$"),
    ],
    ids=["branching", "branching-part", "dense", "repeated", "lists", "u-shape", "one-block", "layers"],
)  # fmt: skip
def test_a_network_that_cannot_be_cut_gives_the_reason_and_the_places(
    module: nn.Module, after: list[str] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        attach(module, after)


@pytest.mark.parametrize(("module", "after", "carried"), [(UShape(), "middle", 2), (Dense(), "blocks.1", 3)])
def test_a_named_place_may_carry_several_tensors(module: nn.Module, after: str, carried: int) -> None:
    network = attach(module, [after]).eval()
    images = torch.rand(2, *SHAPE)
    assert len(network.stages[0].forward_trunk((images,))) == carried
    expected = module((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert torch.allclose(network(images)[-1], expected, atol=1e-5)


def test_a_block_that_runs_twice_is_one_place_behind_its_last_run() -> None:
    network = attach(Repeated())
    assert network.exits == 2
    assert len(network.state_dict()) == len({values.data_ptr() for values in network.state_dict().values()})


@pytest.mark.slow
def test_macs_count_convolutions_and_attention() -> None:
    network = attach(Network(), ["blocks.0", "blocks.2"])
    conv, stem = 8 * 8 * 8 * 8 * 9, 8 * 8 * 8 * 27
    heads = 8 * 5
    expected = [stem + conv + heads, stem + 3 * conv + 2 * heads, stem + 4 * conv + 3 * heads]
    assert [cost.macs for cost in exit_costs(network)] == expected
    attention = 17 * 8 * 24 + 2 * 17 * 17 * 8
    costs = exit_costs(attach(Tokens("token"), ["blocks.0", "blocks.1"]))
    assert costs[1].macs - costs[0].macs == attention + heads


def test_one_name_instead_of_a_list_says_how_to_write_it() -> None:
    with pytest.raises(UsageError, match=r"found 'blocks.0': write \['blocks.0'\]"):
        attach_exits(Network(), after="blocks.0", classes=5, input_shape=SHAPE, mean=MEAN, std=STD)


def test_weights_that_are_not_finite_are_named_as_the_reason() -> None:
    network = Network()
    torch.nn.init.constant_(network.fc.bias, torch.nan)
    with pytest.raises(UsageError, match="returns values that are not finite for random images: check its weights"):
        attach_exits(network, classes=5, input_shape=SHAPE, mean=MEAN, std=STD)

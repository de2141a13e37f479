"""`attach_exits`: a module whose blocks run in order as a multi-exit network.

The trunk of each stage is the part of the module between two places. The head of an exit pools the features, applies
BatchNorm and a linear layer, as linear probing does (K. He et al.: Masked Autoencoders, CVPR 2022, appendix A.1). The
last exit keeps the module's own final layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from mexit.errors import UsageError
from mexit.models.graph_cuts import TracedModule, split, trace
from mexit.models.multi_exit import MultiExit, Normalise, Stage

MOST_EXITS = 16
_TOLERANCE = 1e-4
_LISTED = 30

HeadBuilder = Callable[[int, int], nn.Module]


class GlobalPool(nn.Module):
    """Features of one exit to one vector per image.

    Args:
        position: position of the features among the carried tensors.
        kind: "maps" (B, D, H, W), "maps-last" (B, H, W, D), "tokens" (B, N, D) or "vector" (B, D).
        token: whether "tokens" are represented by the first one, the class token, instead of their mean.
        prefix: tokens at the start that do not belong to the picture; the mean leaves them out.
    """

    def __init__(self, position: int, kind: str, token: bool = False, prefix: int = 0) -> None:
        super().__init__()
        self.position, self.kind, self.token, self.prefix = position, kind, token, prefix

    def forward(self, *features: Tensor) -> Tensor:
        """Carried tensors to (B, D)."""
        values = features[self.position]
        if self.kind == "maps":
            return values.mean(dim=(2, 3))
        if self.kind == "maps-last":
            return values.mean(dim=(1, 2))
        if self.kind == "tokens":
            return values[:, 0] if self.token else values[:, self.prefix :].mean(dim=1)
        return values


class ExitHead(nn.Module):
    """Pooled features to logits."""

    def __init__(self, pool: GlobalPool, layers: nn.Module) -> None:
        super().__init__()
        self.pool, self.layers = pool, layers

    def forward(self, *features: Tensor) -> Tensor:
        """Carried tensors to logits (B, C)."""
        logits: Tensor = self.layers(self.pool(*features))
        return logits


def attach_exits(
    module: nn.Module,
    after: Sequence[str] | None = None,
    *,
    classes: int,
    input_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    head: HeadBuilder | None = None,
) -> MultiExit:
    """Attach an exit after each of the named submodules, and one at the end.

    Args:
        module: network for normalised images (B, channels, H, W) that returns logits or features; its layers become
            part of the result and are not copied. It is traced in eval mode.
        after: names of submodules in the order in which they run, such as ["layer1", "layer2"]; None = evenly spaced
            blocks, at most 16 exits.
        classes: C.
        input_shape: (channels, H, W) of the images.
        mean, std: normalisation, one number per channel of the module, for pixels in [0, 1].
        head: builds the layers from features (B, D) to logits (B, C), given D and C; None = BatchNorm and a linear
            layer.

    Returns:
        A network with len(after) + 1 exits. The logits of the last exit equal those of the module in eval mode if its
        classifier has C outputs; else the classifier is a new one.

    Raises:
        UsageError: the module cannot be cut there; the message names the reason and places that can be used. Or it
            does not run on such images, or returns values that are not finite.
    """
    if isinstance(after, str):
        raise UsageError(f"`after` must be a list of names of submodules, found '{after}': write [{after!r}]")
    module.eval()
    shape = (max(input_shape[0], len(mean)), *input_shape[1:])
    named = [name for name, _ in module.named_modules()]
    unknown = [name for name in after or () if name not in named]
    traced = _trace(module, shape, () if unknown or after is None else after)
    if unknown:
        raise UsageError(f"the module has no submodule '{unknown[0]}': {_usable(traced)}")
    places = default_places(traced) if after is None else list(after)
    cuts = [_cut(traced, place) for place in places]
    in_order = {index: place for (index, _), place in sorted(zip(cuts, places, strict=True), key=lambda one: one[0][0])}
    if list(in_order.values()) != places:
        raise UsageError(
            f"the places must be given once each and in the order in which they run, found {', '.join(places)}, "
            f"expected {', '.join(in_order.values())}"
        )
    new_head = head or _linear_head
    end, own = _end(traced)
    stages = []
    parts = split(traced, [*cuts, end])
    for (part, position), (_, node) in zip(parts[:-1], cuts, strict=True):
        pool = _pool(module, traced.shapes[node.name], position)
        stages.append(Stage(part, ExitHead(pool, new_head(_width(pool, traced.shapes[node.name]), classes))))
    part, position = parts[-1]
    pool = _pool(module, traced.shapes[end[1].name], position)
    width = _width(pool, traced.shapes[end[1].name])
    stages.append(Stage(part, ExitHead(pool, _last_layers(own, pool, width, classes))))
    network = MultiExit(stages, input_shape, classes, Normalise(mean, std)).eval()
    _check_equal(module, network, own, shape)
    return network.train()


def default_places(traced: TracedModule) -> list[str]:
    """Names of evenly spaced blocks, at most `MOST_EXITS` - 1; the last block is left out.

    Raises:
        UsageError: one tensor alone crosses no cut between blocks.
    """
    blocks = usable_places(traced)[:-1]
    if not blocks:
        raise UsageError(f"found no places for exits: {_why_no_default(traced)}; {_usable(traced)}")
    exits = min(MOST_EXITS, len(blocks) + 1)
    return [blocks[(len(blocks) + 1) * k // exits - 1] for k in range(1, exits)]


def usable_places(traced: TracedModule) -> list[str]:
    """Names of the blocks behind which one tensor alone crosses the cut: those in lists, or all if there are none."""
    found = [name for name, index in _blocks(traced).items() if traced.is_place(index)]
    listed = [name for name in found if name.rpartition(".")[2].isdigit() and "." in name]
    return listed if len(listed) > 1 else found


def _blocks(traced: TracedModule, layers: bool = False) -> dict[str, int]:
    """Blocks, or with `layers` single layers too, and the index of the last operation of each, as they run."""
    found: dict[str, int] = {}
    for index, node in enumerate(traced.nodes):
        name = str(node.target)
        if node.op == "call_module" and (layers or any(True for _ in traced.graph.get_submodule(name).children())):
            found.pop(name, None)
            found[name] = index  # a block that runs several times ends with its last run
    return found


def _trace(module: nn.Module, shape: tuple[int, int, int], after: Sequence[str]) -> TracedModule:
    """Trace a module; an error names the places in the code that can be traced."""
    try:
        return trace(module, shape, after)
    except UsageError as error:
        if not after:
            raise
        raise UsageError(f"{error}; {_usable(trace(module, shape))}") from None


def _usable(traced: TracedModule) -> str:
    places = usable_places(traced)
    for layers in (False, True):  # with several tensors at a cut; then single layers
        places = places or [name for name, i in _blocks(traced, layers).items() if not _obstacle(traced, i)]
    if not places:
        return "no place can be used"
    more = ", ..." if len(places) > _LISTED else ""
    return f"places that can be used as `after`: {', '.join(places[:_LISTED])}{more}"


def _why_no_default(traced: TracedModule) -> str:
    blocks = _blocks(traced)
    if not blocks:
        return "its forward runs single layers and no blocks"
    obstacles = {name: _obstacle(traced, index) for name, index in blocks.items()}
    crossed = {name: len(traced.crossing(blocks[name])) for name, obstacle in obstacles.items() if not obstacle}
    several = next(((name, count) for name, count in crossed.items() if count > 1), None)
    if several:
        return (
            f"its blocks do not run one after the other: later layers need {several[1]} tensors behind '{several[0]}'"
        )
    if crossed:
        return f"no other block runs behind '{next(iter(crossed))}'"
    return "'{}' {}".format(*next(iter(obstacles.items())))


def _obstacle(traced: TracedModule, index: int) -> str:
    """Why the module cannot be cut behind the operation `index`; empty if it can."""
    if len(traced.shapes.get(traced.nodes[index].name, ())) not in (3, 4):
        return "gives no feature maps and no tokens"
    crossing = traced.crossing(index)
    if not crossing:
        return "is not followed by another layer"
    if wrong := [value.name for value in crossing if value.name not in traced.shapes]:
        return f"is followed by layers that need {wrong[0]}, which is no tensor"
    if shared := traced.shared(index):
        return f"lies between two runs of '{shared[0]}', whose weights can belong to one part only"
    return ""


def _cut(traced: TracedModule, place: str) -> tuple[int, fx.Node]:
    """The operation behind which the cut of a place lies, and the features of its exit."""
    index = traced.last_node(place)
    if index is None:
        raise UsageError(f"cannot cut after '{place}': it does not run as a part of its own; {_usable(traced)}")
    if obstacle := _obstacle(traced, index):
        raise UsageError(f"cannot cut after '{place}': it {obstacle}; {_usable(traced)}")
    return index, traced.nodes[index]


def _end(traced: TracedModule) -> tuple[tuple[int, fx.Node], nn.Linear | None]:
    """The last cut, before the classifier, with the features that it reads; and the classifier."""
    nodes = traced.nodes
    if traced.classifier is not None:
        index = traced.last_node(traced.classifier)
        assert index is not None
        read = nodes[index].args[0]
        if isinstance(read, fx.Node) and len(traced.shapes[read.name]) == 2:
            return (index - 1, read), cast("nn.Linear", traced.graph.get_submodule(traced.classifier))
    read = nodes[-1].args[0]
    assert isinstance(read, fx.Node)
    if len(traced.shapes[read.name]) not in (2, 3, 4):
        raise UsageError(
            f"the module returns a tensor of shape {traced.shapes[read.name]}, expected logits or features"
        )
    return (len(nodes) - 2, read), None


def _last_layers(own: nn.Linear | None, pool: GlobalPool, width: int, classes: int) -> nn.Module:
    if own is None:
        is_logits = pool.kind == "vector" and width == classes
        return nn.Identity() if is_logits else _linear_head(width, classes)
    return own if own.out_features == classes else nn.Linear(width, classes, device=own.weight.device)


def _linear_head(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes))


def _pool(module: nn.Module, shape: tuple[int, ...], position: int) -> GlobalPool:
    """The pooling of features of this shape; for tokens that of the module itself."""
    if len(shape) == 4:
        return GlobalPool(position, "maps-last" if shape[1] == shape[2] != shape[3] else "maps")
    if len(shape) == 2:
        return GlobalPool(position, "vector")
    prefix = getattr(module, "num_prefix_tokens", None)
    if prefix is None:
        prefix = int(any(isinstance(getattr(module, name, None), Tensor) for name in ("cls_token", "class_token")))
    return GlobalPool(
        position, "tokens", bool(prefix) and getattr(module, "global_pool", "token") == "token", int(prefix)
    )


def _width(pool: GlobalPool, shape: tuple[int, ...]) -> int:
    return shape[1] if pool.kind == "maps" else shape[-1]


@torch.no_grad()
def _check_equal(module: nn.Module, network: MultiExit, own: nn.Linear | None, shape: tuple[int, ...]) -> None:
    """Compare the parts in order with the module on two random images. Raises `UsageError` if they differ."""
    parameter = next(module.parameters(), torch.zeros(()))
    if parameter.is_meta:
        return
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    features: tuple[Tensor, ...] = (images,)
    for stage in network.stages:
        features = cast("Stage", stage).forward_trunk(features)
    result = cast("ExitHead", cast("Stage", network.stages[-1]).head).pool(*features)
    reference = module(images)
    if own is not None:
        result = own(result)
    elif reference.ndim != 2:
        reference = cast("ExitHead", cast("Stage", network.stages[-1]).head).pool(reference)
    if not (reference.isfinite().all() and result.isfinite().all()):
        raise UsageError("the module returns values that are not finite for random images: check its weights")
    if not torch.allclose(result, reference, rtol=_TOLERANCE, atol=_TOLERANCE * float(reference.abs().max())):
        raise UsageError(
            "the parts of the module in order do not compute what the module computes: its forward depends on more "
            "than its input"
        )

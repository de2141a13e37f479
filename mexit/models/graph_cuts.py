"""Cuts a module into parts that run in order, by tracing it with `torch.fx`.

A place is the name of a submodule; the cut lies behind its last operation. A part receives the tensors that cross the
cut before it and returns those that cross the next cut. Blocks are traced as one operation each.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mexit.errors import UsageError

_HOLDERS = ("call_module", "get_attr")  # operations that hold weights
_BATCHES = (2, 3)  # two batch sizes show which numbers in the graph are constants


class _BlockTracer(fx.Tracer):
    """Traces the code of the modules named `opened`, and keeps all others as one operation."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one operation."""
        del m
        return module_qualified_name not in self.opened


@dataclass(frozen=True)
class TracedModule:
    """A module as a sequence of operations.

    Attributes:
        graph: the operations.
        shapes: shape of each tensor by the name of its operation, for a batch of 2 images.
        constants: numbers that depend neither on the images nor on the batch size, by the name of their operation.
        batch_sizes: operations whose result is the batch size.
        classifier: name of the linear layer whose output is the module's output; None without one.
    """

    graph: fx.GraphModule
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, int | float | bool]
    batch_sizes: frozenset[str]
    classifier: str | None

    @property
    def nodes(self) -> list[fx.Node]:
        """The operations in order."""
        return list(self.graph.graph.nodes)

    def last_node(self, place: str) -> int | None:
        """Index of the last operation of a submodule; None if it has none of its own."""
        found = [
            i
            for i, node in enumerate(self.nodes)
            if node.op == "call_module" and f"{node.target}.".startswith(f"{place}.")
        ]
        return found[-1] if found else None

    def crossing(self, index: int) -> list[fx.Node]:
        """Values that later operations need from those up to `index`; parameters are no such values."""
        nodes = self.nodes
        position = {node: i for i, node in enumerate(nodes)}
        return [
            node
            for node in nodes[: index + 1]
            if node.op != "get_attr"
            and node.name not in self.constants
            and node.name not in self.batch_sizes
            and any(position[user] > index for user in node.users)
        ]

    def is_place(self, index: int) -> bool:
        """Whether one tensor alone crosses the cut behind operation `index`, and that is its output."""
        node = self.nodes[index]
        is_alone = self.crossing(index) == [node] and len(self.shapes.get(node.name, ())) in (3, 4)
        return is_alone and not self.shared(index)

    def shared(self, index: int) -> list[str]:
        """Names of the modules with weights and of the parameters that both sides of the cut behind `index` use."""
        before = {node.target for node in self.nodes[: index + 1] if node.op in _HOLDERS}
        again = (node for node in self.nodes[index + 1 :] if node.op in _HOLDERS and node.target in before)
        return [str(node.target) for node in again if node.op == "get_attr" or self._has_weights(str(node.target))]

    def _has_weights(self, name: str) -> bool:
        return bool(self.graph.get_submodule(name).state_dict())


def trace(module: nn.Module, input_shape: tuple[int, int, int], after: Sequence[str] = ()) -> TracedModule:
    """Trace a module in eval mode.

    Args:
        module: network for images (B, channels, H, W).
        input_shape: (channels, H, W).
        after: names of submodules behind which it will be cut; () = as many as can be traced.

    Raises:
        UsageError: the module cannot be traced; the message says why.
    """
    classifier = _find_classifier(module, input_shape)
    wanted = [*after, *([classifier] if classifier else [])]
    needed = {parent for name in wanted for parent in _parents(name)}
    levels = [*(needed | _containers(module, deep) for deep in (True, False)), *([needed] if after else [])]
    for opened in levels:
        try:
            graph = _graph(module, opened)
            runs = [_run(graph, input_shape, batch) for batch in _BATCHES]
        except Exception as error:  # the code of any module runs here, and may fail in any way
            reason = " ".join(str(error).split())[:200]
        else:
            return _traced(graph, runs, classifier)
    code = f"the code that runs {' and '.join(after)}" if after else f"this {type(module).__name__}"
    raise UsageError(
        f"torch.fx cannot trace {code}, so it cannot be cut: {reason}. A forward must not branch on the values of "
        "tensors"
    )


def _graph(module: nn.Module, opened: set[str]) -> fx.GraphModule:
    """The operations of a module, with its arguments besides the images at their defaults."""
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {one.name: one.default for one in arguments if one.default is not one.empty}
    graph = _BlockTracer(opened).trace(module, defaults)
    for node in reversed(list(graph.nodes)):
        # fx stores a check for each default
        is_check = node.op == "call_function" and "_assert" in getattr(node.target, "__name__", "")
        if not node.users and (is_check or node.name in defaults or node.target in (operator.eq, operator.getitem)):
            graph.erase_node(node)
    return fx.GraphModule(module, graph)


def split(traced: TracedModule, cuts: Sequence[tuple[int, fx.Node]]) -> list[tuple[fx.GraphModule, int]]:
    """Split the operations at `cuts`.

    Args:
        traced: the module.
        cuts: index of the last operation of each part but the rest, rising, and the operation whose output the exit
            reads.

    Returns:
        For each cut the part before it and the position of that output among the tensors it returns. The operations
        behind the last cut are left out.
    """
    parts, inputs, start = [], [node for node in traced.nodes if node.op == "placeholder"][:1], 0
    for index, read in cuts:
        carried = traced.crossing(index)
        outputs = carried if read in carried else [*carried, read]
        parts.append((_part(traced, traced.nodes[start : index + 1], inputs, outputs), outputs.index(read)))
        inputs, start = outputs, index + 1
    return parts


def _part(
    traced: TracedModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """A module that computes `outputs` from `inputs` by the operations `nodes`."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    first = values[inputs[0]]

    def value(node: fx.Node) -> fx.Node | int | float | bool:
        if node in values:
            return values[node]
        if node.name in traced.constants:
            return traced.constants[node.name]
        if node.name in traced.batch_sizes:
            values[node] = graph.call_method("size", (first, 0))
        else:  # a parameter
            values[node] = graph.node_copy(node, value)
        return values[node]

    for node in nodes:
        if node.op not in ("placeholder", "output") and node not in values and node.name not in traced.constants:
            values[node] = graph.node_copy(node, value)
    graph.output(tuple(values[node] for node in outputs))
    part = fx.GraphModule(traced.graph, graph)
    part.graph.eliminate_dead_code()
    part.delete_all_unused_submodules()
    part.recompile()
    return part


def _containers(module: nn.Module, deep: bool) -> set[str]:
    """Names of the modules to open: every `Sequential` of blocks and, with `deep`, the module that it is in."""
    opened = {
        name
        for name, one in module.named_modules()
        if isinstance(one, nn.Sequential)
        and any(isinstance(child, nn.Sequential) or not _is_layer(child) for child in one.children())
    }
    if deep:
        opened |= {name.rpartition(".")[0] for name in opened}
    # What lies inside a block that stays closed stays closed too.
    return {name for name in opened if opened.issuperset(_parents(name))}


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own."""
    return type(module).__module__.startswith("torch.nn")


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _find_classifier(module: nn.Module, input_shape: tuple[int, int, int]) -> str | None:
    """Name of the linear layer whose output is the output of the module."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    names: dict[nn.Module, str] = {one: name for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    handles = [one.register_forward_hook(lambda layer, _, output: outputs.append((layer, output))) for one in names]
    try:
        with torch.no_grad():
            result = module(_example(module, input_shape, _BATCHES[0]))
    except Exception as error:  # the code of any module runs here, and may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        shape = " x ".join(map(str, input_shape))
        raise UsageError(
            f"the module does not run on images of {shape} (channels x height x width): {reason}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(result, Tensor):
        raise UsageError(f"the module must return one tensor, logits or features, found {type(result).__name__}")
    return next((names[layer] for layer, output in reversed(outputs) if output is result), None)


def _example(module: nn.Module, input_shape: tuple[int, int, int], batch: int) -> Tensor:
    parameter = next(module.parameters(), torch.zeros(()))
    return torch.zeros(batch, *input_shape, device=parameter.device, dtype=parameter.dtype)


@dataclass(frozen=True)
class _Shape:
    """The shape of a tensor, as opposed to a tuple that an operation gives."""

    shape: tuple[int, ...]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape or number that each operation gives."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, object] = {}

    def call_module(self, target: fx.node.Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        # fx passes immutable lists, and a block may replace items of its list of tensors, as HRNet's do
        result: object = super().call_module(target, tuple(list(a) if isinstance(a, list) else a for a in args), kwargs)
        return result

    def run_node(self, n: fx.Node) -> object:
        result: object = super().run_node(n)
        self.found[n.name] = _Shape(tuple(result.shape)) if isinstance(result, Tensor) else result
        return result


@torch.no_grad()
def _run(graph: fx.GraphModule, input_shape: tuple[int, int, int], batch: int) -> dict[str, object]:
    recorder = _Recorder(graph)
    recorder.run(_example(graph, input_shape, batch))
    return recorder.found


def _traced(graph: fx.GraphModule, runs: Sequence[dict[str, object]], classifier: str | None) -> TracedModule:
    first, second = runs
    numbers = {name: one for name, one in first.items() if isinstance(one, int | float | bool)}
    constants = {name: one for name, one in numbers.items() if one == second[name]}
    batch_sizes = frozenset(name for name in numbers if (first[name], second[name]) == _BATCHES)
    shapes = {name: one.shape for name, one in first.items() if isinstance(one, _Shape)}
    return TracedModule(graph, shapes, constants, batch_sizes, classifier)

"""CUDA graphs of the parts of a training step that run the network: attacks, forward and backward passes.

A small network runs kernels of a few microseconds, so that starting them one by one takes longer than their work. A
CUDA graph starts all kernels of a function at once. It holds the addresses of its inputs and outputs; inputs are
copied in, and shapes are fixed. Random numbers, losses and the optimiser stay outside, so every training method runs
unchanged. `tests/gpu` holds a step with graphs equal to one without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from mexit.attacks.pgd import Attack, Autocast, run_attack
from mexit.models.multi_exit import MultiExit
from mexit.train.fused_eval_copy import FusedEvalCopy

_WARM_UP_CALLS = 3  # libraries choose kernels and allocate workspaces in the first calls


class CapturedFunction:
    """A function of tensors as a CUDA graph.

    Args:
        function: reads its arguments and tensors that stay at their address, and never waits for the device.
        inputs: example arguments; their shapes, dtypes and memory formats are fixed.
    """

    def __init__(self, function: Callable[..., Tensor | None], inputs: Sequence[Tensor] = ()) -> None:
        self._inputs = [value.clone() for value in inputs]
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with _random_state_kept():
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_CALLS):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """Run the graph; returns a copy of its output."""
        for stored, value in zip(self._inputs, inputs, strict=True):
            stored.copy_(value)
        self._graph.replay()
        return None if self._output is None else self._output.clone()


def _random_state_kept() -> AbstractContextManager[None]:
    """A context that restores torch's generators, which dropout advances in warm-up calls."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()])


@contextmanager
def _buffers_kept(model: MultiExit) -> Iterator[None]:
    """A context that restores BatchNorm's running statistics, which warm-up calls in train mode change."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


class TrainForward(nn.Module):
    """The forward pass of training, with float32 logits.

    Args:
        model: the network.
        autocast: context of the pass.
    """

    def __init__(self, model: MultiExit, autocast: Autocast) -> None:
        super().__init__()
        self.model, self._autocast = model, autocast

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (E, B, C)."""
        with self._autocast():
            logits: Tensor = self.model(images)
        return logits.float()


class StepGraphs:
    """The graphs of one training run. Each is captured when it is first needed.

    Args:
        model: the trained network; its parameters and buffers stay at their addresses.
        autocast: context of the passes, without a cache of converted weights: a graph would keep those of the first
            step.
        batch: number of images of a full batch; other batches run without graphs.
        attack_copy: copy of the network for attacks, or None.
        forward_graphs: whether the forward passes of training are graphs too. Their gradients cannot be differentiated.
    """

    def __init__(
        self,
        model: MultiExit,
        autocast: Autocast,
        batch: int,
        attack_copy: FusedEvalCopy | None = None,
        forward_graphs: bool = True,
    ) -> None:
        self._model, self._autocast, self._batch = model, autocast, batch
        self._attack_copy, self._forward_graphs = attack_copy, forward_graphs
        # Capturing creates the gradient accumulators on a stream of its own; torch waits for it where it must.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        self._attacks: dict[tuple[object, ...], CapturedFunction] = {}
        self._plain = TrainForward(model, autocast)
        self._forwards: dict[tuple[str, torch.Size], Callable[[Tensor], Tensor]] = {}
        self._refresh: CapturedFunction | None = None

    def refreshed(self) -> MultiExit:
        """`FusedEvalCopy.refreshed` as a graph."""
        assert self._attack_copy is not None
        if self._refresh is None:
            self._refresh = CapturedFunction(self._attack_copy.refresh)
        self._refresh()
        return self._attack_copy.network

    def run_attack(
        self, model: MultiExit, images: Tensor, labels: Tensor, attack: Attack, noise: Tensor | None, autocast: Autocast
    ) -> Tensor:
        """`attacks.pgd.run_attack` as a graph."""
        if len(images) != self._batch:
            return run_attack(model, images, labels, attack, noise, autocast)

        def function(images: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
            return run_attack(model, images, labels, attack, noise, autocast)

        inputs = [images, labels] if noise is None else [images, labels, noise]
        key = (id(model), attack, *(value.shape for value in inputs))
        if key not in self._attacks:
            with _buffers_kept(model):
                self._attacks[key] = CapturedFunction(function, inputs)
        attacked = self._attacks[key](*inputs)
        assert attacked is not None
        return attacked

    def forward(self, purpose: str, images: Tensor) -> Tensor:
        """The forward pass of training as a graph; the gradients of its result run through a second graph.

        Args:
            purpose: name of the call in the step. The activations of a purpose live until its next forward pass.
            images: (N, C, H, W); N is a multiple of the batch, else the pass runs without graphs.

        Returns:
            Logits (E, N, C) float32.
        """
        if len(images) % self._batch or not self._forward_graphs:
            logits: Tensor = self._plain(images)
            return logits
        key = (purpose, images.shape)
        if key not in self._forwards:
            self._forwards[key] = self._captured_forward(images)
        return self._forwards[key](images)

    def _captured_forward(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        with _random_state_kept(), _buffers_kept(self._model):
            forward = torch.cuda.make_graphed_callables(
                TrainForward(self._model, self._autocast), (images.detach().clone(),), allow_unused_input=True
            )
        return cast("Callable[[Tensor], Tensor]", forward)

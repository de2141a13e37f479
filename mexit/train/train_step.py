"""One optimisation step: attack, forward pass, loss, backward pass, update; the same for every training method."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mexit.models.multi_exit import MultiExit
from mexit.train.config import TrainSettings
from mexit.train.cuda_graphs import StepGraphs
from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup
from mexit.train.fused_eval_copy import FusedEvalCopy
from mexit.train.methods.base import Adaptation, Batch, Outputs, StepInfo, TrainingMethod
from mexit.train.regularizers import EMA, perturbed_weights, trades_term


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step, which stay on the device until they are read.

    Attributes:
        names: name of each metric.
        values: (len(names),) float32.
    """

    names: tuple[str, ...]
    values: Tensor

    def read(self) -> dict[str, float]:
        """The metrics by name. Waits until the device has computed them."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def average(self, processes: ProcessGroup, share: float) -> StepMetrics:
        """The metrics of the whole batch, of which this process has the fraction `share`."""
        if processes.size == 1:
            return self
        return replace(self, values=torch.tensor(list(processes.average(self.read(), share).values())))


@dataclass(frozen=True)
class TrainStep:
    """Runs optimisation steps.

    Attributes:
        model: network to train; changed by `run`.
        method: training method; changed by `run`.
        optimiser: optimiser of the network's parameters.
        settings: settings of the run; the regularizers are read from them.
        ema: moving average of the weights, or None.
        attack_copy: copy of the network for attacks in eval mode; None = attack the network itself.
        process_group: processes that share the batch.
        graphs: CUDA graphs of the network's passes, or None.
    """

    model: MultiExit
    method: TrainingMethod
    optimiser: torch.optim.Optimizer
    settings: TrainSettings
    ema: EMA | None = None
    attack_copy: FusedEvalCopy | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    graphs: StepGraphs | None = None

    def craft(self, batch: Batch) -> Tensor | None:
        """The method's attacked images, (V, B, C, H, W), or None without an attack."""
        if self.attack_copy is not None and batch.attack is not None and not batch.attack.train_mode:
            refreshed = self.attack_copy.refreshed if self.graphs is None else self.graphs.refreshed
            batch = replace(batch, model=refreshed(), autocast=nullcontext)
        if self.graphs is not None:
            batch = replace(batch, run_attack=self.graphs.run_attack)
        return self.method.craft(batch)

    def run(self, batch: Batch, adaptation: Adaptation, step: StepInfo) -> StepMetrics:
        """Run one step.

        Args:
            batch: this process's shard of the batch.
            adaptation: input of methods that learn weights of their own terms.
            step: position of the step in the run.

        Returns:
            Means over the whole batch: "loss", each term as "loss NAME", "clean accuracy" and "attacked accuracy". If
            the loss is not finite, the weights are not updated, except with graphs, which do not wait for the loss.
        """
        attacked = self.craft(batch)
        self.model.train()
        with self._perturbed(batch, attacked, step):
            outputs = self._forward(batch, attacked, step)
            self.method.adapt(outputs, adaptation)
            terms = self._terms(outputs)
            loss = torch.stack(list(terms.values())).sum()
            metrics = _metrics(outputs, loss, terms).average(self.process_group, step.share)
            if self.graphs is None and not math.isfinite(metrics.read()["loss"]):
                return metrics
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.process_group.average_gradients(self.model, step.share)
        self.optimiser.step()
        self.method.after_step(outputs)
        if self.ema is not None:
            self.ema.update(self.model.state_dict(), step.number)
        return metrics

    def _forward(self, batch: Batch, attacked: Tensor | None, step: StepInfo) -> Outputs:
        with batch.autocast() if self.graphs is None else nullcontext():
            clean = self._logits("clean", batch.images)
            variants = None if attacked is None else self._logits("attacked", attacked.flatten(0, 1))
        if attacked is not None and variants is not None:
            exits, _, classes = variants.shape
            variants = variants.reshape(exits, len(attacked), -1, classes).transpose(0, 1)
        return Outputs(batch, clean, variants, attacked, step)

    def _logits(self, purpose: str, images: Tensor) -> Tensor:
        if self.graphs is not None:
            return self.graphs.forward(purpose, images)
        logits: Tensor = self.model(images).float()
        return logits

    def _terms(self, outputs: Outputs) -> dict[str, Tensor]:
        terms = self.method.terms(outputs)
        if self.settings.trades:
            terms["trades"] = self.settings.trades * trades_term(outputs)
        return terms

    def _perturbed(self, batch: Batch, attacked: Tensor | None, step: StepInfo) -> AbstractContextManager[None]:
        if not self.settings.awp:
            return nullcontext()

        def loss() -> Tensor:
            return torch.stack(list(self._terms(self._forward(batch, attacked, step)).values())).sum()

        reduce = partial(self.process_group.sum, weight=step.share)
        return perturbed_weights(self.model, self.settings.awp, loss, reduce)


def _metrics(outputs: Outputs, loss: Tensor, terms: dict[str, Tensor]) -> StepMetrics:
    metrics = {"loss": loss, "clean accuracy": _accuracy(outputs.clean, outputs.labels)}
    if outputs.attacked is not None:
        metrics["attacked accuracy"] = _accuracy(outputs.attacked, outputs.labels)
    metrics |= {f"loss {name}": term for name, term in terms.items()}
    return StepMetrics(tuple(metrics), torch.stack([value.detach().float() for value in metrics.values()]))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy in [0, 1], mean over exits and samples."""
    return (logits.detach().argmax(dim=-1) == labels).float().mean()

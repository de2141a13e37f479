"""One optimisation step: craft, run the network, sum the terms, go downhill. The same for every method."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mexit.models.multi_exit import MultiExit
from mexit.train.config import TrainSettings
from mexit.train.distributed import ALONE, ProcessGroup
from mexit.train.fused_eval_copy import FusedEvalCopy
from mexit.train.methods.base import Adaptation, Batch, Outputs, StepInfo, TrainingMethod
from mexit.train.regularizers import Average, perturbed_weights, trades_term


@dataclass(frozen=True)
class Step:
    """What one step does.

    Attributes:
        model, objective, optimiser: changed by `take`.
        settings: the aids among them.
        average: of the weights, or None.
        copy: of the network, to craft with in eval mode; None = the network itself.
        team: the processes among which the batch is shared.
    """

    model: MultiExit
    objective: TrainingMethod
    optimiser: torch.optim.Optimizer
    settings: TrainSettings
    average: Average | None
    copy: FusedEvalCopy | None = None
    team: ProcessGroup = ALONE

    def craft(self, batch: Batch) -> Tensor | None:
        """The objective's attacked images, (V, B, C, H, W), made with the copy where that is right."""
        if self.copy is not None and batch.attack is not None and not batch.attack.train_mode:
            batch = replace(batch, model=self.copy.refreshed(), autocast=nullcontext)
        return self.objective.craft(batch)

    def take(
        self, batch: Batch, adaptation: Adaptation, progress: float, number: int, share: float = 1.0
    ) -> dict[str, float]:
        """Do it.

        Args:
            batch: what to train on.
            adaptation: for objectives that learn their own weights.
            progress: share of the run that is done.
            number: of the step in the run, from 0.
            share: of the whole batch that `batch` is.

        Returns:
            The loss, each term as "loss NAME", and the accuracies, means over the whole batch. A loss that is
            not finite is returned without a step taken.
        """
        attacked = self.craft(batch)
        self.model.train()
        info = StepInfo(number, progress, share, self.settings.label_smoothing)
        with self._perturbed(batch, attacked, info):
            outputs = self._outputs(batch, attacked, info)
            self.objective.adapt(outputs, adaptation)
            terms = self._terms(outputs)
            loss = torch.stack(list(terms.values())).sum()
            found = self.team.average(_found(outputs, loss, terms), share)
            if not math.isfinite(found["loss"]):
                return found
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.team.average_gradients(self.model, share)
        self.optimiser.step()
        self.objective.after_step(outputs)
        if self.average is not None:
            self.average.update(self.model.state_dict(), number)
        return found

    def _outputs(self, batch: Batch, attacked: Tensor | None, info: StepInfo) -> Outputs:
        with batch.autocast():
            clean = self.model(batch.images).float()
            variants = None if attacked is None else self.model(attacked.flatten(0, 1)).float()
        if attacked is not None and variants is not None:
            exits, _, classes = variants.shape
            variants = variants.reshape(exits, len(attacked), -1, classes).transpose(0, 1)
        return Outputs(batch, clean, variants, attacked, info)

    def _terms(self, outputs: Outputs) -> dict[str, Tensor]:
        terms = self.objective.terms(outputs)
        if self.settings.trades:
            terms["trades"] = self.settings.trades * trades_term(outputs)
        return terms

    def _perturbed(self, batch: Batch, attacked: Tensor | None, info: StepInfo) -> AbstractContextManager[None]:
        if not self.settings.awp:
            return nullcontext()

        def loss() -> Tensor:
            return torch.stack(list(self._terms(self._outputs(batch, attacked, info)).values())).sum()

        return perturbed_weights(self.model, self.settings.awp, loss, partial(self.team.sum, weight=info.share))


def _found(outputs: Outputs, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
    found = {"loss": float(loss.detach()), "clean accuracy": _accuracy(outputs.clean, outputs.labels)}
    if outputs.attacked is not None:
        found["attacked accuracy"] = _accuracy(outputs.attacked, outputs.labels)
    return found | {f"loss {name}": float(term.detach()) for name, term in terms.items()}


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.detach().argmax(dim=-1) == labels).float().mean())

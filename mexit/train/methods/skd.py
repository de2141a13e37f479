"""`skd`: distillation-based training (DBT: M. Phuong, C. Lampert, ICCV 2019), the "SKD" of NEO-KD's comparison.

    loss = scale * { (1-share) CE(z_E, y) + sum_{k<E} [ (1-share) CE(z_k, y) + share T^2 CE( p_E(T), p_k(T) ) ] }

with p_k(T) the softmax of exit k at temperature T; the teacher, the last exit, is detached. T starts at 1 and
grows by 5 % after every batch in which the mean largest probability of the teacher at T is above 0.5.

Certain, from the authors' code: this loss on clean images, share 0.5, scale 2 * 5 / E, the rule of T, and T = 4
where it is constant. A reading: how NEO-KD trains it. Here the attacked images go through the same loss, with
their own last exit as teacher and one T for both, and the two halves share the scale, so that a learning rate
which suits the published loss suits this one; `--attack none` gives the published form. With `--teacher` the mean
softmax at T of those networks on the same images teaches every exit, the last one too; share=0.9, temperature=4,
scale=1 are then the usual weights of the literature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, Setup, TrainingMethod, View
from mexit.train.methods.distillation import soft_cross_entropy, teacher_probabilities

GROWTH, SURE = 1.05, 0.5


@dataclass
class SKD(TrainingMethod):
    """Distillation from the last exit, or from other networks.

    Attributes:
        share: of distillation in the loss of an exit that is taught, in [0, 1]; the rest is cross-entropy.
        temperature: "adaptive", or a number that stays.
        scale: of the loss on clean and of that on attacked images; None = 10 / E, halved where there are both.
        clean_weight, attacked_weight: of the loss on clean and on attacked images.
    """

    inputs = "clean and attacked, or clean"
    attack_use = "preferred"
    uses_teachers = True

    share: float = 0.5
    temperature: str | float = "adaptive"
    scale: float | None = None
    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    now: float = field(init=False, default=1.0)
    surest: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"share must lie in [0, 1], found {self.share}")
        if self.temperature != "adaptive":
            if isinstance(self.temperature, str) or self.temperature <= 0:
                raise UsageError(f"temperature must be adaptive or a number above 0, found {self.temperature}")
            self.now = float(self.temperature)

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        self.teachers, self.autocast, self.team = setup.teachers, setup.autocast, setup.team

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        weights = {"clean": self.clean_weight, "attacked": self.attacked_weight}
        views = outputs.views()
        scale = 10 / len(outputs.clean) / len(views) if self.scale is None else self.scale
        terms, self.surest = {}, []
        for view in views:
            weight = scale * weights[view.name]
            terms[view.name] = weight * (1 - self.share) * outputs.cross_entropy(view.logits).sum()
            teacher = self._teacher(view)
            self.surest.append(teacher.amax(dim=-1).mean())
            students = view.logits if self.teachers else view.logits[:-1]
            soft = soft_cross_entropy(students / self.now, teacher)
            terms[f"{view.name} kd"] = weight * self.share * self.now**2 * soft.sum()
        return terms

    def stepped(self, outputs: Outputs) -> None:
        """Raise T if the teacher was sure."""
        if self.temperature != "adaptive":
            return
        surest = {"surest": float(torch.stack(self.surest).mean())}
        if self.team.average(surest, outputs.share)["surest"] > SURE:
            self.now *= GROWTH

    def state(self) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        return {"temperature": torch.tensor(self.now, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `base.TrainingMethod`."""
        self.now = float(state["temperature"])

    def report(self) -> dict[str, list[float]]:
        """T at the end of the epoch."""
        return {"temperature": [round(self.now, 6)]}

    def _teacher(self, view: View) -> Tensor:
        """(B, C), detached."""
        if self.teachers:
            return teacher_probabilities(self.teachers, view.images, self.now, self.autocast)
        return (view.logits[-1].detach() / self.now).softmax(dim=-1)

"""`skd`: distillation-based training (DBT: M. Phuong, C. Lampert, ICCV 2019), the "SKD" of NEO-KD's comparison.

    loss = scale * { (1-share) CE(z_E, y) + sum_{k<E} [ (1-share) CE(z_k, y) + share T^2 CE( p_E(T), p_k(T) ) ] }

p_k(T) is the softmax of exit k at temperature T; the teacher, the last exit, is detached. T starts at 1 and grows by
5 % after every batch in which the mean largest probability of the teacher at T is above 0.5.

Published, in the authors' code: this loss on clean images, share 0.5, scale 2 * 5 / E, the rule of T, and T = 4
where it is constant. `--attack none` trains this form. Our reading of SKD in NEO-KD's comparison: attacked images
have the same loss, with the last exit on the attacked images as teacher and one T for both. Both losses then have
half of the scale, so that a learning rate for the published loss stays right. With `--teacher` the mean softmax at
T of those networks on the same images is the target of every exit, the last one included; share=0.9, temperature=4,
scale=1 are then usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, TrainingMethod, View
from mexit.train.methods.distillation import soft_cross_entropy, teacher_probabilities

GROWTH = 1.05


@dataclass
class SKD(TrainingMethod):
    """Distillation from the last exit, or from other networks.

    Attributes:
        share: share of distillation in a student's loss, in [0, 1]; the rest is cross-entropy.
        temperature: "adaptive", or a constant T.
        max_confidence: mean largest probability of the teacher above which an adaptive T grows, in (0, 1).
        scale: factor of the loss on clean and of that on attacked images; None = 10 / E, halved if there are both.
        clean_weight, attacked_weight: weights of the loss on clean and on attacked images.
    """

    inputs = "clean and attacked, or clean"
    attack_use = "preferred"
    uses_teachers = True

    share: float = 0.5
    temperature: str | float = "adaptive"
    max_confidence: float = 0.5
    scale: float | None = None
    clean_weight: float = 1.0
    attacked_weight: float = 1.0
    current_temperature: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"share must lie in [0, 1], found {self.share}")
        if self.temperature != "adaptive":
            if isinstance(self.temperature, str) or self.temperature <= 0:
                raise UsageError(f"temperature must be adaptive or a number above 0, found {self.temperature}")
            self.current_temperature = float(self.temperature)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        weights = {"clean": self.clean_weight, "attacked": self.attacked_weight}
        views = outputs.views()
        scale = 10 / len(outputs.clean) / len(views) if self.scale is None else self.scale
        temperature, terms = self.current_temperature, {}
        for view in views:
            weight = scale * weights[view.name]
            terms[view.name] = weight * (1 - self.share) * outputs.cross_entropy(view.logits).sum()
            students = view.logits if self.run.teachers else view.logits[:-1]
            soft = soft_cross_entropy(students / temperature, self._targets(view))
            terms[f"{view.name} kd"] = weight * self.share * temperature**2 * outputs.weight_exits(soft).sum()
        return terms

    def after_step(self, outputs: Outputs) -> None:
        """Raise an adaptive T if the teacher was confident on this batch."""
        if self.temperature != "adaptive":
            return
        confidence = torch.stack([self._targets(view).amax(dim=-1).mean() for view in outputs.views()]).mean()
        mean = self.run.process_group.average({"confidence": float(confidence)}, outputs.step.share)["confidence"]
        if mean > self.max_confidence:
            self.current_temperature *= GROWTH

    def state_dict(self) -> dict[str, Tensor]:
        return {"temperature": torch.tensor(self.current_temperature, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.current_temperature = float(state["temperature"])

    def report(self) -> dict[str, list[float]]:
        """T at the end of the epoch."""
        return {"temperature": [round(self.current_temperature, 6)]}

    def _targets(self, view: View) -> Tensor:
        """The teacher's probabilities at the current T, (B, C), detached."""
        return teacher_probabilities(self.run, view.images, view.logits, self.current_temperature)

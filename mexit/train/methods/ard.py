"""`ard`: adversarially robust distillation (M. Goldblum, L. Fowl, S. Feizi, T. Goldstein, AAAI 2020).

    taught exit:  (1-share) CE(f_k(x), y) + share T^2 KL( p_teacher(x; T) || p_k(x_adv; T) )

The teacher sees the clean image, the exit the attacked one. As in NEO-KD's comparison the teacher is the last
exit, detached; with `--teacher` it is the mean softmax at T of those networks, and teaches every exit.

Certain: this loss, and the last exit as teacher. Readings: share 0.9 and T = 4, which are usual in distillation;
the last exit, while it teaches, minimises CE on clean and on attacked images; taught exits have no cross-entropy
on attacked images, for which exits keep one was not found (`attacked_weight` gives them one).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, Setup, TrainingMethod
from mexit.train.methods.distillation import divergence, teacher_probabilities


@dataclass
class ARD(TrainingMethod):
    """Attacked exits learn a clean teacher.

    Attributes:
        share: of distillation in the loss of a taught exit, in [0, 1].
        temperature: T.
        attacked_weight: of a cross-entropy on attacked images that taught exits minimise besides.
    """

    uses_teachers = True

    share: float = 0.9
    temperature: float = 4.0
    attacked_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and self.temperature > 0):
            raise UsageError(
                f"share must lie in [0, 1] and temperature above 0, found {self.share} and {self.temperature}"
            )

    def setup(self, setup: Setup) -> None:
        """See `base.TrainingMethod`."""
        self.teachers, self.autocast = setup.teachers, setup.autocast

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `base.TrainingMethod`."""
        clean, attacked = outputs.cross_entropy(outputs.clean), outputs.cross_entropy(outputs.need_attacked())
        students = len(clean) if self.teachers else len(clean) - 1
        soft = divergence(outputs.need_attacked()[:students] / self.temperature, self._teacher(outputs))
        return {
            "clean": (1 - self.share) * clean[:students].sum() + clean[students:].sum(),
            "attacked": self.attacked_weight * attacked[:students].sum() + attacked[students:].sum(),
            "kd": self.share * self.temperature**2 * soft.sum(),
        }

    def _teacher(self, outputs: Outputs) -> Tensor:
        """(B, C), detached."""
        if self.teachers:
            return teacher_probabilities(self.teachers, outputs.images, self.temperature, self.autocast)
        return (outputs.clean[-1].detach() / self.temperature).softmax(dim=-1)

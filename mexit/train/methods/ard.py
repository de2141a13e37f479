"""`ard`: adversarially robust distillation (M. Goldblum, L. Fowl, S. Feizi, T. Goldstein, AAAI 2020).

    student exit:  (1-share) CE(f_k(x), y) + share T^2 KL( p_teacher(x; T) || p_k(x_adv; T) )

The teacher predicts on the clean image, the student on the attacked one. As in NEO-KD's comparison the teacher is
the last exit, detached. With `--teacher` it is the mean softmax at T of those networks, and every exit is a student.

Published: this loss, and the last exit as teacher. Our readings: share 0.9 and T = 4, which are usual in
distillation; the last exit, while it is the teacher, minimises cross-entropy on clean and on attacked images;
students have no cross-entropy on attacked images (`attacked_weight` adds one), because no source says which exits
keep it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods.base import Outputs, TrainingMethod
from mexit.train.methods.distillation import kl_divergence, teacher_probabilities


@dataclass
class ARD(TrainingMethod):
    """Attacked exits learn a teacher's clean predictions.

    Attributes:
        share: share of distillation in a student's loss, in [0, 1].
        temperature: T.
        attacked_weight: weight of a cross-entropy on attacked images in a student's loss.
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

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        logits = outputs.require_attacked()
        clean, attacked = outputs.cross_entropy(outputs.clean), outputs.cross_entropy(logits)
        students = len(clean) if self.run.teachers else len(clean) - 1
        targets = teacher_probabilities(self.run, outputs.batch.images, outputs.clean, self.temperature)
        soft = kl_divergence(logits[:students] / self.temperature, targets)
        return {
            "clean": (1 - self.share) * clean[:students].sum() + clean[students:].sum(),
            "attacked": self.attacked_weight * attacked[:students].sum() + attacked[students:].sum(),
            "kd": self.share * self.temperature**2 * soft.sum(),
        }

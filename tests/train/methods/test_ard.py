"""ARD: attacked exits learn a teacher's clean predictions; every term is computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from method_outputs import make_outputs
from torch import Tensor

from mexit.errors import UsageError
from mexit.models import build_model
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Setup, TrainingMethod

E, B, C = 3, 8, 10


@pytest.fixture
def outputs() -> Outputs:
    torch.manual_seed(0)
    clean, attacked = torch.randn(2, E, B, C)
    images = torch.rand(B, 1, 8, 8)
    return make_outputs(
        clean.requires_grad_(),
        attacked[None].requires_grad_(),
        images=images,
        attacked_images=(images + 0.1)[None],
    )


def method(*teachers, **options: float) -> TrainingMethod:
    ard = build_method("ard", options)
    ard.setup(Setup(E, C, teachers=teachers))
    return ard


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(exit_logits, labels) for exit_logits in logits]).sum()


def kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Sum over exits of KL( target || softmax(logits / T) )."""
    return torch.stack(
        [F.kl_div((student / temperature).log_softmax(-1), target, reduction="batchmean") for student in logits]
    ).sum()


def test_the_last_exit_is_the_teacher_and_has_both_cross_entropies(outputs) -> None:
    terms = method(share=0.7, temperature=2.0).terms(outputs)
    target = (outputs.clean[-1] / 2).softmax(-1)
    torch.testing.assert_close(
        terms["clean"], 0.3 * ce(outputs.clean[:-1], outputs.labels) + ce(outputs.clean[-1:], outputs.labels)
    )
    torch.testing.assert_close(terms["attacked"], ce(outputs.attacked[-1:], outputs.labels))
    torch.testing.assert_close(terms["kd"], 0.7 * 4 * kl(target, outputs.attacked[:-1], 2.0), atol=1e-4, rtol=0)


def test_with_teachers_every_exit_learns_their_predictions_on_the_clean_image(outputs) -> None:
    torch.manual_seed(1)
    teachers = [build_model("digits-cnn", C).eval() for _ in range(2)]
    terms = method(*teachers).terms(outputs)
    with torch.no_grad():
        target = torch.stack([(teacher(outputs.batch.images)[-1] / 4).softmax(-1) for teacher in teachers]).mean(dim=0)
    torch.testing.assert_close(terms["clean"], 0.1 * ce(outputs.clean, outputs.labels))
    torch.testing.assert_close(terms["kd"], 0.9 * 16 * kl(target, outputs.attacked, 4.0), atol=1e-4, rtol=0)
    assert not terms["attacked"].any()


def test_students_can_have_a_cross_entropy_on_attacked_images(outputs) -> None:
    added = method(attacked_weight=0.5).terms(outputs)["attacked"] - method().terms(outputs)["attacked"]
    torch.testing.assert_close(added, 0.5 * ce(outputs.attacked[:-1], outputs.labels))


def test_the_gradient_of_distillation_reaches_attacked_students_only(outputs) -> None:
    method().terms(outputs)["kd"].backward()
    assert outputs.clean.grad is None
    gradient = outputs.variants.grad[0]
    assert not gradient[-1].any()
    assert gradient[:-1].abs().sum(dim=(1, 2)).all()


def test_a_network_with_one_exit_has_no_student(outputs) -> None:
    alone = make_outputs(outputs.clean[-1:], outputs.attacked[-1:])
    terms = method().terms(alone)
    assert float(terms["kd"].detach()) == 0
    torch.testing.assert_close(terms["clean"], ce(alone.clean, alone.labels))


def test_a_run_without_an_attack_is_refused(outputs) -> None:
    with pytest.raises(UsageError, match="--attack average"):
        method().terms(make_outputs(outputs.clean))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"share": 1.5}], ids=str)
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build_method("ard", options)

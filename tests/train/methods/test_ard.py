"""ARD: attacked exits learn the clean teacher; every term by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models import build_model
from mexit.train.methods import Outputs, build
from mexit.train.methods.base import Setup, TrainingMethod

E, B, C = 3, 8, 10


@pytest.fixture
def outputs() -> Outputs:
    torch.manual_seed(0)
    clean, attacked = torch.randn(2, E, B, C)
    images = torch.rand(B, 1, 8, 8)
    return Outputs(
        torch.arange(B),
        torch.arange(B),
        clean.requires_grad_(),
        attacked.requires_grad_(),
        CounterRNG(0, 0),
        images=images,
        attacked_images=(images + 0.1)[None],
    )


def method(*teachers, **options: float) -> TrainingMethod:
    objective = build("ard", E, options)
    objective.setup(Setup(E, C, teachers=teachers))
    return objective


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(exit_logits, labels) for exit_logits in logits]).sum()


def kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Sum over exits of KL( target || softmax(logits / T) )."""
    return torch.stack(
        [F.kl_div((student / temperature).log_softmax(-1), target, reduction="batchmean") for student in logits]
    ).sum()


def test_the_last_exit_teaches_the_others_and_keeps_both_cross_entropies(outputs) -> None:
    terms = method(share=0.7, temperature=2.0).terms(outputs)
    target = (outputs.clean[-1] / 2).softmax(-1)
    torch.testing.assert_close(
        terms["clean"], 0.3 * ce(outputs.clean[:-1], outputs.labels) + ce(outputs.clean[-1:], outputs.labels)
    )
    torch.testing.assert_close(terms["attacked"], ce(outputs.attacked[-1:], outputs.labels))
    torch.testing.assert_close(terms["kd"], 0.7 * 4 * kl(target, outputs.attacked[:-1], 2.0), atol=1e-4, rtol=0)


def test_other_networks_teach_every_exit_from_the_clean_image(outputs) -> None:
    torch.manual_seed(1)
    teachers = [build_model("digits-cnn", C).eval() for _ in range(2)]
    terms = method(*teachers).terms(outputs)
    with torch.no_grad():
        target = torch.stack([(teacher(outputs.images)[-1] / 4).softmax(-1) for teacher in teachers]).mean(dim=0)
    torch.testing.assert_close(terms["clean"], 0.1 * ce(outputs.clean, outputs.labels))
    torch.testing.assert_close(terms["kd"], 0.9 * 16 * kl(target, outputs.attacked, 4.0), atol=1e-4, rtol=0)
    assert not terms["attacked"].any()


def test_taught_exits_keep_a_cross_entropy_on_attacked_images_on_request(outputs) -> None:
    found = method(attacked_weight=0.5).terms(outputs)["attacked"] - method().terms(outputs)["attacked"]
    torch.testing.assert_close(found, 0.5 * ce(outputs.attacked[:-1], outputs.labels))


def test_distillation_moves_attacked_students_only(outputs) -> None:
    method().terms(outputs)["kd"].backward()
    assert outputs.clean.grad is None
    assert not outputs.attacked.grad[-1].any()
    assert outputs.attacked.grad[:-1].abs().sum(dim=(1, 2)).all()


def test_a_network_with_one_exit_teaches_nobody(outputs) -> None:
    alone = Outputs(outputs.labels, outputs.index, outputs.clean[-1:], outputs.attacked[-1:], outputs.draw)
    terms = method().terms(alone)
    assert float(terms["kd"].detach()) == 0
    torch.testing.assert_close(terms["clean"], ce(alone.clean, alone.labels))


def test_without_attacked_images_it_says_what_to_type(outputs) -> None:
    clean = Outputs(outputs.labels, outputs.index, outputs.clean, None, outputs.draw)
    with pytest.raises(UsageError, match="--attack average"):
        method().terms(clean)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"share": 1.5}], ids=str)
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build("ard", E, options)

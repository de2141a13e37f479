"""SKD: its loss against the formula written as plain loops, the rule of its temperature, and its teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from method_outputs import make_outputs
from torch import Tensor

from mexit.attacks.rng import CounterRNG
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model, model_spec
from mexit.train.config import resolve
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Setup, TrainingMethod
from mexit.train.methods.distillation import kl_divergence, soft_cross_entropy, teacher_probabilities

E, B, C = 3, 12, 10


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """Real images (B, 1, 8, 8) and their labels."""
    torch.set_num_threads(1)
    data = digits.load()
    index = splits.split(data).part("selection")[:B]
    return torch.from_numpy(data.batch(index, model_spec("digits-cnn").input)), torch.from_numpy(data.labels[index])


def network(seed: int) -> MultiExit:
    torch.manual_seed(seed)
    return build_model("digits-cnn", C).eval()


def outputs_of(images: tuple[Tensor, Tensor], attack: bool = True, size: float = 1.0) -> Outputs:
    """Outputs of a network on the images and on the same images with noise; `size` scales the logits."""
    pictures, labels = images
    moved = (pictures + 0.1 * CounterRNG(0, 0).uniform("noise", torch.arange(B), pictures.shape[1:])).clamp(0, 1)
    with torch.no_grad():
        clean, attacked = (size * network(0)(batch) for batch in (pictures, moved))
    return make_outputs(
        clean.requires_grad_(),
        attacked[None].requires_grad_() if attack else None,
        labels=labels,
        images=pictures,
        attacked_images=moved[None] if attack else None,
    )


def method(teachers: tuple[MultiExit, ...] = (), **options: object) -> TrainingMethod:
    skd = build_method("skd", options)
    skd.setup(Setup(E, C, teachers=teachers))
    return skd


def published(logits: Tensor, labels: Tensor, share: float, temperature: float) -> Tensor:
    """DBT's loss on one version of the images, sample by sample."""
    total = torch.zeros(())
    for k in range(E):
        for row in range(B):
            ce = -logits[k, row].log_softmax(-1)[labels[row]]
            total = total + (1 - share) * ce / B
            if k < E - 1:
                teacher = (logits[-1, row] / temperature).softmax(-1)
                student = (logits[k, row] / temperature).log_softmax(-1)
                soft = -sum(teacher[c] * student[c] for c in range(C))
                total = total + share * temperature**2 * soft / B
    return 2 * 5 / E * total


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_on_clean_images_it_is_the_published_loss(images, temperature) -> None:
    outputs = outputs_of(images, attack=False)
    loss = sum(method(temperature=temperature).terms(outputs).values())
    torch.testing.assert_close(loss, published(outputs.clean, outputs.labels, 0.5, temperature))


def test_attacked_images_add_the_same_loss_with_their_own_last_exit(images) -> None:
    outputs = outputs_of(images)
    assert outputs.attacked is not None
    loss = sum(method(share=0.3, temperature=2.0, clean_weight=0.5, attacked_weight=2.0).terms(outputs).values())
    parts = [published(logits, outputs.labels, 0.3, 2.0) for logits in (outputs.clean, outputs.attacked)]
    torch.testing.assert_close(loss, 0.5 * (0.5 * parts[0] + 2.0 * parts[1]))


def test_the_last_exit_gets_no_gradient_from_its_students(images) -> None:
    outputs = outputs_of(images)
    terms = method(temperature=4.0).terms(outputs)
    (terms["clean kd"] + terms["attacked kd"]).backward()
    assert outputs.variants is not None
    for logits in (outputs.clean, outputs.variants):
        assert logits.grad is not None
        gradient = logits.grad.reshape(E, B, C)
        assert not gradient[-1].any()
        assert gradient[:-1].abs().sum(dim=(1, 2)).all()


def test_temperature_grows_by_5_percent_after_batches_on_which_the_teacher_is_confident(images) -> None:
    unsure, confident = outputs_of(images, size=0.01), outputs_of(images, size=100.0)
    skd = method()
    history = []
    for outputs in (unsure, confident, confident, unsure):
        skd.after_step(outputs)
        history.append(float(skd.state_dict()["temperature"]))
    assert history == pytest.approx([1.0, 1.05, 1.05**2, 1.05**2])


def test_the_confidence_of_the_teacher_is_taken_at_the_current_temperature(images) -> None:
    """T settles where the mean largest probability of the outputs has come down to a half."""
    outputs = outputs_of(images, attack=False, size=100.0)
    skd = method()
    for _ in range(200):
        skd.after_step(outputs)

    def confidence(temperature: float) -> float:
        return float((outputs.clean.detach()[-1] / temperature).softmax(-1).amax(-1).mean())

    settled = float(skd.state_dict()["temperature"])
    assert confidence(settled) <= 0.5 < confidence(settled / 1.05)


def test_computing_the_terms_changes_no_state(images) -> None:
    """Adversarial weight perturbation computes the terms twice a step."""
    outputs, skd = outputs_of(images, size=100.0), method()
    skd.terms(outputs)
    assert float(skd.state_dict()["temperature"]) == 1.0
    skd.after_step(outputs)
    assert float(skd.state_dict()["temperature"]) == pytest.approx(1.05)


def test_temperature_is_state_and_a_constant_stays(images) -> None:
    outputs, first, second, still = outputs_of(images, size=100.0), method(), method(), method(temperature=4.0)
    for skd in (first, still):
        skd.after_step(outputs)
    second.load_state_dict(first.state_dict())
    assert second.report() == first.report() == {"temperature": [1.05]}
    assert still.report() == {"temperature": [4.0]}


def test_with_teachers_every_exit_learns_their_predictions_on_the_same_images(images) -> None:
    teachers = (network(1), network(2))
    outputs = outputs_of(images)
    terms = method(teachers, share=0.9, temperature=4.0, scale=1.0).terms(outputs)
    assert outputs.attacked is not None
    assert outputs.attacked_images is not None
    versions = {
        "clean": (outputs.clean, outputs.batch.images),
        "attacked": (outputs.attacked, outputs.attacked_images[0]),
    }
    for name, (logits, pictures) in versions.items():
        with torch.no_grad():
            target = torch.stack([(teacher(pictures)[-1] / 4).softmax(-1) for teacher in teachers]).mean(dim=0)
        students = [-(target * (exit_logits / 4).log_softmax(-1)).sum(-1).mean() for exit_logits in logits]
        torch.testing.assert_close(terms[f"{name} kd"], 0.9 * 16 * torch.stack(students).sum())
        ce = [F.cross_entropy(exit_logits, outputs.labels) for exit_logits in logits]
        torch.testing.assert_close(terms[name], 0.1 * torch.stack(ce).sum())


def test_teachers_get_no_gradient(images) -> None:
    teacher = network(1)
    outputs = outputs_of(images)
    sum(method((teacher,)).terms(outputs).values()).backward()
    assert outputs.clean.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher_probabilities(
        Setup(E, C, teachers=(teacher,)), outputs.batch.images, outputs.clean, 4.0
    ).requires_grad


def test_kl_is_cross_entropy_minus_the_entropy_of_the_target(images) -> None:
    outputs = outputs_of(images)
    target = outputs.clean.detach().softmax(dim=-1)
    assert kl_divergence(target.log(), target).abs().max() < 1e-6
    kl = kl_divergence(outputs.clean, target.flip(0))
    by_torch = [F.kl_div(outputs.clean[k].log_softmax(-1), target[E - 1 - k], reduction="batchmean") for k in range(E)]
    torch.testing.assert_close(kl, torch.stack(by_torch))
    assert kl_divergence(outputs.clean, torch.eye(C)[outputs.labels].expand(E, B, C)).isfinite().all()
    assert (soft_cross_entropy(outputs.clean, target.flip(0)) > kl).all()


def test_attacked_by_default_and_clean_on_request() -> None:
    assert resolve("mnist", None, {"method": "skd"}).attack == "max-average"
    assert resolve("digits", None, {"method": "skd", "attack": "none"}).training_attack() is None


@pytest.mark.parametrize("options", [{"temperature": "hot"}, {"temperature": 0.0}, {"share": 1.5}], ids=str)
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build_method("skd", options)

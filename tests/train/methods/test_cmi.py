"""CMI, Gamma and NCMI from streamed sums equal their definitions over all outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.data import digits, splits
from mexit.models import build_model, model_spec
from mexit.train.methods.cmi import FLOOR, ClassStatistics, kl_to_centroids

E, C = 3, 10


@pytest.fixture(scope="module")
def outputs() -> tuple[Tensor, Tensor]:
    """Logits (E, N, C) of an untrained network on real images, and the labels; the classes are not balanced."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits.load()
    index = splits.split(data).part("selection")
    index = index[(data.labels[index] > 0) | (index % 3 == 0)]
    with torch.no_grad():
        logits = build_model("digits-cnn", C)(torch.from_numpy(data.batch(index, model_spec("digits-cnn").input)))
    return 3 * logits.double(), torch.from_numpy(data.labels[index])


@pytest.fixture(scope="module")
def streamed(outputs) -> ClassStatistics:
    logits, labels = outputs
    statistics = ClassStatistics(E, C)
    for start in range(0, len(labels), 17):
        statistics.add(logits[:, start : start + 17], labels[start : start + 17])
    return statistics


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(dim=-1)


def test_the_classes_of_the_fixture_are_not_balanced(streamed) -> None:
    assert streamed.counts.max() > 2 * streamed.counts.min() > 0


def test_centroids_are_class_means(outputs, streamed) -> None:
    logits, labels = outputs
    for y in range(C):
        torch.testing.assert_close(streamed.centroids()[:, y], logits.softmax(-1)[:, labels == y].mean(dim=1))


def test_streamed_cmi_is_the_mean_divergence_from_the_centroids(outputs, streamed) -> None:
    logits, labels = outputs
    p, q = logits.softmax(-1), streamed.centroids()
    torch.testing.assert_close(streamed.cmi(), _kl(p, q[:, labels]).mean(dim=1))
    assert (streamed.cmi() > 0.01).all()


def test_streamed_gamma_is_the_mean_over_pairs_of_images_with_zero_inside_a_class(outputs, streamed) -> None:
    logits, labels = outputs
    p = logits.softmax(-1)
    pairs = -p @ p.log().mT
    apart = (labels[:, None] != labels).double()
    torch.testing.assert_close(streamed.gamma(), (pairs * apart).mean(dim=(1, 2)))
    torch.testing.assert_close(streamed.ncmi(), streamed.cmi() / streamed.gamma())


def test_divergence_from_any_reference_is_cmi_and_the_divergence_of_the_centroids_from_it(outputs, streamed) -> None:
    """The class means are the minimiser, and an old centroid overestimates CMI by exactly the last term."""
    logits, labels = outputs
    reference = torch.rand(E, C, C, dtype=torch.float64).softmax(dim=-1)
    excess = _kl(streamed.centroids(), reference) @ streamed.class_shares()
    kl = kl_to_centroids(logits, reference, labels).mean(dim=1)
    torch.testing.assert_close(kl.double(), streamed.cmi() + excess, atol=1e-5, rtol=1e-5)
    assert (excess > 0.01).all()


def test_the_gradient_does_not_reach_the_centroids(outputs, streamed) -> None:
    logits = outputs[0].clone().requires_grad_()
    centroids = streamed.centroids().requires_grad_()
    kl_to_centroids(logits, centroids, outputs[1]).sum().backward()
    assert centroids.grad is None
    assert logits.grad is not None
    assert logits.grad.any()


def test_values_stay_finite_for_hard_outputs_and_centroids_with_zeros() -> None:
    logits = torch.tensor([[[200.0, 0.0], [0.0, 200.0]]])
    labels = torch.tensor([0, 0])
    kl = kl_to_centroids(logits, torch.eye(2)[None], labels)
    torch.testing.assert_close(kl, torch.tensor([[0.0, -torch.tensor(FLOOR).log()]]))
    statistics = ClassStatistics(1, 2)
    statistics.add(logits, torch.tensor([0, 1]))
    assert statistics.gamma().isfinite().all()
    assert abs(float(statistics.cmi())) < 1e-12, "the outputs of every class are equal"


def test_a_class_without_images_contributes_nothing(outputs) -> None:
    logits, labels = outputs
    seen = labels != 4
    statistics = ClassStatistics(E, C)
    statistics.add(logits[:, seen], labels[seen])
    torch.testing.assert_close(statistics.centroids()[:, 4], torch.full((E, C), 0.1, dtype=torch.float64))
    direct = _kl(logits.softmax(-1), statistics.centroids()[:, labels])[:, seen].mean(dim=1)
    torch.testing.assert_close(statistics.cmi(), direct)
    assert statistics.gamma().isfinite().all()


def test_sums_survive_a_checkpoint(outputs, streamed) -> None:
    restored = ClassStatistics(E, C)
    restored.load_state_dict({name: value.clone() for name, value in streamed.state_dict().items()})
    restored.add(*outputs)
    assert torch.equal(restored.counts, 2 * streamed.counts)
    torch.testing.assert_close(restored.ncmi(), streamed.ncmi())

"""Square and RayS on classifiers with a plane between two classes, where the nearest attack is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.attacks.black_box import rays, square
from mexit.errors import UsageError

N, D, QUERIES = 20, 64, 1000


class Plane:
    """Two classes with a plane between them: the label changes first at |w x - b| / |w|_1, in direction sign w."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(D, generator=generator)
        self.images = 0.3 + 0.4 * torch.rand(N, 1, 8, 8, generator=generator)
        self.threshold = (self.images.flatten(1) @ self.weights).mean()
        self.batch_sizes: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batch_sizes.append(len(images))
        return (images.flatten(1) @ self.weights > self.threshold).long()

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, 2) of the same classes."""
        self.batch_sizes.append(len(images))
        score = images.flatten(1) @ self.weights - self.threshold
        return torch.stack([-score, score], dim=1)

    def distances(self) -> Tensor:
        """L-infinity distance of each image to the plane, (N,)."""
        return (self.images.flatten(1) @ self.weights - self.threshold).abs() / self.weights.abs().sum()


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.mark.slow
def test_rays_finds_the_nearest_change_of_the_label(plane: Plane) -> None:
    labels = plane(plane.images)
    for image, label, nearest in zip(plane.images[:, None], labels[:, None], plane.distances(), strict=True):
        beyond, within = float(1.05 * nearest), float(0.95 * nearest)
        assert plane(rays(plane, image, label, beyond, QUERIES)) != label
        assert plane(rays(plane, image, label, within, QUERIES)) == label


def test_rays_stays_in_the_ball_and_in_the_pixel_range(plane: Plane) -> None:
    images = (plane.images - 0.3) / 0.4  # some next to 0 or 1
    attacked = rays(plane, images, plane(images), 0.05, QUERIES)
    assert (attacked - images).abs().max() <= 0.05 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not torch.equal(attacked, images)


@pytest.mark.parametrize("queries", [1, 2, 30])
def test_rays_uses_exactly_its_queries(plane: Plane, queries: int) -> None:
    labels = plane(plane.images)
    plane.batch_sizes.clear()
    rays(plane, plane.images, labels, 1e-6, queries)
    assert sum(plane.batch_sizes) == queries * N


def test_a_misclassified_image_is_unchanged_and_costs_one_query(plane: Plane) -> None:
    wrong = 1 - plane(plane.images)
    plane.batch_sizes.clear()
    assert torch.equal(rays(plane, plane.images, wrong, 0.1, QUERIES), plane.images)
    assert plane.batch_sizes == [N]


@pytest.mark.parametrize(("eps", "queries"), [(0.0, 10), (1.5, 10), (0.1, 0)])
def test_an_impossible_radius_or_number_of_queries_is_refused(plane: Plane, eps: float, queries: int) -> None:
    with pytest.raises(UsageError, match="RayS needs"):
        rays(plane, plane.images, plane(plane.images), eps, queries)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_attacks_within_the_ball_and_its_queries_without_gradients(plane: Plane, norm: str) -> None:
    labels = plane(plane.images)
    plane.batch_sizes.clear()

    def classifier(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return plane.logits(images)

    eps = 0.2 if norm == "linf" else 1.6
    attacked = square(classifier, plane.images, labels, eps, norm=norm, queries=60)
    change = (attacked - plane.images).flatten(1)
    assert change.norm(dim=1, p=2 if norm == "l2" else torch.inf).max() <= eps + 1e-5
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert sum(plane.batch_sizes) <= N * (60 + 4)
    assert (plane(attacked) != labels).any()


def test_square_does_not_write_into_the_classifiers_logits(plane: Plane) -> None:
    stored = plane.logits(plane.images)
    before = stored.clone()
    square(lambda images: stored[: len(images)], plane.images, plane(plane.images), 0.1, queries=2)
    assert torch.equal(stored, before)

"""RayS finds the nearest corner of the ball that changes the label, and hears labels alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.attacks.black_box import rays
from mexit.errors import UsageError

N, D, QUERIES = 20, 64, 1000


class Plane:
    """Two classes with a plane between them: the label changes first at |w x - b| / |w|_1, in direction sign w."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(D, generator=generator)
        self.images = 0.3 + 0.4 * torch.rand(N, 1, 8, 8, generator=generator)
        self.middle = (self.images.flatten(1) @ self.weights).mean()
        self.asked: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        return (images.flatten(1) @ self.weights > self.middle).long()

    def distances(self) -> Tensor:
        return (self.images.flatten(1) @ self.weights - self.middle).abs() / self.weights.abs().sum()


@pytest.fixture
def plane() -> Plane:
    return Plane()


def test_the_nearest_change_of_the_label_is_found(plane: Plane) -> None:
    labels = plane(plane.images)
    for image, label, nearest in zip(plane.images[:, None], labels[:, None], plane.distances(), strict=True):
        beyond, within = float(1.05 * nearest), float(0.95 * nearest)
        assert plane(rays(plane, image, label, beyond, QUERIES)) != label
        assert plane(rays(plane, image, label, within, QUERIES)) == label


def test_images_stay_in_the_ball_and_in_range(plane: Plane) -> None:
    images = (plane.images - 0.3) / 0.4  # some next to 0 or 1
    attacked = rays(plane, images, plane(images), 0.05, QUERIES)
    assert (attacked - images).abs().max() <= 0.05 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not torch.equal(attacked, images)


@pytest.mark.parametrize("queries", [1, 2, 30])
def test_queries_are_counted(plane: Plane, queries: int) -> None:
    labels = plane(plane.images)
    plane.asked.clear()
    rays(plane, plane.images, labels, 1e-6, queries)
    assert sum(plane.asked) == queries * N


def test_what_was_wrong_before_is_left_alone_and_costs_one_query(plane: Plane) -> None:
    wrong = 1 - plane(plane.images)
    plane.asked.clear()
    assert torch.equal(rays(plane, plane.images, wrong, 0.1, QUERIES), plane.images)
    assert plane.asked == [N]


@pytest.mark.parametrize(("eps", "queries"), [(0.0, 10), (1.5, 10), (0.1, 0)])
def test_a_radius_or_a_number_of_queries_without_sense_is_refused(plane: Plane, eps: float, queries: int) -> None:
    with pytest.raises(UsageError, match="RayS needs"):
        rays(plane, plane.images, plane(plane.images), eps, queries)

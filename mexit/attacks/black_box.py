"""Black-box attacks, which use answers but no gradients: Square (logits) and RayS (labels).

Square is the implementation of AutoAttack's authors (M. Andriushchenko et al.: Square Attack, ECCV 2020).

RayS is the hard-label attack in the L-infinity ball of J. Chen, Q. Gu: RayS, a ray searching method for hard-label
adversarial attack, KDD 2020. The change of an image is r d, with a sign d for every pixel; r(d) is the smallest radius
at which the label changes. Blocks of d, first the whole, then its halves, quarters and so on, are flipped in turn. A
flip is kept if the label still changes at the smallest radius so far, which a binary search then lowers. Our choices:
the radius starts at 1, the whole pixel range; the search for a sample ends once its radius is at most eps; the binary
search stops within `TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mexit.attacks.autoattack import import_pyautoattack, package_norm
from mexit.errors import UsageError

TOLERANCE = 0.01  # of the binary search, a share of eps
BATCH = 250
Classifier = Callable[[Tensor], Tensor]  # images (B, C, H, W) to logits (B, C)
LabelFn = Callable[[Tensor], Tensor]  # images (B, C, H, W) to labels (B,)


def square(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    queries: int = 5000,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """Run the Square attack.

    Args:
        classifier: images (B, C, H, W) to logits (B, C); any program, such as a served bundle.
        images, labels: (N, C, H, W) in [0, 1], (N,) int64.
        eps: radius, a fraction of the pixel range.
        norm: "linf" or "l2".
        queries: queries per sample and restart.
        restarts: runs with different random numbers, on the samples that are still classified correctly.
        seed: seed of the random numbers.

    Returns:
        Attacked images, (N, C, H, W).

    Raises:
        MissingExtra: `pyautoattack` is not installed.
    """
    package = import_pyautoattack()
    with torch.no_grad(), torch.random.fork_rng():
        attack = package.square.SquareAttack(
            lambda batch: classifier(batch).clone(),  # the package writes into the logits
            norm=package_norm(norm),
            eps=eps,
            n_queries=queries,
            n_restarts=restarts,
            seed=seed,
            resc_schedule=False,
            device=images.device,
        )
        attacked: Tensor = attack.perturb(images, labels)
    return attacked.detach()


def rays(classify: LabelFn, images: Tensor, labels: Tensor, eps: float, queries: int = 5000) -> Tensor:
    """Run the RayS attack.

    Args:
        classify: images (B, C, H, W) to labels (B,); any program, such as a served bundle.
        images, labels: (N, C, H, W) in [0, 1], (N,) int64.
        eps: radius, a fraction of the pixel range, in (0, 1].
        queries: largest number of queries per sample.

    Returns:
        (N, C, H, W) in [0, 1] and within eps of `images`. A sample that is misclassified from the start is unchanged;
        a sample that withstands the attack is moved by eps in the best direction.

    Raises:
        UsageError: eps is not in (0, 1] or queries is below 1.
    """
    if not 0 < eps <= 1 or queries < 1:
        raise UsageError(f"RayS needs 0 < eps <= 1 and at least one query, found {eps:g} and {queries}")
    parts = zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
    return torch.cat([_RaySearch(classify, *part, eps, queries).run() for part in parts])


class _RaySearch:
    """RayS on one batch.

    Attributes:
        signs: the direction d, (B, D) of 1 and -1.
        radius: smallest radius at which the label changed in direction d, (B,); 1 before it changed.
        queries_left: of each sample, (B,).
    """

    def __init__(self, classify: LabelFn, images: Tensor, labels: Tensor, eps: float, queries: int) -> None:
        self.classify, self.images, self.labels, self.eps = classify, images, labels, eps
        self.signs = torch.ones_like(images).flatten(1)
        self.radius = torch.ones(len(images), device=images.device)
        self.queries_left = torch.full((len(images),), queries, device=images.device)

    def run(self) -> Tensor:
        """Search until every sample is beaten or has no queries left; returns the attacked images."""
        everything = torch.arange(len(self.images))
        self.radius[self._misclassified(everything, self.signs, torch.zeros_like(self.radius))] = 0
        for start, stop in _blocks(self.signs.shape[1]):
            rows = ((self.radius > self.eps) & (self.queries_left > 0)).nonzero().flatten()
            if not len(rows):
                break
            self._try_flip(rows, start, stop)
        return self._moved(everything, self.signs, self.radius.clamp(max=self.eps))

    def _try_flip(self, rows: Tensor, start: int, stop: int) -> None:
        """Flip a block of signs of these samples. Where the label still changes, keep it and reduce the radius."""
        signs = self.signs[rows]
        signs[:, start:stop] *= -1
        kept = self._misclassified(rows, signs, self.radius[rows])
        rows, signs = rows[kept], signs[kept]
        self.signs[rows] = signs
        low, high = torch.zeros_like(self.radius[rows]), self.radius[rows]
        while len(active := ((high - low > TOLERANCE * self.eps) & (self.queries_left[rows] > 0)).nonzero().flatten()):
            middle = (low[active] + high[active]) / 2
            wrong = self._misclassified(rows[active], signs[active], middle)
            high[active] = torch.where(wrong, middle, high[active])
            low[active] = torch.where(wrong, low[active], middle)
        self.radius[rows] = high

    def _misclassified(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        """Whether the label is wrong at these points; costs one query per sample."""
        self.queries_left[rows] -= 1
        return self.classify(self._moved(rows, signs, radius)) != self.labels[rows]

    def _moved(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        return (self.images[rows] + (radius[:, None] * signs).view_as(self.images[rows])).clamp(0, 1)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    """Blocks (start, stop) of positions: an empty one, then endlessly the whole, halves, quarters, ..., single ones.

    The empty block tests the first direction without a flip.
    """
    yield 0, 0
    while True:
        count = 1
        while count < 2 * size:
            edges = [round(k * size / count) for k in range(count + 1)]
            yield from ((start, stop) for start, stop in pairwise(edges) if start < stop)
            count *= 2

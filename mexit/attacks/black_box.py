"""RayS: an attack that hears nothing but the label, in the L-infinity ball.

J. Chen, Q. Gu: RayS, a ray searching method for hard-label adversarial attack, KDD 2020. Changes of an image are
r d with a sign d of every pixel, and r(d) is the smallest radius at which the label is another one. Blocks of d,
the whole, its halves, quarters and so on, are flipped in turn; a flip stays if the label still changes at the
smallest radius so far, which a binary search then lowers. Our choices: the radius begins at 1, the whole pixel
range, a sample ends once it is inside the ball, and the search ends within `TOLERANCE` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mexit.errors import UsageError

TOLERANCE = 0.01  # of the radius asked for
BATCH = 250
Labels = Callable[[Tensor], Tensor]


def rays(classify: Labels, images: Tensor, labels: Tensor, eps: float, queries: int = 5000) -> Tensor:
    """Attack a classifier.

    Args:
        classify: images (B, C, H, W) to labels (B,); may be any program, such as a served bundle.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64.
        eps: radius, a fraction of the pixel range.
        queries: for each sample, at most.

    Returns:
        (N, C, H, W) in [0, 1] and within eps of `images`: a sample that was wrong before is as it was, one that
        was not beaten is moved by eps in the best direction found.

    Raises:
        UsageError: the radius or the number of queries is not positive.
    """
    if not 0 < eps <= 1 or queries < 1:
        raise UsageError(f"RayS needs 0 < eps <= 1 and at least one query, found {eps:g} and {queries}")
    parts = zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
    return torch.cat([_Search(classify, *part, eps, queries).found() for part in parts])


class _Search:
    """The search for a batch.

    Attributes:
        signs: d, (B, D) of 1 and -1.
        radius: the smallest at which a label changed in direction d, (B,); 1 before one did.
        left: queries of each sample, (B,).
    """

    def __init__(self, classify: Labels, images: Tensor, labels: Tensor, eps: float, queries: int) -> None:
        self.classify, self.images, self.labels, self.eps = classify, images, labels, eps
        self.signs = torch.ones_like(images).flatten(1)
        self.radius = torch.ones(len(images), device=images.device)
        self.left = torch.full((len(images),), queries, device=images.device)

    def found(self) -> Tensor:
        """Search to the end of the queries."""
        wrong = self._fooled(torch.arange(len(self.images)), self.signs, torch.zeros_like(self.radius))
        self.radius[wrong] = 0
        for first, end in _blocks(self.signs.shape[1]):
            open_ones = ((self.radius > self.eps) & (self.left > 0)).nonzero().flatten()
            if not len(open_ones):
                break
            self._flip(open_ones, first, end)
        return self._moved(torch.arange(len(self.images)), self.signs, self.radius.clamp(max=self.eps))

    def _flip(self, rows: Tensor, first: int, end: int) -> None:
        """Turn a block of signs in these samples, and keep that where it is no worse."""
        signs = self.signs[rows]
        signs[:, first:end] *= -1
        better = self._fooled(rows, signs, self.radius[rows])
        rows, signs = rows[better], signs[better]
        self.signs[rows] = signs
        low, high = torch.zeros_like(self.radius[rows]), self.radius[rows]
        while len(going := ((high - low > TOLERANCE * self.eps) & (self.left[rows] > 0)).nonzero().flatten()):
            middle = (low[going] + high[going]) / 2
            fooled = self._fooled(rows[going], signs[going], middle)
            high[going] = torch.where(fooled, middle, high[going])
            low[going] = torch.where(fooled, low[going], middle)
        self.radius[rows] = high

    def _fooled(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        """Whether the labels are wrong there; a query each."""
        self.left[rows] -= 1
        return self.classify(self._moved(rows, signs, radius)) != self.labels[rows]

    def _moved(self, rows: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        return (self.images[rows] + (radius[:, None] * signs).view_as(self.images[rows])).clamp(0, 1)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    """Nothing, the whole, its halves, quarters, ... down to single places, and then from the whole again."""
    yield 0, 0
    while True:
        count = 1
        while count < 2 * size:
            edges = [round(place * size / count) for place in range(count + 1)]
            yield from ((first, end) for first, end in pairwise(edges) if first < end)
            count *= 2

"""Divides the groups of a data set among the splits: each group into one split, each class into as many as it can.

The groups of a class are drawn at random and independently of their size, so that the groups of a split are a sample of
all groups; certificates assume that. One exception: a group with more than half of the samples of its class stays in
training. At most half of the groups of a class (rounded up) leave training, for the splits in the order of the shares
below. A class of one group is in training alone, and one of few groups is missing from the last splits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# Fractions of the groups: with an official test part, of those outside it, and without. Certification has more than
# without groups, because a certificate counts groups: to certify 5 % of errors with confidence 95 % takes 59 groups
# without any error, and about 120 allow for one or two. Of 1,000 groups it gets 130 to 140.
SHARES = {"calibration": 0.11, "certification": 0.14, "selection": 0.05}
SHARES_WITH_TEST = {"test": 0.20, "calibration": 0.10, "certification": 0.13, "selection": 0.04}


def divide_groups(
    labels: NDArray[np.int64], groups: NDArray[np.int64], shares: Mapping[str, float], rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """Divide samples among splits by groups.

    Args:
        labels, groups: class and group of each sample, (N,).
        shares: fraction of the groups of each split but `train`, by falling need of a class for that split.
        rng: source of randomness.

    Returns:
        Sorted positions (n,) int64 of the samples of each split, by name, `train` included.
    """
    _, member = np.unique(groups, return_inverse=True)
    starts = {name: rng.random() for name in shares}
    split_of_group = np.zeros(int(member.max()) + 1, np.int64)
    for own, biggest in _groups_of_classes(labels, member):
        counts = _counts(len(own), shares, starts)
        own = rng.permutation(own)
        if biggest is not None:  # stays in training: elsewhere it would be most of what there is to learn from
            own = np.append(own[own != biggest], biggest)
        stops = np.cumsum(list(counts.values()))
        for k, (stop, count) in enumerate(zip(stops, counts.values(), strict=True)):
            split_of_group[own[stop - count : stop]] = k + 1
    split_of_sample = split_of_group[member]
    return {name: np.flatnonzero(split_of_sample == k).astype(np.int64) for k, name in enumerate(("train", *shares))}


def _groups_of_classes(
    labels: NDArray[np.int64], member: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], int | None]]:
    """For each class its groups and, if one holds more than half of its samples, that group.

    A group with samples of several classes counts for the class that is in the fewest groups.
    """
    pairs, sizes = np.unique(np.stack([member, labels]), axis=1, return_counts=True)
    spread = np.bincount(pairs[1])
    order = np.lexsort((spread[pairs[1]], pairs[0]))
    main = np.flatnonzero(np.diff(pairs[0][order], prepend=-1))
    owner = np.full(int(member.max()) + 1, -1)
    owner[pairs[0][order][main]] = pairs[1][order][main]
    found = []
    for label in np.unique(labels):
        own = np.flatnonzero(owner == label)
        if not len(own):
            continue
        in_class = np.zeros(len(owner))
        of_label = pairs[1] == label
        in_class[pairs[0][of_label]] = sizes[of_label]
        largest = int(own[np.argmax(in_class[own])])
        found.append((own, largest if in_class[largest] > in_class.sum() / 2 else None))
    return found


def _counts(n: int, shares: Mapping[str, float], position: dict[str, float]) -> dict[str, int]:
    """Number of groups of a class for each split but `train`.

    Args:
        n: groups of the class.
        shares: fraction of all groups of each split.
        position: running sum of the fractions of each split, which this function moves on; rounding it down after each
            class gives totals that are right to one group.
    """
    limit = 0 if n < 2 else (n + 1) // 2
    counts = {}
    for name, share in shares.items():
        before, position[name] = int(position[name]), position[name] + share * n
        counts[name] = min(max(int(position[name]) - before, 1), limit)
        limit -= counts[name]
    return counts

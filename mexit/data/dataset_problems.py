"""Problems of a data set that training would meet, or that make its results misleading."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.printable import listed, printable
from mexit.data.dataset import DataSet, FileImages
from mexit.data.picture_scan import PictureScan, grey_bits

TINY_SIDE = 8  # pixels
TINY_SHARE = 0.25  # of the median of the smaller sides
DARK = 15  # of 255
IMBALANCE = 10  # times as many pictures in the largest class as in the smallest
FEW = 20  # pictures of a class outside the official test part
SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Problem:
    """A problem of a data set.

    Attributes:
        kind: short name, such as "unreadable".
        blocks: whether a network cannot be trained before it is solved.
        text: what was found, and what to do.
        files: the pictures concerned; pairs are joined by " = ".
    """

    kind: str
    blocks: bool
    text: str
    files: tuple[str, ...] = ()


def find_problems(
    data: DataSet, scan: PictureScan, near_duplicates: NDArray[np.int64] | None = None
) -> tuple[Problem, ...]:
    """The problems of a data set, those that block training first.

    Args:
        data: the data set.
        scan: of its pictures.
        near_duplicates: pairs of pictures that look alike, (P, 2) int64 indices; None = not compared.
    """
    identical = _identical_pairs(scan)
    pairs = identical if near_duplicates is None else np.unique(np.concatenate([identical, near_duplicates]), axis=0)
    kinds = (
        _unreadable(data, scan),
        _two_classes(data, pairs),
        _across_parts(data, pairs),
        _copies(data, identical),
        _tiny(data, scan),
        _dark(data, scan),
        _blank(data, scan),
        _few(data),
        _imbalance(data),
        _similar_names(data),
        _skipped(data),
    )
    return tuple(problem for problems in kinds for problem in problems)


def official_parts(data: DataSet) -> dict[str, NDArray[np.int64]]:
    """Indices of the parts that the authors of a data set defined; without any, all indices as "all"."""
    everything = np.arange(len(data), dtype=np.int64)
    if data.official_test is None:
        return {"all": everything}
    parts = {"val": data.official_val, "test": data.official_test}
    held_out = {name: part for name, part in parts.items() if part is not None}
    return {"train": np.setdiff1d(everything, np.concatenate(list(held_out.values())))} | held_out


def _unreadable(data: DataSet, scan: PictureScan) -> Iterator[Problem]:
    if scan.errors:
        reasons = listed(list(scan.errors.values()), SHOWN, separator="; ")
        text = f"{_count(scan.errors, 'picture')} that cannot be read: {reasons}: remove or replace what is named"
        yield Problem("unreadable", True, text, _names(data, scan.errors))


def _two_classes(data: DataSet, pairs: NDArray[np.int64]) -> Iterator[Problem]:
    apart = pairs[data.labels[pairs[:, 0]] != data.labels[pairs[:, 1]]]
    if len(apart):
        pairs_shown = f"{_count(apart, 'pair')}: {_shown_pairs(data, apart)}"
        text = f"the same picture in two classes, {pairs_shown}: keep it in one class"
        yield Problem("contradictory labels", False, text, _pair_names(data, apart))


def _across_parts(data: DataSet, pairs: NDArray[np.int64]) -> Iterator[Problem]:
    parts = _part_of(data)
    across = pairs[parts[pairs[:, 0]] != parts[pairs[:, 1]]]
    if len(across):
        text = (
            f"copies or near-duplicates in different parts ({', '.join(official_parts(data))}), "
            f"{_count(across, 'pair')}: {_shown_pairs(data, across)}: the test accuracy will be too high"
        )
        yield Problem("copies across parts", False, text, _pair_names(data, across))


def _copies(data: DataSet, identical: NDArray[np.int64]) -> Iterator[Problem]:
    """Copies in one part and class: the others are problems of their own."""
    parts = _part_of(data)
    first, second = identical.T
    copies = identical[(parts[first] == parts[second]) & (data.labels[first] == data.labels[second])]
    if len(copies):
        text = f"{_count(copies, 'picture')} with the content of another one: {_shown_pairs(data, copies)}"
        yield Problem("copies", False, text, _pair_names(data, copies))


def _tiny(data: DataSet, scan: PictureScan) -> Iterator[Problem]:
    sides = np.asarray([min(picture.size) for picture in scan.pictures])
    if not len(sides):
        return
    limit = min(max(TINY_SIDE, TINY_SHARE * float(np.median(sides))), float(np.median(sides)))
    tiny = scan.index[sides < limit]
    if len(tiny):
        text = f"{_count(tiny, 'picture')} with a side below {limit:.0f} pixels: {_shown(data, tiny)}"
        yield Problem("tiny", False, text, _names(data, tiny))


def _dark(data: DataSet, scan: PictureScan) -> Iterator[Problem]:
    brighter = 1 << (16 - (grey_bits(scan) or 16))
    dark = scan.index[
        [
            picture.darkest < picture.brightest * (brighter if picture.mode.startswith("I") else 1) <= DARK
            for picture in scan.pictures
        ]
    ]
    if len(dark):
        text = (
            f"{_count(dark, 'picture')} with no value above {DARK} of 255, nearly black: {_shown(data, dark)}: "
            "multiply values of 12 bits in 16-bit files by 16, so that white is 65535"
        )
        yield Problem("dark", False, text, _names(data, dark))


def _blank(data: DataSet, scan: PictureScan) -> Iterator[Problem]:
    blank = scan.index[[picture.darkest == picture.brightest for picture in scan.pictures]]
    if len(blank):
        text = f"{_count(blank, 'picture')} of a single colour: {_shown(data, blank)}"
        yield Problem("blank", False, text, _names(data, blank))


def _few(data: DataSet) -> Iterator[Problem]:
    counts = _class_counts(data)
    few = [label for label in np.argsort(counts, kind="stable").tolist() if counts[label] < FEW]
    if few:
        shown = listed(few, SHOWN, lambda label: f"{printable(data.classes[label])} {counts[label]}")
        text = f"classes with fewer than {FEW} pictures to train with, {len(few)}: {shown}: add pictures"
        yield Problem("few pictures", False, text)


def _imbalance(data: DataSet) -> Iterator[Problem]:
    counts = _class_counts(data)
    small, large = int(counts.argmin()), int(counts.argmax())
    if counts[large] > IMBALANCE * counts[small]:
        text = (
            f"the class {printable(data.classes[large])} has {counts[large]:,} pictures, "
            f"{printable(data.classes[small])} {counts[small]:,}: the accuracy of small classes will be lower than the "
            "mean"
        )
        yield Problem("imbalance", False, text)


def _similar_names(data: DataSet) -> Iterator[Problem]:
    spellings = defaultdict(list)
    for name in data.classes:
        spellings["".join(filter(str.isalnum, name.casefold()))].append(name)
    alike = [names for spelling, names in spellings.items() if spelling and len(names) > 1]
    if alike:
        shown = "; ".join(" and ".join(map(repr, names)) for names in alike[:SHOWN])
        yield Problem("similar names", False, f"class names differ in case, spaces or signs only: {shown}")


def _skipped(data: DataSet) -> Iterator[Problem]:
    if data.skipped:
        counts = sorted(data.skipped.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{count:,} {printable(reason)}" for reason, count in counts)
        yield Problem("skipped", False, f"skipped, because they are no pictures of a class: {shown}")


def _class_counts(data: DataSet) -> NDArray[np.int64]:
    """Pictures of each class outside the official test part, (C,)."""
    labels = data.labels if data.official_test is None else np.delete(data.labels, data.official_test)
    return np.bincount(labels, minlength=len(data.classes))


def _part_of(data: DataSet) -> NDArray[np.int64]:
    """Number of the official part of each picture, (N,)."""
    numbers = np.zeros(len(data), np.int64)
    for number, part in enumerate(official_parts(data).values()):
        numbers[part] = number
    return numbers


def _identical_pairs(scan: PictureScan) -> NDArray[np.int64]:
    """Pairs (P, 2) of pictures with the same content: each copy with the first of its kind."""
    first: dict[bytes, int] = {}
    pairs = []
    for i, picture in zip(scan.index.tolist(), scan.pictures, strict=True):
        original = first.setdefault(picture.digest, i)
        if original != i:
            pairs.append((original, i))
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def _count(found: Sized, noun: str) -> str:
    return f"{len(found):,} {noun}{'s' if len(found) != 1 else ''}"


def _names(data: DataSet, index: Iterable[int]) -> tuple[str, ...]:
    images = data.images
    if isinstance(images, FileImages):
        return tuple(images.names[i] for i in index)
    return tuple(images.name(int(i)) for i in index)


def _pair_names(data: DataSet, pairs: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(" = ".join(_names(data, pair)) for pair in pairs.tolist())


def _shown(data: DataSet, index: NDArray[np.int64]) -> str:
    return listed(_names(data, index.tolist()), SHOWN, printable)


def _shown_pairs(data: DataSet, pairs: NDArray[np.int64]) -> str:
    return listed(_pair_names(data, pairs), SHOWN, printable)

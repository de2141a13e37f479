"""The report of a data set: classes, counts, sizes, modes, groups, splits and problems."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mexit.core.progress import Progress
from mexit.data.dataset import DataSet
from mexit.data.dataset_problems import Problem, find_problems, official_parts
from mexit.data.groups import Grouping, find_groups
from mexit.data.near_duplicates import near_duplicates, thumbnails
from mexit.data.picture_scan import PictureScan, grey_bits, scan_pictures
from mexit.data.splits import NAMES, few_calibrate, few_groups, split
from mexit.errors import BadInput


@dataclass(frozen=True)
class Sizes:
    """Height and width in pixels: of the picture with the fewest and with the most pixels, and the median of each."""

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds.

    Attributes:
        name: as typed after `--data`.
        pictures: number of pictures.
        classes: names, (C,).
        counts: pictures of each class, (C,), by part: "all", or the parts "train", "val" and "test" of the set.
        sizes: None if no picture can be read.
        modes: number of pictures by Pillow's mode.
        grey_bits: bits that grey values of 16-bit files use; None without such files.
        skipped: entries of a folder that are no pictures of a class, by suffix or reason.
        groups: how many groups were found and how, and whether some reach into the test part.
        splits: pictures of each split that training would make; empty if it cannot.
        problems: those that block training first.
    """

    name: str
    pictures: int
    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    sizes: Sizes | None
    modes: Mapping[str, int]
    grey_bits: int | None
    skipped: Mapping[str, int]
    groups: str
    splits: Mapping[str, int]
    problems: tuple[Problem, ...]

    @property
    def blocked(self) -> bool:
        """Whether a problem blocks training."""
        return any(problem.blocks for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        value: dict[str, Any] = asdict(self)
        return value


def report_data_set(data: DataSet, group: str, progress: Progress | None = None) -> DatasetReport:
    """Read every picture of a data set and report what it holds.

    Args:
        data: the data set.
        group: how groups are found, see `groups.find_groups`.
        progress: shows the number of pictures.

    Raises:
        UsageError: `group` does not fit the data set.
        MissingExtra: Pillow is not installed.
    """
    scan = scan_pictures(data, progress=progress)
    pairs = near_duplicates(thumbnails(data.images, len(data), data.sha256, progress))
    grouping = find_groups(data, group, progress)
    splits, groups, blocking = _splits(data, grouping)
    problems = (*blocking, *find_problems(data, scan, pairs))
    return DatasetReport(
        name=data.name,
        pictures=len(data),
        classes=data.classes,
        counts={
            name: tuple(np.bincount(data.labels[part], minlength=len(data.classes)).tolist())
            for name, part in official_parts(data).items()
        },
        sizes=_sizes(scan),
        modes=dict(Counter(picture.mode for picture in scan.pictures).most_common()),
        grey_bits=grey_bits(scan),
        skipped=data.skipped,
        groups=groups,
        splits=splits,
        problems=tuple(sorted(problems, key=lambda problem: not problem.blocks)),
    )


def _splits(data: DataSet, grouping: Grouping | None) -> tuple[dict[str, int], str, tuple[Problem, ...]]:
    """Pictures of each split, the sentence about groups, and the problems of the division."""
    try:
        splits = split(data, grouping)
    except BadInput as error:
        return {}, "" if grouping is None else grouping.how, (Problem("no splits", True, str(error)),)
    found = {"few to calibrate": few_calibrate(splits), "few groups": few_groups(data, splits)}
    problems = tuple(Problem(kind, False, text) for kind, text in found.items() if text)
    return {name: len(splits.parts[name]) for name in NAMES}, splits.grouping, problems


def _sizes(scan: PictureScan) -> Sizes | None:
    if not scan.pictures:
        return None
    sizes = sorted((picture.size for picture in scan.pictures), key=lambda size: size[0] * size[1])
    height, width = (round(statistics.median(size[axis] for size in sizes)) for axis in (0, 1))
    return Sizes(sizes[0], (height, width), sizes[-1])

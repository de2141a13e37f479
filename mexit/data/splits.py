"""Five disjoint splits of a data set, stored as index lists.

    train          fits the weights
    selection      selects checkpoints and hyper-parameters
    calibration    selects temperatures, the score and the thresholds
    certification  measures what a budget promises; selects nothing but the thresholds of the reject option
    test           is measured by export, calibrate, evaluate and demo; selects nothing

All splits have the same class frequencies. They depend on the data set, its groups and the seed of the split, not on a
training seed. Pictures of one group (one object, film or burst) lie in one split (`data.groups`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes, read_npz, sha256_bytes, to_npz
from mexit.core.bundle import Bundle
from mexit.core.printable import listed, printable
from mexit.core.schema import decode
from mexit.core.trace import MIN_SAMPLES
from mexit.data.dataset import DataSet
from mexit.data.grouped_split import SHARES, SHARES_WITH_TEST, divide_groups
from mexit.data.groups import Grouping, without_groups_of_test
from mexit.errors import BadInput, Damaged, UsageError

NAMES = ("train", "selection", "calibration", "certification", "test")
MAX_BYTES = 1 << 30
_SEED = 20231106

# Fractions of the official training part, or of what remains after the test split.
_SHARES = {"selection": 0.04, "calibration": 0.08, "certification": 0.08}
_SMALL_SHARES = {"selection": 0.06, "calibration": 0.18, "certification": 0.06}
_SMALL = 5_000  # images
# Pictures of a user, in which no groups were found: a bound of 5 % errors needs some 150 pictures to be certified.
_OWN_SHARES = {"selection": 0.06, "calibration": 0.14, "certification": 0.14}
_TEST_SHARE = 0.25
_MOST_CALIBRATE = 1 / 3  # of the images outside the test part, to reach `MIN_SAMPLES`
FEW_GROUPS = 5  # of a class in the training split
_SHOWN = 3  # classes in a sentence


@dataclass(frozen=True)
class Splits:
    """The five splits of one data set.

    Attributes:
        data_set, data_sha256: name and hash of the data set.
        parts: sorted indices (n,) int64 of each split, by name.
        groups: group id of each sample of the data set, (N,) int64, or None without groups.
        grouping: how many groups were found and how, one sentence; "" without a search.
        fingerprints: of the picture of each sample, (N,) uint64, see `known_pictures`; None if they are not stored.
    """

    data_set: str
    data_sha256: str
    parts: dict[str, NDArray[np.int64]]
    groups: NDArray[np.int64] | None = None
    grouping: str = ""
    fingerprints: NDArray[np.uint64] | None = None

    def __post_init__(self) -> None:
        if tuple(self.parts) != NAMES:
            raise BadInput(f"splits must be {NAMES}, found {tuple(self.parts)}")
        if any(part.ndim != 1 or part.dtype != np.int64 for part in self.parts.values()):
            types = ", ".join(f"{part.dtype} {part.shape}" for part in self.parts.values())
            raise BadInput(f"splits must be lists of int64, found {types}")
        indices = np.concatenate(list(self.parts.values()))
        if len(np.unique(indices)) != len(indices):
            raise BadInput("the five splits overlap")
        if self.groups is not None and (self.groups.ndim != 1 or self.groups.dtype != np.int64):
            raise BadInput(f"group ids must be int64 (N,), found {self.groups.dtype} {self.groups.shape}")
        prints = self.fingerprints
        if prints is not None and (prints.ndim != 1 or prints.dtype != np.uint64):
            raise BadInput(f"fingerprints must be uint64 (N,), found {prints.dtype} {prints.shape}")

    def groups_of(self, index: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The group ids of the samples at some indices, or None without groups."""
        return None if self.groups is None else self.groups[index]

    def part(self, name: str) -> NDArray[np.int64]:
        """The indices of one split. Raises `UsageError` for an unknown name."""
        if name not in self.parts:
            raise UsageError(f"unknown split '{name}': choose from {', '.join(NAMES)}")
        return self.parts[name]

    def thinned(self, data: DataSet, fraction: float, omit_class: str | None) -> Splits:
        """Splits with fewer training images; the other four are unchanged.

        Args:
            data: the data set that was split.
            fraction: fraction of the training split to keep, the same of every class.
            omit_class: name of a class without training images, or None.

        Raises:
            UsageError: the class does not exist, or no training image is left.
        """
        train = self.parts["train"]
        if omit_class is not None:
            if omit_class not in data.classes:
                raise UsageError(f"no class '{omit_class}' in {data.name}: choose from {', '.join(data.classes[:20])}")
            train = train[data.labels[train] != data.classes.index(omit_class)]
        if fraction < 1:
            shuffled = _stratified_shuffle(train, data.labels, np.random.default_rng(_SEED))
            train = shuffled[: round(fraction * len(train))]
        if not len(train):
            raise UsageError(f"--fraction {fraction} leaves no training image of {data.name}: choose a larger one")
        return replace(self, parts={**self.parts, "train": np.sort(train)})

    def hashes(self) -> dict[str, str]:
        """sha256 of the indices of each split."""
        return {name: sha256_bytes(np.ascontiguousarray(part).tobytes()) for name, part in self.parts.items()}

    def check(self, data: DataSet) -> None:
        """Raise `Damaged` unless `data` is the data set that was split."""
        if data.sha256 != self.data_sha256:
            raise Damaged(
                f"these splits belong to {self.data_set} {self.data_sha256[:12]}, but the loaded data set is "
                f"{data.name} {data.sha256[:12]}: it was changed, or is another one"
            )
        indices = np.concatenate(list(self.parts.values()))
        if indices.size and not 0 <= indices.min() <= indices.max() < len(data):
            raise Damaged(
                f"these splits have the indices {indices.min()} to {indices.max()}, {data.name} has {len(data)} images"
            )
        for what, array in (("group ids", self.groups), ("fingerprints", self.fingerprints)):
            if array is not None and len(array) != len(data):
                raise Damaged(f"these splits have {len(array)} {what}, {data.name} has {len(data)} images")

    def to_bytes(self) -> bytes:
        """The npz file."""
        about = {"data_set": self.data_set, "data_sha256": self.data_sha256}
        if self.grouping:
            about["grouping"] = self.grouping
        optional = {"groups": self.groups, "fingerprints": self.fingerprints}
        stored = {name: array for name, array in optional.items() if array is not None}
        return to_npz(about=about, **self.parts, **stored)

    @staticmethod
    def from_bytes(content: bytes, path: Path) -> Splits:
        """Parse the content of the splits file `path`. Raises `Damaged`."""
        try:
            arrays = read_npz(content, MAX_BYTES)
            about = decode(json.loads(arrays["about"].tobytes()), Mapping[str, str], "about")
            parts = {name: arrays[name] for name in NAMES}
            optional = (arrays.get("groups"), about.get("grouping", ""), arrays.get("fingerprints"))
            return Splits(about["data_set"], about["data_sha256"], parts, *optional)
        except KeyError as error:
            raise Damaged(f"splits {path} have no {error}") from None
        except (ValueError, RecursionError, BadInput, Damaged) as error:
            raise Damaged(f"splits {path} are not readable: {error}") from None

    @staticmethod
    def of_bundle(bundle: Bundle) -> Splits:
        """The splits stored in a bundle. Raises `Damaged`, and `UsageError` if it stores none."""
        stored = bundle.manifest.splits
        if stored is None:
            raise UsageError(
                f"{bundle.path} stores no splits, so it is not known which images calibrate and which test it; "
                "mexit calibrate takes other images with --data"
            )
        return Splits.from_bytes(bundle.content(stored.file.file), bundle.path / stored.file.file)

    @staticmethod
    def load(path: Path) -> Splits:
        """Read a splits file. Raises `NotFound`, `Damaged`."""
        return Splits.from_bytes(read_bytes(path, "splits", MAX_BYTES), path)


def split(data: DataSet, grouping: Grouping | None = None, seed: int = 0) -> Splits:
    """Split a data set into the five parts.

    Args:
        data: the data set; its official test part, if there is one, is the test split.
        grouping: groups that must not be divided; groups of one sample each = samples are divided, with more of them
            for certification; None = no groups were looked for.
        seed: another seed draws other splits; an official test part stays.

    Raises:
        BadInput: a split would lack a class; with groups, `train` or `test` would lack one, or a split be empty.
    """
    rng = np.random.default_rng([_SEED, seed] if seed else _SEED)
    if grouping is None or not grouping.has_groups:
        parts = _divide_samples(data, rng, _SMALL_SHARES if grouping is None else _OWN_SHARES)
        _check_classes(data, parts)
        return _splits(data, parts, None, "" if grouping is None else grouping.how)
    if len(grouping.ids) != len(data):
        raise BadInput(f"{data.name} has {len(data)} images, found {len(grouping.ids)} group ids")
    parts, sentence = _divide_groups(data, grouping, rng)
    _check_classes(data, {name: parts[name] for name in ("train", "test")}, grouping.ids)
    _check_not_empty(data, parts, grouping)
    return _splits(data, parts, grouping.ids, f"{grouping.how}{sentence}")


def few_calibrate(splits: Splits) -> str:
    """What to do about a calibration split that is too small to set thresholds; "" if it is not."""
    count = len(splits.part("calibration"))
    if count >= MIN_SAMPLES:
        return ""
    return (
        f"the calibration split has {count} images, and mexit export and calibrate need {MIN_SAMPLES} to set "
        "thresholds: add images, or calibrate on other ones (mexit export --no-calibrate, then mexit calibrate --data)"
    )


def few_groups(data: DataSet, splits: Splits) -> str:
    """The classes whose training pictures belong to few groups, and what to do; "" without such classes or groups."""
    train = splits.part("train")
    groups = splits.groups_of(train)
    if groups is None:
        return ""
    of_class = [len(np.unique(groups[data.labels[train] == label])) for label in range(len(data.classes))]
    few = [label for label in np.argsort(of_class, kind="stable").tolist() if of_class[label] < FEW_GROUPS]
    if not few:
        return ""
    shown = listed(few, _SHOWN, lambda label: f"{printable(data.classes[label])} {of_class[label]}")
    return (
        f"classes with fewer than {FEW_GROUPS} groups (objects, films or bursts) to train with, {len(few)}: {shown}: "
        "new objects of these classes will hardly be recognised; add pictures of other objects"
    )


def _splits(
    data: DataSet, parts: dict[str, NDArray[np.int64]], groups: NDArray[np.int64] | None, grouping: str
) -> Splits:
    return Splits(data.name, data.sha256, {name: np.sort(parts[name]) for name in NAMES}, groups, grouping)


def _divide_samples(
    data: DataSet, rng: np.random.Generator, small_shares: Mapping[str, float]
) -> dict[str, NDArray[np.int64]]:
    """The parts; `small_shares` are those of a data set below `_SMALL` images."""
    indices = np.arange(len(data), dtype=np.int64)
    if data.official_test is None:
        order = _stratified_shuffle(indices, data.labels, rng)
        n_test = round(_TEST_SHARE * len(order))
        test, rest = order[:n_test], order[n_test:]
    else:
        test = data.official_test
        rest = _stratified_shuffle(np.setdiff1d(indices, test), data.labels, rng)
    parts = {"test": test}
    start = 0
    for name, share in (small_shares if len(rest) < _SMALL else _SHARES).items():
        count = max(1, round(share * len(rest)))
        if name == "calibration":
            count = max(count, min(MIN_SAMPLES, int(_MOST_CALIBRATE * len(rest))))
        stop = start + count
        parts[name] = rest[start:stop]
        start = stop
    parts["train"] = rest[start:]
    return parts


def _divide_groups(
    data: DataSet, grouping: Grouping, rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.int64]], str]:
    """The parts, and what the sentence about the groups adds where groups reach into the official test part."""
    if data.official_test is None:
        return divide_groups(data.labels, grouping.ids, SHARES_WITH_TEST, rng), ""
    rest, sentence = without_groups_of_test(data, grouping)
    parts = divide_groups(data.labels[rest], grouping.ids[rest], SHARES, rng)
    return {"test": data.official_test} | {name: rest[positions] for name, positions in parts.items()}, sentence


def _stratified_shuffle(
    indices: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """A random order in which every contiguous range has the same class frequencies."""
    indices = rng.permutation(indices)
    rank, labels = np.zeros(len(indices)), labels[indices]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return indices[np.argsort(rank, kind="stable")]


def _check_not_empty(data: DataSet, parts: dict[str, NDArray[np.int64]], grouping: Grouping) -> None:
    empty = [name for name, indices in parts.items() if not len(indices)]
    if empty:
        raise BadInput(
            f"{data.name}: {len(np.unique(grouping.ids))} groups of images in {len(data.classes)} classes are too few "
            f"for five splits ({', '.join(empty)} would be empty), because a group stays in one split: add images of "
            "other objects (seven for each class are enough), or divide images one by one with --group none"
        )


def _check_classes(data: DataSet, parts: dict[str, NDArray[np.int64]], groups: NDArray[np.int64] | None = None) -> None:
    for name, indices in parts.items():
        present = np.unique(data.labels[indices])
        if len(present) < len(data.classes):
            missing = sorted(set(range(len(data.classes))) - set(present.tolist()))
            remedy = "add images of these classes"
            if groups is not None:
                counts = [len(np.unique(groups[data.labels == label])) for label in missing[:5]]
                remedy = (
                    f"these classes have {', '.join(map(str, counts))} group(s) of images, and a group stays in one "
                    "split: add images of other objects, or name the groups with --group"
                )
            raise BadInput(
                f"{data.name}: the split '{name}' ({len(indices)} images) would have no image of "
                f"{', '.join(data.classes[label] for label in missing[:5])}: {remedy}"
            )

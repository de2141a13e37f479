"""Five disjoint splits of a data set, stored as index lists.

    train          fits the weights
    selection      selects checkpoints and hyper-parameters
    calibration    selects temperatures, the score and the thresholds
    certification  measures what a budget promises; selects nothing
    test           is printed by evaluate and demo; selects nothing

All splits have the same class frequencies. They depend on the data set only, not on a training seed, so a data set has
one test split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes, read_npz, sha256_bytes, to_npz
from mexit.core.bundle import Bundle
from mexit.core.schema import decode
from mexit.data.dataset import DataSet
from mexit.errors import BadInput, Damaged, UsageError

NAMES = ("train", "selection", "calibration", "certification", "test")
MAX_BYTES = 1 << 30
_SEED = 20231106

# Fractions of the official training part, or of what remains after the test split.
_SHARES = {"selection": 0.04, "calibration": 0.08, "certification": 0.08}
_SMALL_SHARES = {"selection": 0.06, "calibration": 0.18, "certification": 0.06}
_SMALL = 5_000  # images
_TEST_SHARE = 0.25


@dataclass(frozen=True)
class Splits:
    """The five splits of one data set.

    Attributes:
        data_set, data_sha256: name and hash of the data set.
        parts: sorted indices (n,) int64 of each split, by name.
    """

    data_set: str
    data_sha256: str
    parts: dict[str, NDArray[np.int64]]

    def __post_init__(self) -> None:
        if tuple(self.parts) != NAMES:
            raise BadInput(f"splits must be {NAMES}, found {tuple(self.parts)}")
        if any(part.ndim != 1 or part.dtype != np.int64 for part in self.parts.values()):
            types = ", ".join(f"{part.dtype} {part.shape}" for part in self.parts.values())
            raise BadInput(f"splits must be lists of int64, found {types}")
        indices = np.concatenate(list(self.parts.values()))
        if len(np.unique(indices)) != len(indices):
            raise BadInput("the five splits overlap")

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
        return Splits(self.data_set, self.data_sha256, {**self.parts, "train": np.sort(train)})

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

    def to_bytes(self) -> bytes:
        """The npz file."""
        return to_npz(about={"data_set": self.data_set, "data_sha256": self.data_sha256}, **self.parts)

    @staticmethod
    def from_bytes(content: bytes, path: Path) -> Splits:
        """Parse the content of the splits file `path`. Raises `Damaged`."""
        try:
            arrays = read_npz(content, MAX_BYTES)
            about = decode(json.loads(arrays["about"].tobytes()), Mapping[str, str], "about")
            return Splits(about["data_set"], about["data_sha256"], {name: arrays[name] for name in NAMES})
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


def split(data: DataSet) -> Splits:
    """Split a data set into the five parts. Raises `BadInput` if a split would lack a class."""
    rng = np.random.default_rng(_SEED)
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
    for name, share in (_SMALL_SHARES if len(rest) < _SMALL else _SHARES).items():
        stop = start + max(1, round(share * len(rest)))
        parts[name] = rest[start:stop]
        start = stop
    parts["train"] = rest[start:]
    _check_classes(data, parts)
    return Splits(data.name, data.sha256, {name: np.sort(parts[name]) for name in NAMES})


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


def _check_classes(data: DataSet, parts: dict[str, NDArray[np.int64]]) -> None:
    for name, indices in parts.items():
        present = np.unique(data.labels[indices])
        if len(present) < len(data.classes):
            missing = sorted(set(range(len(data.classes))) - set(present.tolist()))
            raise BadInput(
                f"{data.name}: the split '{name}' ({len(indices)} images) would have no image of "
                f"{', '.join(data.classes[label] for label in missing[:5])}: add images of these classes"
            )

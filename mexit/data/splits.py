"""Five disjoint parts of a data set, stored by index.

    train          weights
    selection      checkpoints and hyper-parameters
    calibration    temperatures, choice of score, thresholds
    certification  what is promised is measured here, and nothing is chosen
    test           printed by evaluate and demo; nothing is ever chosen on it

Every part holds every class in the same share. The cut depends on the data set alone, never on a training
seed: one data set has one test part.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.core.atomic_io import read_bytes, read_npz, sha256_bytes
from mexit.core.manifest import read_value
from mexit.data.dataset import DataSet
from mexit.errors import BadInput, Damaged, UsageError

NAMES = ("train", "selection", "calibration", "certification", "test")
MAX_BYTES = 1 << 30
_SEED = 20231106

# Shares of the official training part; digits is small and has no official test part.
_SHARES = {"selection": 0.04, "calibration": 0.08, "certification": 0.08}
_SMALL_SHARES = {"selection": 0.06, "calibration": 0.18, "certification": 0.06}
_SMALL = 5_000
_TEST_SHARE = 0.25


@dataclass(frozen=True)
class _About:
    """What a splits file says of its data set."""

    data_set: str
    data_sha256: str


@dataclass(frozen=True)
class Splits:
    """The five index lists of one data set.

    Attributes:
        data_set: its name.
        data_sha256: its hash.
        parts: name to sorted places (n,) int64.
    """

    data_set: str
    data_sha256: str
    parts: dict[str, NDArray[np.int64]]

    def __post_init__(self) -> None:
        if tuple(self.parts) != NAMES:
            raise BadInput(f"splits must be {NAMES}, found {tuple(self.parts)}")
        if any(part.ndim != 1 or part.dtype != np.int64 for part in self.parts.values()):
            found = ", ".join(f"{part.dtype} {part.shape}" for part in self.parts.values())
            raise BadInput(f"splits must be lists of int64, found {found}")
        everyone = np.concatenate(list(self.parts.values()))
        if len(np.unique(everyone)) != len(everyone):
            raise BadInput("the five splits overlap")

    def part(self, name: str) -> NDArray[np.int64]:
        """The places of one part."""
        if name not in self.parts:
            raise UsageError(f"unknown split '{name}': choose from {', '.join(NAMES)}")
        return self.parts[name]

    def thinned(self, data: DataSet, fraction: float, omit_class: str | None) -> Splits:
        """The same parts with less to train on; the other four stay as they are.

        Args:
            data: the set that was split.
            fraction: share of the training part to keep; every class keeps the same share.
            omit_class: a class, by name, of which no training image is kept.

        Raises:
            UsageError: no such class, or nothing left.
        """
        train = self.parts["train"]
        if omit_class is not None:
            if omit_class not in data.classes:
                raise UsageError(
                    f"no class '{omit_class}' in {data.name}: choose from {', '.join(data.classes[:20])}"
                )
            train = train[data.labels[train] != data.classes.index(omit_class)]
        if fraction < 1:
            train = _shuffle(train, data.labels, np.random.default_rng(_SEED))[: round(fraction * len(train))]
        if not len(train):
            raise UsageError(f"--fraction {fraction} leaves nothing of {data.name} to train on")
        return Splits(self.data_set, self.data_sha256, {**self.parts, "train": np.sort(train)})

    def hashes(self) -> dict[str, str]:
        """sha256 of each part's indices."""
        return {name: sha256_bytes(np.ascontiguousarray(part).tobytes()) for name, part in self.parts.items()}

    def check(self, data: DataSet) -> None:
        """Raise `Damaged` if `data` is not the set that was split, or has fewer images than are split."""
        if data.sha256 != self.data_sha256:
            raise Damaged(
                f"these splits belong to {self.data_set} {self.data_sha256[:12]}, "
                f"the data at hand is {data.name} {data.sha256[:12]}: it was changed, or is another set"
            )
        everyone = np.concatenate(list(self.parts.values()))
        if everyone.size and not 0 <= everyone.min() <= everyone.max() < len(data):
            raise Damaged(
                f"these splits name images {everyone.min()} to {everyone.max()}, {data.name} has {len(data)}"
            )

    def to_bytes(self) -> bytes:
        """As npz without pickle."""
        about = json.dumps(asdict(_About(self.data_set, self.data_sha256)))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.frombuffer(about.encode(), np.uint8), **self.parts)  # type: ignore[arg-type]
        return buffer.getvalue()

    @staticmethod
    def from_bytes(content: bytes, path: Path) -> Splits:
        """Parse splits that were read from `path`. Raises `Damaged`."""
        try:
            arrays = read_npz(content, MAX_BYTES)
            about = read_value(json.loads(arrays["about"].tobytes()), _About, "about")
            return Splits(about.data_set, about.data_sha256, {name: arrays[name] for name in NAMES})
        except KeyError as error:
            raise Damaged(f"splits {path} hold no {error}") from None
        except (ValueError, RecursionError, BadInput, Damaged) as error:
            raise Damaged(f"splits {path} are not readable: {error}") from None

    @staticmethod
    def load(path: Path) -> Splits:
        """Read a splits file. Raises `NotFound`, `Damaged`."""
        return Splits.from_bytes(read_bytes(path, "splits", MAX_BYTES), path)


def split(data: DataSet) -> Splits:
    """Cut a data set into the five parts. Raises `BadInput` if a class is too rare to be in all of them."""
    rng = np.random.default_rng(_SEED)
    everyone = np.arange(len(data), dtype=np.int64)
    if data.official_test is None:
        order = _shuffle(everyone, data.labels, rng)
        at = round(_TEST_SHARE * len(order))
        test, rest = order[:at], order[at:]
    else:
        test = data.official_test
        rest = _shuffle(np.setdiff1d(everyone, test), data.labels, rng)
    parts = {"test": test}
    start = 0
    for name, share in (_SMALL_SHARES if len(rest) < _SMALL else _SHARES).items():
        stop = start + max(1, round(share * len(rest)))
        parts[name] = rest[start:stop]
        start = stop
    parts["train"] = rest[start:]
    _check_classes(data, parts)
    return Splits(data.name, data.sha256, {name: np.sort(parts[name]) for name in NAMES})


def _shuffle(places: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order in which every stretch holds the classes in the same share."""
    places = rng.permutation(places)
    rank, present = np.zeros(len(places)), labels[places]
    for label in np.unique(present):
        members = np.flatnonzero(present == label)
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return places[np.argsort(rank, kind="stable")]


def _check_classes(data: DataSet, parts: dict[str, NDArray[np.int64]]) -> None:
    for name, places in parts.items():
        present = np.unique(data.labels[places])
        if len(present) < len(data.classes):
            missing = sorted(set(range(len(data.classes))) - set(present.tolist()))
            raise BadInput(
                f"{data.name}: the split '{name}' ({len(places)} images) would hold no image of "
                f"{', '.join(data.classes[label] for label in missing[:5])}: add images of these classes"
            )

"""Recognise the pictures of a folder by their content after it was changed, so that none that trained calibrates.

The fingerprint of a picture covers the size of its file and the bytes in its middle. It stays the same where a picture
is moved or renamed, and changes where it is edited.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mexit.data.dataset import DataSet, FileImages, ImageStore
from mexit.data.read_threads import map_on_threads
from mexit.data.splits import NAMES, Splits
from mexit.errors import BadInput

MAX_KNOWN = 100_000  # pictures of a folder whose fingerprints a run stores; each file has to be read for it
MIDDLE_BYTES = 16 << 10
UNKNOWN = len(NAMES)
_TRAINED = 2  # the first splits in `NAMES`, which choose the weights


def fingerprints(images: FileImages) -> NDArray[np.uint64]:
    """The fingerprint of each picture, (N,); 0 for a file that cannot be read."""
    index = np.arange(len(images.names), dtype=np.int64)
    read = map_on_threads(lambda i: _fingerprint(images.root / images.names[i]), index)
    return np.fromiter(read, np.uint64, len(index))


def known_splits(images: ImageStore, stored: Splits) -> NDArray[np.int64] | None:
    """The stored split of each picture.

    Args:
        images: N pictures.
        stored: splits of the pictures that a network was trained with.

    Returns:
        The number of the split in `NAMES`, the first one for a picture with copies in several; `UNKNOWN` for other
        pictures; (N,). None if the pictures are not files, or the splits store no fingerprints.
    """
    if not isinstance(images, FileImages) or stored.fingerprints is None:
        return None
    split_of = np.full(len(stored.fingerprints), UNKNOWN)
    for number, name in enumerate(NAMES):
        split_of[stored.parts[name]] = number
    order = np.lexsort((split_of, stored.fingerprints))
    keys = stored.fingerprints[order]
    own = fingerprints(images)
    places = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
    return np.where((keys[places] == own) & (own != 0), split_of[order][places], UNKNOWN)


def groups_that_trained(known: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids of the groups with a picture that trained, sorted.

    Args:
        known: of N pictures, see `known_splits`.
        groups: group id of each, (N,).
    """
    return np.unique(groups[known < _TRAINED])


def keep_known(data: DataSet, fresh: Splits, stored: Splits) -> tuple[Splits, str]:
    """Put each known picture, and its group, into its stored split. The official test part stays.

    Args:
        data: a data set that was changed, or another one.
        fresh: its splits, drawn anew.
        stored: splits of the pictures that a network was trained with.

    Returns:
        The splits, and what was done, one sentence; "" if no picture is known.

    Raises:
        BadInput: no picture is left for calibration or certification.
    """
    known = known_splits(data.images, stored)
    if known is None or (known == UNKNOWN).all():
        return fresh, ""
    split_of = np.full(len(data), UNKNOWN)
    for number, name in enumerate(NAMES):
        split_of[fresh.parts[name]] = number
    groups = np.arange(len(data)) if fresh.groups is None else fresh.groups
    of_group = np.full(int(groups.max()) + 1, UNKNOWN)
    np.minimum.at(of_group, groups, known)
    own = of_group[groups]
    trained = own < _TRAINED
    tested = np.zeros(len(data), bool) if data.official_test is None else _mask(len(data), data.official_test)
    split_of = np.where(trained | (~tested & (own < UNKNOWN)), own, split_of)
    parts = {name: np.flatnonzero(split_of == number) for number, name in enumerate(NAMES)}
    count = int((known < UNKNOWN).sum())
    sentence = (
        f"{count:,} of the {len(data):,} pictures of {data.name} are known from the training and keep their split; "
        f"{int(trained.sum()):,} of these, or of their groups, trained the network and neither calibrate nor test it"
    )
    empty = [name for name in ("calibration", "certification") if not len(parts[name])]
    if empty:
        raise BadInput(f"{sentence}, which leaves none for {' and '.join(empty)}: add pictures that did not train it")
    return replace(fresh, parts=parts), sentence


def _mask(count: int, index: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(count, bool)
    mask[index] = True
    return mask


def _fingerprint(path: Path) -> int:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, (size - MIDDLE_BYTES) // 2))
            content = file.read(MIDDLE_BYTES)
    except OSError:
        return 0
    return int.from_bytes(blake2b(b"%d %b" % (size, content), digest_size=8).digest(), "big")

"""Groups of pictures that belong together: of one object, film or burst. A group stays in one split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mexit.core.progress import Progress
from mexit.data.dataset import DataSet, FileImages, UnlabelledImages
from mexit.data.name_sequences import MAX_SHARE, NamedPictures, joined, named_sequences
from mexit.data.near_duplicates import near_duplicates, thumbnails
from mexit.errors import BadInput, UsageError

AUTO, NONE, FOLDER = "auto", "none", "folder"
MIN_CLASS = 4  # pictures of a class below which near-duplicates may link most of it
MAX_NAMES = 5  # in a sentence
MAX_DROPPED = 0.1  # of the images outside the official test part


@dataclass(frozen=True)
class Grouping:
    """The groups of a data set.

    Attributes:
        ids: group id of each sample, (N,) int64.
        how: how many groups were found and how, one sentence.
    """

    ids: NDArray[np.int64] = field(repr=False)
    how: str

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != np.int64:
            raise BadInput(f"group ids must be int64 (N,), found {self.ids.dtype} {self.ids.shape}")

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(np.unique(self.ids))

    @property
    def has_groups(self) -> bool:
        """Whether some group has several samples."""
        return self.count < len(self.ids)


def default_group(data: str) -> str:
    """How groups are found by default in a data set of this name: "auto" in folders of pictures, else "none"."""
    return AUTO if data.startswith("folder:") else NONE


def find_groups(data: DataSet | UnlabelledImages, how: str, progress: Progress | None = None) -> Grouping | None:
    """Find the groups of a data set.

    Args:
        data: the data set; without image files, "auto" looks for near-duplicates only. Images without labels count as
            one class.
        how: "none"; "folder": the images of each subfolder of a class folder; "auto": sequences in file names and
            near-duplicates; or a regular expression that is searched in the path of each image below the data folder:
            images with the same capture groups (or, without capture groups, the same match) form a group.
        progress: shows the number of pictures that were compared.

    Returns:
        The groups, or None with "none".

    Raises:
        UsageError: the regular expression is invalid, or matches no path; no class folder has subfolders; or the data
            set has no image files.
    """
    if how == NONE:
        return None
    if isinstance(data, UnlabelledImages):
        labels = np.zeros(len(data), np.int64)
        data = DataSet(data.name, ("pictures",), data.images, labels, data.sha256, None)
    if how == AUTO:
        return _automatic(data, progress)
    if not isinstance(data.images, FileImages):
        raise UsageError(f"{data.name} has no image files whose paths could name groups: use --group none")
    names = data.images.names
    return _by_folder(data, names) if how == FOLDER else _by_expression(data, names, how)


def _automatic(data: DataSet, progress: Progress | None) -> Grouping:
    """Groups by names and near-duplicates; a class that would become one group stays ungrouped."""
    thumbs = thumbnails(data.images, len(data), data.sha256, progress)
    rules: dict[str, list[str | None]] = {}
    whole: list[int] = []
    if isinstance(data.images, FileImages):
        names = data.images.names
        parts = NamedPictures.of(names, data.labels, class_folder_depth(names, data.labels))
        rules, whole = named_sequences(parts, thumbs)
    pairs, classes_alike = _separable(near_duplicates(thumbs), data)
    found = [group_ids(keys) for keys in rules.values()]
    named = joined([np.arange(len(data), dtype=np.int64), *found], pairs[:0])
    ids = joined([named], pairs)
    linked = int((named[pairs[:, 0]] != named[pairs[:, 1]]).sum())
    sources = [f"by {' and '.join(rules)} in the names"] if rules else []
    sources += [f"{linked:,} near-duplicate pairs{' between them' if rules else ''}"] if linked else []
    tested = len(np.unique(ids[data.official_test])) if data.official_test is not None else 0
    in_test = f" ({tested:,} in the test part)" if tested else ""
    sentence = f"{len(np.unique(ids)):,} groups of pictures{in_test}{' ' if rules else ': '}{'; '.join(sources)}"
    if len(np.unique(ids)) == len(data):
        sentence = "no groups: no sequences in the names, no near-duplicates"
    ungrouped = [data.classes[label] for label in sorted({*whole, *classes_alike})]
    if ungrouped:
        sentence += f"; left ungrouped, because all pictures would be one group: {_join(ungrouped)}"
    return Grouping(ids, sentence)


def _separable(pairs: NDArray[np.int64], data: DataSet) -> tuple[NDArray[np.int64], list[int]]:
    """The pairs of near-duplicates without those that link most of a class, and these classes.

    Drawings and other plain pictures look alike without being copies of each other.
    """
    ids = joined([np.arange(len(data), dtype=np.int64)], pairs)
    keep = np.ones(len(pairs), bool)
    classes = []
    for label in np.unique(data.labels[pairs]).tolist():
        members = ids[data.labels == label]
        largest = np.bincount(members).argmax()
        if len(members) >= MIN_CLASS and (members == largest).mean() > MAX_SHARE:
            keep &= ids[pairs[:, 0]] != largest
            classes.append(label)
    return pairs[keep], classes


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def group_ids(keys: Sequence[str | None]) -> NDArray[np.int64]:
    """Group ids (N,), numbered in the order of their first sample; a sample without a key is its own group."""
    numbers: dict[str | tuple[int], int] = {}
    ids = [numbers.setdefault((i,) if key is None else key, len(numbers)) for i, key in enumerate(keys)]
    return np.array(ids, np.int64)


def class_folder_depth(names: Sequence[str], labels: NDArray[np.int64]) -> int:
    """Number of leading folders of a path that determine the class, such as 2 of `train/cat/film1/7.png`."""
    folders = [name.split("/")[:-1] for name in names]
    for depth in range(1, 1 + max(map(len, folders), default=0)):
        pairs = {(tuple(parts[:depth]), label) for parts, label in zip(folders, labels.tolist(), strict=True)}
        if len({prefix for prefix, _ in pairs}) == len(pairs):
            return depth
    return max(map(len, folders), default=0)


def _by_folder(data: DataSet, names: Sequence[str]) -> Grouping:
    depth = class_folder_depth(names, data.labels)
    keys = [parent if parent.count("/") >= depth else None for parent in (name.rpartition("/")[0] for name in names)]
    if not any(key is not None for key in keys):
        raise UsageError(f"{data.name}: no class folder has subfolders that could be groups: use --group auto or none")
    ids, alone = group_ids(keys), keys.count(None)
    directly = f"; {alone} pictures directly in a class folder are groups of their own" if alone else ""
    return Grouping(ids, f"{len(np.unique(ids))} groups of pictures by folder{directly}")


def _by_expression(data: DataSet, names: Sequence[str], how: str) -> Grouping:
    try:
        pattern = re.compile(how)
    except re.error as error:
        raise UsageError(f"--group {how!r} is neither auto, folder, none nor a regular expression: {error}") from None
    matches = [pattern.search(name) for name in names]
    keys = [match and ("\0".join(part or "" for part in match.groups()) or match[0]) for match in matches]
    alone = keys.count(None)
    if alone == len(keys):
        raise UsageError(f"--group {how!r} matches no path of {data.name}, such as {names[0]!r}")
    ids = group_ids(keys)
    rest = f"; {alone} pictures that do not match are groups of their own" if alone else ""
    return Grouping(ids, f"{len(np.unique(ids))} groups of pictures by {how!r}{rest}")


def shared_with_test(data: DataSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices (n,) int64 of the images outside the official test part whose group reaches into it.

    Args:
        data: the data set; without an official test part no image is shared.
        ids: group id of each sample, (N,).
    """
    if data.official_test is None:
        return np.zeros(0, np.int64)
    rest = np.setdiff1d(np.arange(len(data), dtype=np.int64), data.official_test)
    return rest[np.isin(ids[rest], ids[data.official_test])]


def without_groups_of_test(data: DataSet, grouping: Grouping) -> tuple[NDArray[np.int64], str]:
    """The images outside the official test part, without those whose group reaches into it.

    If these are more than `MAX_DROPPED`, or all of a class, they are kept: the groups then describe how the test part
    was made, and the sentence warns of a test accuracy that is too high.

    Returns:
        Sorted indices (n,) int64, and what to add to the sentence about the groups.
    """
    assert data.official_test is not None
    rest = np.setdiff1d(np.arange(len(data), dtype=np.int64), data.official_test)
    shared = shared_with_test(data, grouping.ids)
    if not len(shared):
        return rest, ""
    count = len(np.unique(grouping.ids[shared]))
    kept = np.setdiff1d(rest, shared)
    complete = len(np.unique(data.labels[kept])) == len(np.unique(data.labels[rest]))
    if complete and len(shared) <= MAX_DROPPED * len(rest):
        return kept, f"; {len(shared)} training pictures of {count} groups in the test part are left out"
    return rest, (
        f"; warning: {len(shared)} training pictures belong to {count} groups that are in the test part too, so the "
        "test accuracy will be too high"
    )

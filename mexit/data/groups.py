"""Groups of pictures that belong together: of one object, film or burst. A group stays in one split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mexit.core.printable import listed
from mexit.core.progress import Progress
from mexit.data.dataset import DataSet, FileImages, UnlabelledImages
from mexit.data.name_sequences import MAX_SHARE, NamedPictures, joined, named_sequences
from mexit.data.near_duplicates import MAX_PICTURES, Thumbnails, near_duplicates, thumbnails
from mexit.errors import BadInput, MexitError, UsageError

AUTO, NONE, FOLDER = "auto", "none", "folder"
MIN_CLASS = 4  # pictures of a class below which near-duplicates may link most of it
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
        how: "none"; "folder": the images of each subfolder of a class folder, of the same name in all split folders;
            "auto": sequences in file names and near-duplicates; or a regular expression that is searched in the path
            of each image below the data folder: images with the same capture groups (or, without capture groups, the
            same match) form a group.
        progress: shows the number of pictures that were compared.

    Returns:
        The groups, or None with "none".

    Raises:
        UsageError: the regular expression is invalid, matches no path or an empty text; no class folder has
            subfolders; or the data set has no image files.
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
    return _by_folder(data) if how == FOLDER else _by_expression(data, names, how)


def _automatic(data: DataSet, progress: Progress | None) -> Grouping:
    """Groups by names and near-duplicates; neither may make one group of most of a class."""
    thumbs = thumbnails(data.images, len(data), data.sha256, progress)
    rules: dict[str, list[str | None]] = {}
    whole: list[int] = []
    if isinstance(data.images, FileImages):
        splits, names = _below_split(data)
        parts = NamedPictures.of(names, splits, data.labels, class_folder_depth(names, data.labels))
        rules, whole = named_sequences(parts, thumbs)
    links = near_duplicates(thumbs)
    pairs, plain = (np.zeros((0, 2), np.int64), []) if links is None else _separable(links, data, thumbs)
    found = [group_ids(keys) for keys in rules.values()]
    named = joined([np.arange(len(data), dtype=np.int64), *found], pairs[:0])
    ids = joined([named], pairs)
    limits = []
    if links is None:
        limits.append(f"near-duplicates are looked for in sets of up to {MAX_PICTURES:,} pictures only")
    if whole:
        classes = listed([data.classes[label] for label in whole])
        limits.append(f"sequences do not count where all pictures of a class would be one group: {classes}")
    if plain:
        classes = listed([data.classes[label] for label in plain])
        limits.append(f"most pictures of a class look alike, and of these only exact copies are one group: {classes}")
    if len(np.unique(ids)) < len(data):
        return Grouping(ids, "; ".join([_describe(data, named, ids, list(rules)), *limits]))
    return Grouping(ids, f"no groups: {'; '.join(limits) or 'no sequences in the names, no near-duplicates'}")


def _describe(data: DataSet, named: NDArray[np.int64], ids: NDArray[np.int64], rules: Sequence[str]) -> str:
    """The number of groups, and how they were found: `named` by names, `ids` by names and near-duplicates."""
    count = len(np.unique(ids))
    copies = len(np.unique(named)) - count
    sources = [f"by {' and '.join(rules)} in the names"] if rules else []
    if copies:
        sources.append(f"{copies:,} near-duplicate{'s' if copies > 1 else ''}{' between them' if rules else ''}")
    tested = len(np.unique(ids[data.official_test])) if data.official_test is not None else 0
    in_test = f" ({tested:,} in the test part)" if tested else ""
    return f"{count:,} groups of pictures{in_test}{' ' if rules else ': '}{'; '.join(sources)}"


def _separable(pairs: NDArray[np.int64], data: DataSet, thumbs: Thumbnails) -> tuple[NDArray[np.int64], list[int]]:
    """The links of near-duplicates without those that join most of a class, and these classes.

    Drawings and other plain pictures look alike without being copies of each other; exact copies stay linked.
    """
    ids = joined([np.arange(len(data), dtype=np.int64)], pairs)
    apart: set[int] = set()
    classes = []
    for label in np.unique(data.labels[pairs]).tolist():
        members = ids[data.labels == label]
        largest = int(np.bincount(members).argmax())
        if len(members) >= MIN_CLASS and (members == largest).mean() > MAX_SHARE:
            apart.add(largest)
            classes.append(label)
    dropped = np.isin(ids, list(apart))
    copies = _exact_copies(data, np.flatnonzero(dropped), thumbs)
    return np.concatenate([pairs[~dropped[pairs[:, 0]]], copies]), classes


def _exact_copies(data: DataSet, index: NDArray[np.int64], thumbs: Thumbnails) -> NDArray[np.int64]:
    """Links (P, 2) of each picture at some indices with the first one of the same content."""
    small = [thumbs.pixels[i].tobytes() for i in index.tolist()]
    counts = Counter(small)
    first: dict[bytes, int] = {}
    links = []
    for i in (i for i, pixels in zip(index.tolist(), small, strict=True) if counts[pixels] > 1):
        try:
            content = data.images.at(np.array([i], np.int64))[0]
        except MexitError:  # training reports such a file by name
            continue
        original = first.setdefault(blake2b(bytes(content), digest_size=16).digest(), i)
        if original != i:
            links.append((original, i))
    return np.asarray(links, np.int64).reshape(-1, 2)


def _below_split(data: DataSet) -> tuple[list[str], list[str]]:
    """The split folder of each image file, "" without an official test part, and its path below that folder."""
    assert isinstance(data.images, FileImages)
    names = data.images.names
    if data.official_test is None:
        return [""] * len(names), list(names)
    parts = [name.partition("/") for name in names]
    return [split for split, _, _ in parts], [rest for _, _, rest in parts]


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


def _by_folder(data: DataSet) -> Grouping:
    _, names = _below_split(data)
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
    keys = [None if match is None else _key(match) for match in map(pattern.search, names)]
    if "" in keys:
        raise UsageError(
            f"--group {how!r} matches an empty text in {names[keys.index('')]!r}, which would put all such pictures "
            "into one group: write it so that it matches at least one character, such as '+' in place of '*'"
        )
    alone = keys.count(None)
    if alone == len(keys):
        raise UsageError(f"--group {how!r} matches no path of {data.name}, such as {names[0]!r}")
    ids = group_ids(keys)
    rest = f"; {alone} pictures that do not match are groups of their own" if alone else ""
    return Grouping(ids, f"{len(np.unique(ids))} groups of pictures by {how!r}{rest}")


def _key(match: re.Match[str]) -> str:
    """The capture groups of a match; the match itself if they are empty or there are none."""
    parts = [part or "" for part in match.groups()]
    return "\0".join(parts) if any(parts) else match[0]


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

"""Sequences in the names of pictures: frames of a track or film, bursts, and pictures taken within seconds.

    track_frame   `00008_00020`, `clip1-frame-0012`, `p03 (7)`: an id and a frame number; an id counts inside its folder
    time          `IMG_20240101_120000_003`, `1704110400123`: time stamps at most `MAX_GAP_S` apart
    subfolder     `cat/film1/0001`: the subfolders of a class folder
    copies        `x.rf.0a1b2c3d`: augmented copies of one picture, as Roboflow exports them

The folder of a split (`train`, `test`) does not count: a track with frames in both is one group. If the pictures of
such groups do not look alike across these folders, each folder numbers its own tracks, and the folder counts.

A rule may be wrong: `cat_001`, `cat_002`, ... is a counter, and pictures of a class then have nothing in common but the
class. So a rule is used only if its groups are much smaller than the classes, and if neighbours in a group look much
more alike than pictures of two groups of the same class. A class that would become one group stays ungrouped.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from mexit.data.near_duplicates import Thumbnails

MAX_GAP_S = 10.0
MAX_SHARE = 0.5  # of a class in one group, in the median class
MIN_WINS = 0.7  # how often a neighbour must look more alike than a picture of another group
_MAX_PAIRS = 4000
_SEED = 20231106

_ROBOFLOW = re.compile(r"^(?P<id>.+)\.rf\.[0-9a-f]{6,}$", re.IGNORECASE)
_ENCODING = re.compile(r"[_-](?:jpe?g|png|bmp|webp)$", re.IGNORECASE)
_FRAME_WORDS = ("frame", "burst", "image", "shot", "view", "frm", "img", "fr", "f", "t")  # before a frame number
_SEPARATORS = frozenset("._#-")  # and white space; an opening bracket separates too, but not from a word
_BRACKETS = frozenset("([")
_DATE = re.compile(
    r"^(?P<prefix>.*?)(?<!\d)(?P<day>(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01]))[-_. T]*"
    r"(?P<time>(?:[01]\d|2[0-3])[-_.:hH]?[0-5]\d[-_.:mM]?[0-5]\d)(?P<rest>.*)$"
)
_EPOCH = re.compile(r"^(?P<prefix>.*?)(?<!\d)(?P<seconds>1[2-9]\d{8})(?P<fraction>\.?\d{3,6})?(?!\d)")


@dataclass(frozen=True)
class NamedPictures:
    """Names of pictures, taken apart.

    Attributes:
        folders, stems: folder below the split folder, and name without suffix, of each picture.
        labels: class of each picture.
        depth: number of leading folders that form the class folder.
        splits: split folder of each picture, "" without one.
    """

    folders: Sequence[str]
    stems: Sequence[str]
    labels: Sequence[int]
    depth: int
    splits: Sequence[str]

    @staticmethod
    def of(names: Sequence[str], splits: Sequence[str], labels: NDArray[np.int64], depth: int) -> NamedPictures:
        """Take paths below the split folder, with "/" as separator, apart."""
        parted = [name.rpartition("/") for name in names]
        folders = [folder for folder, _, _ in parted]
        stems = [file.rpartition(".")[0] or file for _, _, file in parted]
        return NamedPictures(folders, stems, labels.tolist(), depth, splits)


# A group and the position of a picture in it, or None for a picture that a rule does not cover.
Key = tuple[str, float] | None


def named_sequences(names: NamedPictures, thumbs: Thumbnails) -> tuple[dict[str, list[str | None]], list[int]]:
    """The sequences that the rules find.

    Args:
        names: of N pictures.
        thumbs: of the same pictures.

    Returns:
        For each rule that is used, by its name, the group of every picture (None = none), (N,); and the classes that
        would have become one group and stay ungrouped.
    """
    used: dict[str, list[str | None]] = {}
    whole: set[int] = set()
    for rule, find in _RULES.items():
        keys = _within_splits(find(names), names, thumbs)
        groups = [None if key is None else key[0] for key in keys]
        if not _has_sensible_sizes(groups, names.labels):
            continue
        if rule != "copies" and not _neighbours_look_alike(keys, names.labels, thumbs):
            continue
        alone = _classes_of_one_group(groups, names.labels)
        whole |= alone
        used[rule] = [None if label in alone else group for group, label in zip(groups, names.labels, strict=True)]
    return used, sorted(whole)


def _by_copies(names: NamedPictures) -> list[Key]:
    matches = [_ROBOFLOW.match(stem) for stem in names.stems]
    return [match and (f"{folder}/{match['id']}", 0.0) for match, folder in zip(matches, names.folders, strict=True)]


def _by_track_and_frame(names: NamedPictures) -> list[Key]:
    keys: list[Key] = []
    for folder, stem in zip(names.folders, names.stems, strict=True):
        plain = _plain(stem)
        found = None if _time(plain) else _track_and_frame(plain)
        keys.append(found and (f"{folder}/{found[0]}", found[1]))
    return keys


def _track_and_frame(stem: str) -> Key:
    """The id before a frame number at the end of a name, and the number: `clip1`, 12 of `clip1-frame-0012`.

    A separator, or a word such as `frame` after a digit, ends the id. The name is read from its end, in linear time.
    """
    stem = stem[:-1] if stem.endswith((")", "]")) else stem
    before = _without_end(stem, str.isdecimal)
    number = stem[len(before) :]
    if not number:
        return None
    ends = [_without_end(before, _separates)]
    text = _without_end(before, lambda sign: _separates(sign) and sign not in _BRACKETS)
    for word in _FRAME_WORDS:
        rest, last = text[: -len(word)], text[-len(word) - 1 : -len(word)]
        if text[-len(word) :].lower() == word and (last.isdecimal() or _separates(last)):
            ends.append(_without_end(rest, _separates))
            break
    named = [end for end in ends if len(end) < len(before) and any(map(str.isalnum, end))]
    return (named[-1], float(number)) if named else None


def _separates(sign: str) -> bool:
    return sign in _SEPARATORS or sign in _BRACKETS or sign.isspace()


def _without_end(text: str, strips: Callable[[str], bool]) -> str:
    """The text without the signs at its end for which `strips` holds."""
    end = len(text)
    while end and strips(text[end - 1]):
        end -= 1
    return text[:end]


def _within_splits(keys: list[Key], names: NamedPictures, thumbs: Thumbnails) -> list[Key]:
    """The keys, with the split folder in them if pictures of one key do not look alike across split folders."""
    found = {(key[0], split) for key, split in zip(keys, names.splits, strict=True) if key is not None}
    if len({key for key, _ in found}) == len(found):
        return keys
    if _share_of_wins(keys, names.labels, thumbs, names.splits)[0] >= MIN_WINS:
        return keys
    return [key and (f"{split}/{key[0]}", key[1]) for key, split in zip(keys, names.splits, strict=True)]


def _by_time(names: NamedPictures) -> list[Key]:
    """Pictures of one folder and camera, divided where more than `MAX_GAP_S` lie between two of them."""
    rolls: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
    for i, (folder, stem) in enumerate(zip(names.folders, names.stems, strict=True)):
        stamp = _time(_plain(stem))
        if stamp is not None:
            rolls[f"{folder}/{stamp[0]}"].append((stamp[1], stem, i))
    keys: list[Key] = [None] * len(names.stems)
    for roll, pictures in rolls.items():
        segment, last = 0, -np.inf
        for seconds, _, i in sorted(pictures):
            segment += seconds - last > MAX_GAP_S
            last = seconds
            keys[i] = f"{roll}/{segment}", seconds
    return keys


def _by_subfolder(names: NamedPictures) -> list[Key]:
    order = {i: rank for rank, i in enumerate(sorted(range(len(names.stems)), key=lambda i: _natural(names.stems[i])))}
    deeper = [folder.count("/") >= names.depth for folder in names.folders]
    return [(names.folders[i], float(order[i])) if deep else None for i, deep in enumerate(deeper)]


_RULES: Mapping[str, Callable[[NamedPictures], list[Key]]] = {
    "copies": _by_copies,
    "time": _by_time,
    "track_frame": _by_track_and_frame,
    "subfolder": _by_subfolder,
}


def _plain(stem: str) -> str:
    """A stem without what a converter appended."""
    match = _ROBOFLOW.match(stem)
    return _ENCODING.sub("", match["id"] if match else stem)


def _natural(stem: str) -> list[tuple[int, str]]:
    """A key that sorts numbers by value."""
    parts = [part.lstrip("0") if part.isdecimal() else part for part in re.split(r"(\d+)", stem)]
    return [(len(part) if part.isdecimal() else 0, part) for part in parts]


def _time(stem: str) -> tuple[str, float] | None:
    """The camera (the text before the time stamp, its digits replaced) and the time in seconds."""
    match = _DATE.match(stem)
    if match is not None:
        digits = re.sub(r"\D", "", match["day"] + match["time"])
        try:
            moment = datetime.strptime(digits, "%Y%m%d%H%M%S")
        except ValueError:
            return None
        return re.sub(r"\d", "#", match["prefix"]), (moment - datetime(1970, 1, 1)).total_seconds()
    match = _EPOCH.match(stem)
    if match is None:
        return None
    fraction = (match["fraction"] or "").lstrip(".")
    return re.sub(r"\d", "#", match["prefix"]), float(f"{match['seconds']}.{fraction or 0}")


def _has_sensible_sizes(groups: Sequence[str | None], labels: Sequence[int]) -> bool:
    """Whether some group has several pictures, and in the median class the largest has at most half of the pictures."""
    per_group = Counter(zip(labels, groups, strict=True))
    per_class = Counter(labels)
    largest: dict[int, int] = {}
    for (label, group), count in per_group.items():
        if group is not None:
            largest[label] = max(largest.get(label, 0), count)
    if max(largest.values(), default=0) < 2:
        return False
    return bool(np.median([count / per_class[label] for label, count in largest.items()]) <= MAX_SHARE)


def _neighbours_look_alike(keys: Sequence[Key], labels: Sequence[int], thumbs: Thumbnails) -> bool:
    """Whether neighbours in a group look more alike than pictures of other groups of the same class.

    If groups meant nothing, half of the neighbours would win; the limit lies above that by more than two standard
    errors.
    """
    wins, count = _share_of_wins(keys, labels, thumbs)
    return wins >= MIN_WINS and wins - 1 / sqrt(count) >= 0.5


def _share_of_wins(
    keys: Sequence[Key], labels: Sequence[int], thumbs: Thumbnails, splits: Sequence[str] | None = None
) -> tuple[float, int]:
    """How often a picture is more like its neighbour in its group than like a picture of another group of its class.

    Args:
        keys, labels: of N pictures.
        thumbs: of the same pictures.
        splits: of the pictures; only neighbours of different splits are compared. None = all neighbours.

    Returns:
        The share in [0, 1], and the number of comparisons; 0, 1 without any.
    """
    rng = np.random.default_rng(_SEED)
    order = sorted((i for i, key in enumerate(keys) if key is not None), key=lambda i: (labels[i], keys[i]))
    members: dict[int, list[int]] = defaultdict(list)
    for i in order:
        members[labels[i]].append(i)
    group_of = [None if key is None else key[0] for key in keys]
    pairs = [
        (i, j) for i, j in pairwise(order) if group_of[i] == group_of[j] and (splits is None or splits[i] != splits[j])
    ]
    triples = []
    for k in rng.permutation(len(pairs))[:_MAX_PAIRS].tolist():
        i, j = pairs[k]
        others = members[labels[i]]
        for other in (others[int(rng.integers(len(others)))] for _ in range(20)):
            if group_of[other] != group_of[i]:
                triples.append((i, j, other))
                break
    if not triples:
        return 0.0, 1
    first, neighbour, outsider = np.array(triples, np.int64).T
    near, far = thumbs.rms(first, neighbour), thumbs.rms(first, outsider)
    return float(((near < far) + 0.5 * (near == far)).mean()), len(triples)


def _classes_of_one_group(groups: Sequence[str | None], labels: Sequence[int]) -> set[int]:
    """Classes whose pictures all form one group."""
    found: dict[int, set[str | None]] = defaultdict(set)
    for group, label in zip(groups, labels, strict=True):
        found[label].add(group)
    counts = Counter(labels)
    return {label for label, own in found.items() if len(own) == 1 and None not in own and counts[label] > 1}


def joined(ids: Sequence[NDArray[np.int64]], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest groups that contain every group of several groupings, and both samples of every pair.

    Args:
        ids: groupings, each (N,).
        pairs: (P, 2) indices.

    Returns:
        Group ids (N,) int64, numbered from 0 in the order of their first sample.
    """
    parent = list(range(len(ids[0])))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    links = [pairs]
    for one in ids:
        _, first, member = np.unique(one, return_index=True, return_inverse=True)
        links.append(np.stack([np.arange(len(one)), first[member]], axis=1))
    for i, j in np.concatenate(links).tolist():
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
    _, numbers = np.unique([root(i) for i in range(len(parent))], return_inverse=True)
    return numbers.astype(np.int64)

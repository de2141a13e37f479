"""Recognise a folder of a set with splits, such as `train`, `val` and `test`, by the names of its subfolders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mexit.core.printable import listed
from mexit.data.image_files import has_images, list_folders
from mexit.errors import BadInput

ROLES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_WORDS = frozenset((*_ROLE_OF, "eval", "evaluation", "dev", "holdout", "fold", "split"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")


@dataclass(frozen=True)
class SplitFolders:
    """Names of the subfolders of a set with splits; each holds the same class folders.

    Attributes:
        train: training pictures.
        val, test: validation and test pictures, or None.
        others: further subfolders with pictures, which belong to no split.
    """

    train: str
    val: str | None
    test: str | None
    others: tuple[str, ...] = ()


def find_split_folders(root: Path) -> SplitFolders | None:
    """The split folders of `root`; None if its subfolders are classes.

    A folder `train` with pictures directly in it, beside folders without the name of a split, is a class.

    Raises:
        BadInput: the subfolders look like splits, but their names or contents are ambiguous; the message lists them.
        Damaged: a folder cannot be listed.
    """
    names = [name for name in list_folders(root) if has_images(root, name)]
    roles = {name: _ROLE_OF[name.casefold()] for name in names if name.casefold() in _ROLE_OF}
    others = [name for name in names if name not in roles]
    alike = _alike(names)
    if not roles:
        if alike:
            raise _not_understood(root, names, f"{_join(alike)} have names of splits")
        return None
    folders = {role: [name for name in names if roles.get(name) == role] for role in ROLES}
    twice = next((found for found in folders.values() if len(found) > 1), None)
    if twice:
        raise _not_understood(root, names, f"{_join(twice)} are the same split")
    if not folders["train"]:
        raise _not_understood(root, names, f"there is no folder train beside {_join(roles)}")
    nested = {name: class_folders(root, name) for name in roles}
    (train,) = folders["train"]
    if len(roles) == 1 and others and not alike:
        if nested[train]:
            raise _not_understood(root, names, f"{train} has subfolders, and beside it are {_join(others)}")
        return None
    bare = [name for name in roles if not nested[name]]
    if bare:
        raise _not_understood(root, names, f"there are no class folders in {_join(bare)}")
    if set(alike) - set(roles):
        raise _not_understood(root, names, f"{_join(sorted(set(alike) - set(roles)))} may be a split too")
    val, test = (folders[role][0] if folders[role] else None for role in ("val", "test"))
    return SplitFolders(train, val, test, tuple(others))


def class_folders(root: Path, part: str) -> list[str]:
    """Names of the subfolders of `root/part` that hold images, sorted. Raises `Damaged`."""
    prefix = f"{part}/" if part else ""
    return [name for name in list_folders(root / part) if has_images(root, prefix + name)]


def _alike(names: Iterable[str]) -> list[str]:
    """Names that differ in the word for a split and in numbers only, such as `seg_train` and `seg_test`."""
    stems: dict[str, list[str]] = {}
    for name in names:
        words = [word.casefold() for word in _WORD.findall(name)]
        if _WORDS.intersection(words):
            stems.setdefault(" ".join("*" if word in _WORDS else word for word in words), []).append(name)
    return sorted(name for found in stems.values() if len(found) > 1 for name in found)


def _not_understood(root: Path, names: list[str], reason: str) -> BadInput:
    found = listed(names, 8, partial(_describe, root), "; ")
    return BadInput(
        f"{root} looks like a set with splits, but it is not understood: {reason}. Found: {found}. Expected: "
        "train/CLASS/..., and beside it val/CLASS/... or test/CLASS/...; or CLASS/... alone. Rename or move folders, "
        "or name the folder above the class folders"
    )


def _describe(root: Path, name: str) -> str:
    classes = class_folders(root, name)
    return f"{name} with {len(classes)} class folders" if classes else f"{name} with pictures directly in it"


def _join(names: Iterable[str]) -> str:
    return " and ".join(names)

"""Folders of images.

    PATH/<class>/*                                      one subfolder a class
    PATH/train/<class>/* and PATH/test|val/<class>/*    the same with a test part of its own
    PATH/*                                              pictures alone, for what needs no labels

Images are found in subfolders of a class folder too.
"""

from __future__ import annotations

from pathlib import Path

from mexit.core.manifest import is_class_name
from mexit.data.dataset import DataSet, FileImages, Pictures
from mexit.data.image_files import SUFFIXES, Listing, Picture, folders, pictures
from mexit.errors import BadInput, NotFound

TRAIN_NAME, TEST_NAMES = "train", ("test", "val")
_NAMED = 5


def load(path: Path) -> DataSet:
    """List the images; they are decoded when asked for.

    Raises:
        NotFound: no such folder.
        BadInput: fewer than two class folders with images, or training and test classes that differ.
        Damaged: a folder or a file that cannot be read.
    """
    _need_folder(path)
    if not (path / TRAIN_NAME).is_dir():
        return load_class_folders(f"folder:{path}", path, "", None)
    test = next((name for name in TEST_NAMES if (path / name).is_dir()), None)
    return load_class_folders(f"folder:{path}", path, TRAIN_NAME, test)


def load_class_folders(name: str, root: Path, train: str, test: str | None) -> DataSet:
    """A data set of class folders below `root/train` and, if there is a test part, `root/test`; "" is `root`."""
    found = _classes(root, train)
    listing = Listing(root)
    for label, files in enumerate(found.values()):
        listing.add(files, label)
    training = None
    if test is not None:
        training = len(listing)
        held_out = _classes(root, test)
        _need_same_classes(root, train, list(found), test, list(held_out))
        for label, files in enumerate(held_out.values()):
            listing.add(files, label)
    return listing.data_set(name, tuple(found), training)


def load_pictures(path: Path) -> Pictures:
    """Pictures without class folders; nobody says what they show.

    Raises:
        NotFound: no such folder.
        BadInput: there are no pictures in it.
        Damaged: a folder or a file that cannot be read.
    """
    _need_folder(path)
    listing = Listing(path)
    listing.add(pictures(path, deep=False), 0)
    if not listing.names:
        raise BadInput(f"{path} holds no images; {', '.join(SUFFIXES[:4])}, ... are read")
    return Pictures(f"folder:{path}", FileImages(path, listing.names), listing.digest())


def has_labels(path: Path) -> bool:
    """Whether a folder is one of class folders. Raises as `load_pictures`."""
    _need_folder(path)
    return bool(_with_pictures(path, "")) or not pictures(path, deep=False)


def _need_folder(path: Path) -> None:
    if not path.is_dir():
        raise NotFound(f"image folder {path} does not exist")


def _with_pictures(root: Path, part: str) -> dict[str, list[Picture]]:
    """Subfolders of `root/part` that hold images, by name."""
    prefix = f"{part}/" if part else ""
    found = {name: pictures(root, prefix + name) for name in folders(root / part)}
    return {name: files for name, files in found.items() if files}


def _classes(root: Path, part: str) -> dict[str, list[Picture]]:
    found = _with_pictures(root, part)
    for name in found:
        if not is_class_name(name):
            raise BadInput(
                f"{root / part}: the folder name {name!r} holds control characters, so it cannot name a class"
            )
    if len(found) < 2:
        raise BadInput(
            f"{root / part} holds {len(found)} class folder(s) with images; at least 2 are needed, "
            f"one subfolder a class with {', '.join(SUFFIXES[:4])}, ... inside"
        )
    return found


def _need_same_classes(root: Path, train: str, trained: list[str], test: str, tested: list[str]) -> None:
    if trained != tested:
        differ = "; ".join(
            f"only {part} has {_few(sorted(set(own) - set(other)))}"
            for part, own, other in ((train, trained, tested), (test, tested, trained))
            if set(own) - set(other)
        )
        raise BadInput(
            f"{root / train} has {len(trained)} classes, {root / test} {len(tested)}, which must be the same: "
            + differ
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

"""Read folders of images.

    PATH/<class>/*                                      one subfolder per class
    PATH/train/<class>/* and PATH/test|val/<class>/*    the same with an official test part
    PATH/*                                              images without labels

Class folders are searched recursively.
"""

from __future__ import annotations

from pathlib import Path

from mexit.core.manifest import is_class_name
from mexit.data.dataset import DataSet, FileImages, UnlabelledImages
from mexit.data.image_files import SUFFIXES, ImageFile, LabelledFiles, list_folders, list_images
from mexit.errors import BadInput, NotFound

TRAIN, TESTS = "train", ("test", "val")
_SUFFIXES = f"{', '.join(SUFFIXES[:4])}, ..."
_MAX_NAMES = 5  # in a message


def load(path: Path) -> DataSet:
    """List the images of class folders.

    Raises:
        NotFound: the folder does not exist.
        BadInput: fewer than two class folders hold images, or training and test classes differ.
        Damaged: a folder or a file cannot be read.
    """
    _check_exists(path)
    if not (path / TRAIN).is_dir():
        return load_class_folders(f"folder:{path}", path, "", None)
    test = next((name for name in TESTS if (path / name).is_dir()), None)
    return load_class_folders(f"folder:{path}", path, TRAIN, test)


def load_class_folders(name: str, root: Path, train: str, test: str | None) -> DataSet:
    """List the images of the class folders in `root/train` and, unless None, `root/test`; `train` may be ""."""
    train_files = _class_files(root, train)
    classes = list(train_files)
    files = LabelledFiles(root)
    for label, class_name in enumerate(classes):
        files.add(train_files[class_name], label)
    n_train = None
    if test is not None:
        n_train = len(files)
        test_files = _class_files(root, test)
        _check_same_classes(root, train, classes, test, list(test_files))
        for label, class_name in enumerate(classes):
            files.add(test_files[class_name], label)
    return files.data_set(name, tuple(classes), n_train)


def load_unlabelled(path: Path, *, recursive: bool = False) -> UnlabelledImages:
    """List the images directly in a folder, or with `recursive` also those in its subfolders.

    Raises:
        NotFound: the folder does not exist.
        BadInput: it holds no images.
        Damaged: the folder or a file cannot be read.
    """
    _check_exists(path)
    files = LabelledFiles(path)
    files.add(list_images(path, recursive=recursive), 0)
    if not files.names:
        raise BadInput(f"{path} holds no images ({_SUFFIXES})")
    return UnlabelledImages(f"folder:{path}", FileImages(path, files.names), files.sha256())


def has_labels(path: Path) -> bool:
    """Whether a folder has class folders, or no images at all. Raises `NotFound`, `Damaged`."""
    _check_exists(path)
    return bool(_folders_with_images(path, "")) or not list_images(path, recursive=False)


def _check_exists(path: Path) -> None:
    if not path.is_dir():
        raise NotFound(f"image folder {path} does not exist")


def _folders_with_images(root: Path, part: str) -> dict[str, list[ImageFile]]:
    """Subfolders of `root/part` that hold images, by name."""
    prefix = f"{part}/" if part else ""
    files = {name: list_images(root, prefix + name) for name in list_folders(root / part)}
    return {name: images for name, images in files.items() if images}


def _class_files(root: Path, part: str) -> dict[str, list[ImageFile]]:
    files = _folders_with_images(root, part)
    for name in files:
        if not is_class_name(name):
            raise BadInput(f"{root / part}: the folder name {name!r} has control characters: rename it")
    if len(files) < 2:
        raise BadInput(
            f"{root / part} has {len(files)} class folder(s) with images; at least 2 are needed: put the images of "
            f"each class ({_SUFFIXES}) into a subfolder of its own"
        )
    return files


def _check_same_classes(root: Path, train: str, train_classes: list[str], test: str, test_classes: list[str]) -> None:
    if train_classes == test_classes:
        return
    differences = "; ".join(
        f"only {part} has {_join(sorted(set(own) - set(other)))}"
        for part, own, other in ((train, train_classes, test_classes), (test, test_classes, train_classes))
        if set(own) - set(other)
    )
    raise BadInput(
        f"{root / train} has {len(train_classes)} classes, {root / test} {len(test_classes)}; they must be the same: "
        f"{differences}"
    )


def _join(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more

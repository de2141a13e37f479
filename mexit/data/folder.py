"""Read folders of images.

    PATH/<class>/*                      one subfolder per class
    PATH/train/<class>/*                the same with official parts: PATH/val/<class>/*, PATH/test/<class>/* or both
    PATH/classes.txt                    names of the classes, see `class_names`
    PATH/*                              images without labels

`split_folders` lists the names of the split folders. Class folders are searched recursively.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from mexit.core.manifest import is_class_name
from mexit.core.printable import listed, shell_path
from mexit.core.wrong_path import similar_beside
from mexit.data.class_names import find_class_file, read_class_names
from mexit.data.dataset import DataSet, FileImages, UnlabelledImages
from mexit.data.image_files import HIDDEN, ImageFile, LabelledFiles, has_images, list_folders, list_images
from mexit.data.image_formats import HEIC_SUFFIXES, require_heif
from mexit.data.split_folders import SplitFolders, class_folders, find_split_folders
from mexit.errors import BadInput, NotFound

EMPTY, BESIDE = "folder without images", "image beside the class folders"
_EXPECTED = "put the images of each class (.png, .jpg, ...) into a subfolder of its own"


def load(path: Path) -> DataSet:
    """List the images of class folders.

    Without a test part, the validation part is the official test part.

    Raises:
        NotFound: the folder does not exist.
        BadInput: fewer than two class folders hold images, the parts have different classes, or split folders are not
            understood.
        Damaged: a folder or a file cannot be read.
        MissingExtra: an image is a HEIC file, and the package that reads it is not installed.
    """
    _check_exists(path)
    parts = find_split_folders(path)
    name = f"folder:{path}"
    if parts is None:
        return _named(load_class_folders(name, path, "", None), path, path)
    test = parts.test or parts.val
    val = parts.val if parts.test else None
    data = load_class_folders(name, path, parts.train, test, val)
    data = replace(data, skipped={**data.skipped, **_others(path, parts)})
    return _named(data, path, path / parts.train)


def load_class_folders(name: str, root: Path, train: str, test: str | None, val: str | None = None) -> DataSet:
    """List the images of the class folders in `root/train` and, unless None, `root/val` and `root/test`.

    `train` may be "". Raises `BadInput`, `Damaged` and `MissingExtra`, as `load` does.
    """
    skipped: Counter[str] = Counter()
    train_files = _class_files(root, train, skipped)
    classes = list(train_files)
    files = LabelledFiles(root)
    counts = []
    for part in (train, val, test):
        if part is None:
            counts.append(0)
            continue
        part_files = train_files if part == train else _class_files(root, part, skipped)
        _check_same_classes(root, train, classes, part, list(part_files))
        before = len(files)
        for label, class_name in enumerate(classes):
            files.add(part_files[class_name], label)
        counts.append(len(files) - before)
    _check_heic(root, files)
    return files.data_set(name, tuple(classes), None if test is None else counts[0], counts[1], skipped)


def load_unlabelled(path: Path, *, recursive: bool = False) -> UnlabelledImages:
    """List the images directly in a folder, or with `recursive` also those in its subfolders.

    Raises:
        NotFound: the folder does not exist.
        BadInput: it holds no images.
        Damaged: the folder or a file cannot be read.
        MissingExtra: as `load` raises it.
    """
    _check_exists(path)
    files = LabelledFiles(path)
    files.add(list_images(path, recursive=recursive), 0)
    if not files.names:
        raise BadInput(f"{path} holds no images (.png, .jpg, ...)")
    _check_heic(path, files)
    return UnlabelledImages(f"folder:{path}", FileImages(path, files.names), files.sha256())


def has_labels(path: Path) -> bool:
    """Whether a folder has class folders, or no images at all. Raises `NotFound`, `Damaged`."""
    _check_exists(path)
    return bool(class_folders(path, "")) or not has_images(path, recursive=False)


def _check_exists(path: Path) -> None:
    if path.is_file():
        raise NotFound(f"{path} is a file: the folder that holds the class folders is expected")
    if not path.is_dir():
        raise NotFound(f"image folder {path} does not exist{similar_beside(path)}")


def _class_files(root: Path, part: str, skipped: Counter[str]) -> dict[str, list[ImageFile]]:
    """Images by class folder. Counts what is skipped."""
    prefix = f"{part}/" if part else ""
    files = {name: list_images(root, prefix + name, skipped=skipped) for name in list_folders(root / part)}
    skipped[EMPTY] += sum(not images for images in files.values())
    beside: Counter[str] = Counter()
    skipped[BESIDE] += len(list_images(root, part, recursive=False, skipped=beside))
    skipped[HIDDEN] += beside[HIDDEN]
    files = {name: images for name, images in files.items() if images}
    for name in files:
        if not is_class_name(name):
            raise BadInput(f"{root / part}: the folder name {name!r} has control characters: rename it")
    if len(files) < 2:
        raise BadInput(
            f"{root / part} has {len(files)} class folder(s) with images; at least 2 are needed: {_EXPECTED}"
            f"{_inner_folder(root / part, list(files))}"
        )
    skipped += Counter()  # without the counts of zero
    return files


def _inner_folder(path: Path, names: list[str]) -> str:
    """A hint at the only subfolder, where that has class folders, as after unpacking an archive."""
    if len(names) != 1 or len(class_folders(path, names[0])) < 2:
        return ""
    return f", or name the folder inside: {shell_path(f'folder:{path / names[0]}')}"


def _others(root: Path, parts: SplitFolders) -> dict[str, int]:
    """Counts of the images in folders that belong to no split."""
    return {f"image in the folder {name}, which is no split": len(list_images(root, name)) for name in parts.others}


def _check_heic(root: Path, files: LabelledFiles) -> None:
    heic = [name for name in files.names if name.lower().endswith(HEIC_SUFFIXES)]
    if heic:
        require_heif(f"Reading {len(heic)} of {len(files)} images of {root} that are HEIC files, such as {heic[0]},")


def _named(data: DataSet, *folders: Path) -> DataSet:
    """The data set with the class names of `classes.txt`, if one of the folders has it."""
    path = find_class_file(*folders)
    return data if path is None else replace(data, classes=read_class_names(path, data.classes))


def _check_same_classes(root: Path, train: str, train_classes: list[str], test: str, test_classes: list[str]) -> None:
    if train_classes == test_classes:
        return
    differences = "; ".join(
        f"only {part} has {listed(sorted(set(own) - set(other)))}"
        for part, own, other in ((train, train_classes, test_classes), (test, test_classes, train_classes))
        if set(own) - set(other)
    )
    raise BadInput(
        f"{root / train} has {len(train_classes)} classes, {root / test} {len(test_classes)}; they must be the same: "
        f"{differences}"
    )

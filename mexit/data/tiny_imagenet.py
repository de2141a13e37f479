"""Read Tiny-ImageNet: 200 classes of ImageNet, 100,000 training and 10,000 validation images of 64 x 64 pixels.

Stanford CS231n, 2015. The layout of the archive `tiny-imagenet-200`:

    wnids.txt                                   the classes, one WordNet number per line
    words.txt                                   WordNet number, tab, words
    train/<wnid>/images/*.JPEG                  (bounding boxes in <wnid>_boxes.txt are not read)
    val/images/*.JPEG, val/val_annotations.txt  file, wnid and four box coordinates, separated by tabs
    test/images/*.JPEG                          unlabelled, not read

The test part has no labels, so the official test part here is `val`, as in the papers. Classes are sorted by number.
Some images are grey; `preprocess` converts them to RGB.
"""

from __future__ import annotations

from pathlib import Path

from mexit.core.printable import shell_path
from mexit.data.dataset import DataSet, find_folder
from mexit.data.image_files import ImageFile, LabelledFiles, list_folders, list_images
from mexit.data.imagenet import WNID, WORDS, class_names, read_lines
from mexit.errors import Damaged, NotFound

NAME = "tiny-imagenet"
FOLDER = "tiny-imagenet-200"
WNIDS = "wnids.txt"
ANNOTATIONS = "val/val_annotations.txt"
_FIELDS = 6  # of a line in ANNOTATIONS


def load(data_dir: Path) -> DataSet:
    """List the images below `data_dir`.

    Raises:
        NotFound: a file or folder does not exist; the message names it, or the folders that were searched.
        Damaged: a list has another form, or does not agree with the folders.
    """
    root = find_folder(
        NAME,
        [data_dir / FOLDER, data_dir],
        lambda path: (path / WNIDS).is_file(),
        f"{WNIDS}, {WORDS}, train and val of its archive",
    )
    wnids = _read_wnids(root / WNIDS)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    _check_class_folders(root, wnids)
    files = LabelledFiles(root)
    for wnid, label in labels.items():
        files.add(_train_images(root, wnid), label)
    n_train = len(files)
    annotations = _read_annotations(root / ANNOTATIONS, labels)
    for image in _val_images(root, annotations):
        files.add([image], annotations[_file_name(image)])
    return files.data_set(NAME, class_names(wnids, root / WORDS), n_train)


def _read_wnids(path: Path) -> list[str]:
    wnids = [line.strip() for _, line in read_lines(path)]
    for wnid in wnids:
        if not WNID.fullmatch(wnid):
            raise Damaged(f"data file {path}: expected WordNet numbers such as n01443537, found {wnid!r:.60}")
    if len(wnids) < 2 or len(set(wnids)) < len(wnids):
        raise Damaged(
            f"data file {path} names {len(wnids)} classes, {len(set(wnids))} of them different: "
            "expected at least 2, each once"
        )
    return sorted(wnids)


def _check_class_folders(root: Path, wnids: list[str]) -> None:
    if not (root / "train").is_dir():
        raise NotFound(f"image folder {root / 'train'} does not exist")
    unknown = sorted(set(list_folders(root / "train")) - set(wnids))
    if unknown:
        raise Damaged(f"{root / 'train'} holds {', '.join(unknown[:5])}, which {WNIDS} does not name")


def _train_images(root: Path, wnid: str) -> list[ImageFile]:
    below = f"train/{wnid}/images"
    if not (root / below).is_dir():
        raise NotFound(f"image folder {root / below} does not exist, although {WNIDS} names the class {wnid}")
    images = list_images(root, below, recursive=False)
    if not images:
        raise Damaged(f"{root / below} holds no images")
    return images


def _read_annotations(path: Path, labels: dict[str, int]) -> dict[str, int]:
    """Label by file name."""
    annotations: dict[str, int] = {}
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != _FIELDS:
            raise Damaged(
                f"data file {path}, line {number}: expected a file, a class and four box coordinates, separated by "
                f"tabs, found {line!r:.60}"
            )
        file, wnid = fields[:2]
        if wnid not in labels:
            raise Damaged(f"data file {path}, line {number}: the class {wnid!r:.20} is not in {WNIDS}")
        if file in annotations:
            raise Damaged(f"data file {path}, line {number}: a second line for {file!r:.60}")
        annotations[file] = labels[wnid]
    return annotations


def _val_images(root: Path, annotations: dict[str, int]) -> list[ImageFile]:
    """The images of the validation part, which must be exactly the annotated ones."""
    folder = root / "val/images"
    images = list_images(root, "val/images", recursive=False) if folder.is_dir() else []
    names = {_file_name(image) for image in images}
    missing, unlabelled = sorted(set(annotations) - names), sorted(names - set(annotations))
    if missing:
        raise NotFound(
            f"{len(missing)} of {len(annotations)} images of {ANNOTATIONS} are not in {folder}, such as {missing[0]}; "
            f"if they were sorted into class folders, read the set with --data {shell_path(f'folder:{root}')}"
        )
    if unlabelled:
        raise Damaged(f"{len(unlabelled)} images in {folder} have no line in {ANNOTATIONS}, such as {unlabelled[0]}")
    return images


def _file_name(image: ImageFile) -> str:
    return image.name.rpartition("/")[2]

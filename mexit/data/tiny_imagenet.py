"""Tiny-ImageNet from its original folders: 200 classes of ImageNet, 100,000 + 10,000 pictures of 64 x 64 pixels.

Stanford CS231n, 2015. The layout of the archive `tiny-imagenet-200`:

    wnids.txt                                   the classes, one WordNet number a line
    words.txt                                   WordNet number, tab, words
    train/<wnid>/images/*.JPEG                  (boxes in <wnid>_boxes.txt are not read)
    val/images/*.JPEG, val/val_annotations.txt  file, wnid and box of four numbers, with tabs between
    test/images/*.JPEG                          without labels, so it is not read

Because the test part has no labels, the official test part here is `val`, as in the papers. Classes are in the
order of their numbers, as most code that lists folders has them. Some pictures are grey; `prepare` colours them.
"""

from __future__ import annotations

from pathlib import Path

from mexit.data.dataset import DataSet
from mexit.data.image_files import Listing, Picture, folders, pictures
from mexit.data.wordnet import WNID, WORDS, class_names, read_lines
from mexit.errors import Damaged, NotFound

NAME = "tiny-imagenet"
FOLDER = "tiny-imagenet-200"
WNIDS = "wnids.txt"
ANNOTATIONS = "val/val_annotations.txt"
_FIELDS = 6


def load(data_dir: Path) -> DataSet:
    """List the pictures below `data_dir`; they are decoded when asked for.

    Raises:
        NotFound: a file is not there; names it, or the folders that were searched.
        Damaged: a list that is not what it should be, or does not fit the folders.
    """
    root = _find_root(data_dir)
    wnids = _wnids(root / WNIDS)
    _need_known_folders(root, wnids)
    listing = Listing(root)
    for label, wnid in enumerate(wnids):
        listing.add(_training(root, wnid), label)
    training = len(listing)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    annotated = _annotations(root / ANNOTATIONS, labels)
    for picture in _validation(root, annotated):
        listing.add([picture], annotated[picture.name.rpartition("/")[2]])
    return listing.data_set(NAME, class_names(wnids, root / WORDS), training)


def _find_root(data_dir: Path) -> Path:
    searched = [data_dir / FOLDER, data_dir]
    for root in searched:
        if (root / WNIDS).is_file():
            return root
    raise NotFound(
        f"no {NAME} in {searched[0]} or {searched[1]}: {WNIDS}, {WORDS}, train and val of its archive belong in "
        "one of these; --data-dir or MEXIT_DATA names the folder"
    )


def _wnids(path: Path) -> list[str]:
    found = [line.strip() for _, line in read_lines(path)]
    for line in found:
        if not WNID.fullmatch(line):
            raise Damaged(f"data file {path}: expected WordNet numbers such as n01443537, found {line!r:.60}")
    if len(found) < 2 or len(set(found)) < len(found):
        raise Damaged(
            f"data file {path} names {len(found)} classes, {len(set(found))} of them different: "
            "at least 2 are needed, each once"
        )
    return sorted(found)


def _need_known_folders(root: Path, wnids: list[str]) -> None:
    if not (root / "train").is_dir():
        raise NotFound(f"image folder {root / 'train'} does not exist")
    unknown = sorted(set(folders(root / "train")) - set(wnids))
    if unknown:
        raise Damaged(f"{root / 'train'} holds {', '.join(unknown[:5])}, which {WNIDS} does not name")


def _training(root: Path, wnid: str) -> list[Picture]:
    below = f"train/{wnid}/images"
    if not (root / below).is_dir():
        raise NotFound(f"image folder {root / below} does not exist, though {WNIDS} names the class {wnid}")
    found = pictures(root, below, deep=False)
    if not found:
        raise Damaged(f"{root / below} holds no images")
    return found


def _annotations(path: Path, labels: dict[str, int]) -> dict[str, int]:
    """File name to label."""
    found: dict[str, int] = {}
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != _FIELDS:
            raise Damaged(
                f"data file {path}, line {number}: expected a file, a class and a box of four numbers with tabs "
                f"between, found {line!r:.60}"
            )
        file, wnid = fields[:2]
        if wnid not in labels:
            raise Damaged(f"data file {path}, line {number}: the class {wnid!r:.20} is not in {WNIDS}")
        if file in found:
            raise Damaged(f"data file {path}, line {number}: a second line for {file!r:.60}")
        found[file] = labels[wnid]
    return found


def _validation(root: Path, annotated: dict[str, int]) -> list[Picture]:
    """The pictures of the validation part, which must be those that are annotated."""
    folder = root / "val/images"
    found = pictures(root, "val/images", deep=False) if folder.is_dir() else []
    there = {picture.name.rpartition("/")[2] for picture in found}
    missing, unlabelled = sorted(set(annotated) - there), sorted(there - set(annotated))
    if missing:
        raise NotFound(
            f"{len(missing)} of {len(annotated)} pictures of {ANNOTATIONS} are not in {folder}, such as "
            f"{missing[0]}; a set that was sorted into class folders is read by --data folder:{root}"
        )
    if unlabelled:
        raise Damaged(
            f"{len(unlabelled)} pictures in {folder} have no line in {ANNOTATIONS}, such as {unlabelled[0]}"
        )
    return found

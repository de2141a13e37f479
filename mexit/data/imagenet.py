"""ImageNet (ILSVRC 2012) in the usual arrangement: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`.

O. Russakovsky and others: ImageNet Large Scale Visual Recognition Challenge, IJCV 2015. The labels of the
challenge's test part were never published, so the official test part here is `val`, as in the papers. A set of
fewer classes is read likewise. Classes are in the order of their WordNet numbers, and named by `words.txt` if that
lies beside `train` and `val`, else by number. Some pictures are grey, some CMYK, one is a PNG file named
JPEG: `prepare` goes by content.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mexit.data.dataset import DataSet
from mexit.data.folder import load_class_folders
from mexit.data.image_files import folders, pictures
from mexit.data.wordnet import WNID, WORDS, class_names
from mexit.errors import BadInput, NotFound

NAME = "imagenet"
TRAIN, VAL = "train", "val"


def load(data_dir: Path) -> DataSet:
    """List the pictures below `data_dir`; they are decoded when asked for.

    Raises:
        NotFound: no such folders; names those that were searched.
        BadInput: folders that are no classes of ImageNet, or differ between the parts.
        Damaged: a folder or a file that cannot be read.
    """
    root = _find_root(data_dir)
    for part in (TRAIN, VAL):
        _need_wnids(root / part)
    data = load_class_folders(NAME, root, TRAIN, VAL)
    words = root / WORDS
    return replace(data, classes=class_names(data.classes, words)) if words.is_file() else data


def _find_root(data_dir: Path) -> Path:
    searched = [data_dir / NAME, data_dir]
    for root in searched:
        if (root / TRAIN).is_dir() and (root / VAL).is_dir():
            return root
    raise NotFound(
        f"no {NAME} in {searched[0]} or {searched[1]}: its folders {TRAIN} and {VAL}, each with a folder a class, "
        "belong in one of these; --data-dir or MEXIT_DATA names the folder"
    )


def _need_wnids(part: Path) -> None:
    found = folders(part)
    if not found and pictures(part, deep=False):
        raise BadInput(
            f"{part} holds pictures without class folders: move each into the folder of its class, "
            f"such as {part.name}/n01440764"
        )
    other = [name for name in found if not WNID.fullmatch(name)]
    if other:
        raise BadInput(
            f"{part} holds {', '.join(other[:5])}, which are no WordNet numbers such as n01440764; "
            f"other class folders are read by --data folder:{part.parent}"
        )

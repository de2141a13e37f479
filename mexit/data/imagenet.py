"""Read ImageNet (ILSVRC 2012) from the usual folders `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`.

O. Russakovsky and others: ImageNet Large Scale Visual Recognition Challenge, IJCV 2015. The labels of the test part
were never published, so the official test part here is `val`, as in the papers. A subset of the classes is read too.
Classes are sorted by WordNet number, such as n01443537; `words.txt` beside `train` and `val`, if present, names them.
Some images are grey or CMYK, and one is a PNG file with the suffix .JPEG; `preprocess` decodes all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mexit.core.atomic_io import read_bytes
from mexit.core.manifest import is_class_name
from mexit.core.printable import shell_path
from mexit.data.dataset import DataSet, find_folder
from mexit.data.folder import load_class_folders
from mexit.data.image_files import list_folders, list_images
from mexit.errors import BadInput, Damaged

NAME = "imagenet"
TRAIN, VAL = "train", "val"
WORDS = "words.txt"
WNID = re.compile(r"n\d{8}")
MAX_BYTES = 64 << 20


def load(data_dir: Path) -> DataSet:
    """List the images below `data_dir`.

    Raises:
        NotFound: the folders do not exist; the message names those that were searched.
        BadInput: a folder is not an ImageNet class, or the two parts have different classes.
        Damaged: a folder or a file cannot be read.
    """
    root = find_folder(
        NAME,
        [data_dir / NAME, data_dir],
        lambda path: (path / TRAIN).is_dir() and (path / VAL).is_dir(),
        f"the folders {TRAIN} and {VAL}, each with one folder per class",
    )
    for part in (TRAIN, VAL):
        _check_class_folders(root / part)
    data = load_class_folders(NAME, root, TRAIN, VAL)
    words = root / WORDS
    return replace(data, classes=class_names(data.classes, words)) if words.is_file() else data


def class_names(wnids: Sequence[str], words: Path) -> tuple[str, ...]:
    """Name each class by its first word, or by its number where another class has the same word.

    Args:
        wnids: WordNet numbers, (C,).
        words: `words.txt`; each line is a number, a tab and words separated by commas.

    Raises:
        NotFound: `words` does not exist.
        Damaged: a line has another form.
    """
    first = dict.fromkeys(wnids, "")
    for number, line in read_lines(words):
        wnid, tab, text = line.partition("\t")
        if not tab or not WNID.fullmatch(wnid):
            raise Damaged(f"data file {words}, line {number}: expected n12345678, a tab and words, found {line!r:.60}")
        if wnid in first:
            first[wnid] = text.partition(",")[0].strip()
    counts = Counter(first.values())
    return tuple(word if is_class_name(word) and counts[word] == 1 else wnid for wnid, word in first.items())


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The non-empty lines of a text file with their numbers, from 1. Raises `NotFound`, `Damaged`."""
    try:
        text = read_bytes(path, "data file", MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"data file {path} is not UTF-8 text: {error}") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _check_class_folders(part: Path) -> None:
    folders = list_folders(part)
    if not folders and list_images(part, recursive=False):
        raise BadInput(
            f"{part} holds images without class folders: move each into the folder of its class, such as "
            f"{part.name}/n01440764"
        )
    unknown = [name for name in folders if not WNID.fullmatch(name)]
    if unknown:
        raise BadInput(
            f"{part} holds {', '.join(unknown[:5])}, which are not WordNet numbers such as n01440764; "
            f"--data {shell_path(f'folder:{part.parent}')} reads other class folders"
        )

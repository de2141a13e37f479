"""Names for classes that are numbered as ImageNet numbers them: n01443537 is goldfish."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mexit.core.atomic_io import read_bytes
from mexit.core.manifest import is_class_name
from mexit.errors import Damaged

WORDS = "words.txt"
WNID = re.compile(r"n\d{8}")
MAX_BYTES = 64 << 20


def class_names(wnids: Sequence[str], words: Path) -> tuple[str, ...]:
    """The first word of each class where no other class of the set has the same one, else its number.

    Args:
        wnids: WordNet numbers, (C,).
        words: `words.txt`: a line a number, a tab, its words with commas between.

    Raises:
        NotFound, Damaged: the file is not there, or not what it should be.
    """
    first = dict.fromkeys(wnids, "")
    for number, line in read_lines(words):
        wnid, tab, text = line.partition("\t")
        if not tab or not WNID.fullmatch(wnid):
            raise Damaged(
                f"data file {words}, line {number}: expected n12345678, a tab and words, found {line!r:.60}"
            )
        if wnid in first:
            first[wnid] = text.partition(",")[0].strip()
    seen = Counter(first.values())
    return tuple(word if is_class_name(word) and seen[word] == 1 else wnid for wnid, word in first.items())


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers. Raises `NotFound`, `Damaged`."""
    try:
        text = read_bytes(path, "data file", MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"data file {path} is not UTF-8 text: {error}") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]

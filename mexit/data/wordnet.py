"""Names for classes that are WordNet numbers, as in ImageNet: n01443537 is goldfish."""

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
            raise Damaged(
                f"data file {words}, line {number}: expected n12345678, a tab and words, found {line!r:.60}"
            )
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

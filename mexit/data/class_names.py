"""Read the names of classes from the file `classes.txt` beside class folders.

Each line is the name of a class folder, a tab and the name to show, such as `00000<TAB>Speed limit (20 km/h)`. A comma,
a semicolon or spaces may stand in place of the tab if the lines then begin with folder names. A file with one name
per line is accepted if these are the folder names, or if the folders are numbers and the file has one line for each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mexit.core.atomic_io import read_bytes
from mexit.core.manifest import is_class_name
from mexit.errors import BadInput, Damaged

FILE = "classes.txt"
MAX_BYTES = 16 << 20
_SEPARATORS = (r"\t+", r"\s*[,;]\s*", r"\s+")


def find_class_file(*folders: Path) -> Path | None:
    """The first `classes.txt` in the folders, in any case; None if there is none."""
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name.lower() == FILE and path.is_file():
                return path
    return None


def read_class_names(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The names of classes, in the order of their folders.

    A folder without a line keeps its own name; a name that several folders share is followed by the folder's.

    Args:
        path: `classes.txt`.
        folders: names of the class folders, (C,).

    Raises:
        BadInput: the lines do not name the folders, or a name has control characters.
        Damaged: the file is not UTF-8 text.
    """
    try:
        text = read_bytes(path, "class names", MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged(f"class names {path} are not UTF-8 text: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = _match(lines, folders)
    if names is None:
        raise BadInput(
            f"{path} has {len(lines)} lines that do not name the {len(folders)} class folders ({folders[0]}, ...): "
            "write the folder, a tab and the name on each line, or remove the file"
        )
    bad = next((name for name in names if not is_class_name(name)), None)
    if bad is not None:
        raise BadInput(f"{path}: the class name {bad!r} is empty or has control characters")
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)
    )


def _match(lines: Sequence[str], folders: Sequence[str]) -> list[str] | None:
    """Names of the folders, or None if the lines do not fit them."""
    if set(folders) <= set(lines):
        return list(folders)
    for separator in _SEPARATORS:
        named = {}
        for line in lines:
            folder, *name = re.split(separator, line, maxsplit=1)
            named[folder] = name[0] if name else folder
        if len(named) == len(lines) and set(named) & set(folders):
            return [named.get(folder, folder) for folder in folders]
    numbers = [int(folder) for folder in folders if folder.isdecimal()]
    first = min(numbers, default=0)
    if len(lines) == len(folders) and sorted(numbers) == list(range(first, first + len(lines))) and first in (0, 1):
        return [lines[number - first] for number in numbers]
    return None

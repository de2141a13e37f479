"""`mexit data`: the report of a data set; and the checks of a data set before training."""

from __future__ import annotations

import textwrap
from pathlib import Path

from mexit.core.printable import listed, printable, shell_path
from mexit.core.progress import Progress, Silent
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.dataset_problems import find_problems
from mexit.data.dataset_report import DatasetReport, report_data_set
from mexit.data.groups import default_group
from mexit.data.picture_scan import PictureScan, grey_bits, scan_pictures
from mexit.data.splits import Splits, few_calibrate, few_groups
from mexit.errors import BadInput

__all__ = ["DatasetReport", "check_data", "note_grey_bits", "note_splits", "report_data"]

MAX_SCAN_S = 60.0  # before training; thousands of small pictures take seconds
_SHOWN_CLASSES = 10
_UNBROKEN = "\0"  # stands for a space at which no line ends


def report_data(
    data: str, *, data_dir: str | Path | None = None, group: str | None = None, progress: Progress | None = None
) -> DatasetReport:
    """Read every picture of a data set and report classes, counts, sizes, groups and problems.

    Args:
        data: name of a data set, "folder:PATH", or the path of a folder.
        data_dir: directory of the named data sets, default `MEXIT_DATA`.
        group: how groups are found, see `data.groups.find_groups`; None = as training finds them.
        progress: shows the number of pictures.

    Raises:
        UsageError, NotFound, BadInput, Damaged, MissingExtra: the data set cannot be listed.
    """
    name = registry.data_name(data)
    data_set = registry.load(name, data_dir)
    return report_data_set(data_set, default_group(name) if group is None else group, progress)


def check_data(data: DataSet, progress: Progress | None = None) -> PictureScan | None:
    """Note the classes of a data set and its problems before training.

    Pictures in files are decoded for at most `MAX_SCAN_S` seconds.

    Returns:
        What was read, for `note_grey_bits`; None if the pictures are not files.

    Raises:
        BadInput: a picture cannot be read; the message names it.
    """
    progress = progress or Silent()
    _note(progress, f"{len(data.classes)} classes: {listed(data.classes, _SHOWN_CLASSES, printable)}")
    _note_parts(data, progress)
    if not data.streamed:
        return None
    scan = scan_pictures(data, most_seconds=MAX_SCAN_S, progress=progress)
    problems = find_problems(data, scan)
    blocking = [problem for problem in problems if problem.blocks]
    if blocking:
        raise BadInput(f"{'; '.join(problem.text for problem in blocking)}; {_command(data)} lists all problems")
    for problem in problems:
        _note(progress, f"warning: {problem.text}")
    if not scan.complete:
        seen, command = len(scan.pictures), _command(data).replace(" ", _UNBROKEN)
        _note(
            progress,
            f"{seen:,} of {len(data):,} pictures were checked in {MAX_SCAN_S:.0f} s; {command} checks all",
        )
    return scan


def note_grey_bits(scan: PictureScan | None, splits: Splits, progress: Progress | None = None) -> int | None:
    """Bits that the grey values of 16-bit files use, see `picture_scan.grey_bits`; None without such files.

    Only training pictures choose the number: a brighter one of another split is clipped, as it is in serving.

    Args:
        scan: what `check_data` read.
        splits: of the data set.
        progress: receives a note if it is not 16.
    """
    bits = None if scan is None else grey_bits(scan, splits.part("train"))
    if bits not in (None, 16):
        _note(
            progress or Silent(),
            f"grey values of 16-bit files use {bits} bits: they are divided by {1 << (bits - 8)}, in serving too",
        )
    return bits


def note_splits(data: DataSet, splits: Splits, progress: Progress) -> None:
    """Note before training what export would refuse after it, and classes with few objects."""
    for few in filter(None, (few_calibrate(splits), few_groups(data, splits))):
        _note(progress, f"warning: {few}")


def _note_parts(data: DataSet, progress: Progress) -> None:
    if data.official_val is not None:
        _note(
            progress,
            f"the {len(data.official_val):,} pictures of the validation part and those of the training part are "
            "divided into train, selection, calibration and certification; the test part stays",
        )


def _note(progress: Progress, text: str) -> None:
    """Note a sentence in lines of 80 columns; a command in it stays whole."""
    lines = textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    progress.note(lines.replace(_UNBROKEN, " "))


def _command(data: DataSet) -> str:
    return f"mexit data {shell_path(data.name)}"

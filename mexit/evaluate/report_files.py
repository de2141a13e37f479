"""Write the details of an evaluation: pictures as PNG files, and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import write_bytes
from mexit.evaluate import detail_plots, plots
from mexit.evaluate.confusion import thin
from mexit.evaluate.contact_sheet import contact_sheet
from mexit.evaluate.details import Details
from mexit.evaluate.report_page import report_page

CONFUSION, CLASSES, SHEET, RELIABILITY = "confusion.png", "classes.png", "contact_sheet.png", "reliability.png"
PAGE = "report.html"
_MISSING = (
    f"{CONFUSION}, {CLASSES} and {RELIABILITY} were not drawn, because the package 'matplotlib' is not installed: "
    "pip install 'mexit[train]'. This page shows the same numbers."
)


def write_details(details: Details, report: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write the files; all PNG files but the contact sheet need matplotlib.

    Args:
        details: what to write.
        report: of `flows.evaluate`, for the page.
        folder: receives the files.
        name: of the run or bundle, for titles.

    Returns:
        The paths.
    """
    title, drawn = f"{name}: test split, {details.answers.name}", []
    written = [folder / SHEET, folder / PAGE]
    write_bytes(written[0], contact_sheet(title, details.sheets, details.classes))
    if plots.available():
        drawn = [folder / CONFUSION, folder / CLASSES, folder / RELIABILITY]
        detail_plots.confusion(thin(details.matrix), details.classes, drawn[0], title)
        detail_plots.class_accuracy(details.rows, float(details.answers.correct.mean()), drawn[1], title)
        detail_plots.reliability(details.reliability, drawn[2], f"{name}: test split")
    write_bytes(written[1], report_page(name, report, details, () if drawn else (_MISSING,)))
    return drawn + written


def remove_details(folder: Path) -> None:
    """Remove the files of an earlier evaluation, which do not belong to the present report."""
    for name in (CONFUSION, CLASSES, SHEET, RELIABILITY, PAGE):
        (folder / name).unlink(missing_ok=True)

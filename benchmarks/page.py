"""Write a result page: command, commit, machine, versions, and the results. Every benchmark program uses it.

A page is `benchmarks/results/<what>_<hardware>_<date>.md`. It also states what failed.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mexit import __version__
from mexit.flows.bench import machine

ROOT = Path(__file__).parents[1]


def write_page(what: str, hardware: str, title: str, parts: Sequence[str]) -> Path:
    """Write the page and return its path.

    Args:
        what, hardware: parts of the file name, such as `calibration_speed` and `2-core-cpu`.
        title: heading of the page.
        parts: paragraphs and tables in Markdown.
    """
    today = datetime.date.today().isoformat()
    about = machine()
    head = [
        f"# {title}",
        f"`python {' '.join(map(_typed, sys.argv))}`, commit {_commit()}, {today}.",
        f"{about['cpu']}, {about['cores']} cores, {about['system']}; mexit {__version__}, "
        f"Python {platform.python_version()}, numpy {np.__version__}.",
    ]
    path = ROOT / "benchmarks" / "results" / f"{what}_{hardware}_{today}.md"
    path.write_text("\n\n".join([*head, *parts]) + "\n")
    print(path.read_text())
    return path


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _commit() -> str:
    if shutil.which("git") is None or not (ROOT / ".git").exists():  # a copy on a lent machine
        return "unknown"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "mexit"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _typed(argument: str) -> str:
    """Strip the directory of an absolute path, also after `folder:`, which is specific to this machine."""
    prefix, colon, path = argument.rpartition(":")
    return prefix + colon + Path(path).name if Path(path).is_absolute() else argument

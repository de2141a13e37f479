"""Reports of evaluations: one file for each set of attacks, and rows of budgets that share a policy.

`evaluation.json` is the latest report. Each report is also stored under the names of its attacks, for example
`evaluation-pgd-autoattack.json`, so that a later evaluation with other attacks does not replace it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import read_json, to_json, write_bytes
from mexit.errors import Damaged

LATEST = "evaluation.json"
_PATTERN = "evaluation-*.json"


@dataclass(frozen=True)
class SavedReport:
    """What `save` wrote and found.

    Attributes:
        written: paths of the latest report and of its own file.
        others: file name to the stored report of other attacks on the same weights, by name.
        replaced: whether reports of other weights were removed.
    """

    written: tuple[Path, ...]
    others: Mapping[str, Mapping[str, Any]]
    replaced: bool


def save(folder: Path, report: Mapping[str, Any]) -> SavedReport:
    """Store a report; earlier ones of the same attacks or of other weights are replaced, all others are kept.

    Args:
        folder: of the reports.
        report: of `flows.evaluate`; `settings.model_sha256` identifies the weights.
    """
    _keep_latest(folder)
    own, others, replaced = file_name(report), {}, False
    for path in sorted(folder.glob(_PATTERN)):
        stored = _read(path)
        model = stored.get("settings", {}).get("model_sha256")
        if path.name == own or model is None:  # a version without the key stored it: of unknown weights
            continue
        if model != report["settings"]["model_sha256"]:
            path.unlink()
            replaced = True
        else:
            others[path.name] = stored
    for name in (own, LATEST):
        write_bytes(folder / name, to_json(report))
    return SavedReport((folder / LATEST, folder / own), others, replaced)


def file_name(report: Mapping[str, Any]) -> str:
    """The name of a report's own file: `evaluation-` and its attacks."""
    settings = report["settings"]
    words = [*settings["attacks"], *(["transfer"] if settings.get("transfer_from") else [])]
    return f"evaluation-{'-'.join(words) or 'clean'}.json"


def merged_budgets(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The report's budgets with their rows; budgets that share a policy are one, such as "low, medium"."""
    budgets = report["budgets"]
    groups = report["settings"].get("same_policy") or [[name] for name in budgets]
    return [(", ".join(names), budgets[names[0]]) for names in groups]


def reject_sentence(report: Mapping[str, Any]) -> str:
    """The share of clean images that the budgets with a reject option answer; empty without such budgets."""
    parts = []
    for names, row in merged_budgets(report):
        entry = row["clean"]
        if "answered" in entry:
            correct = entry["answered_correctly"]
            of_them = "" if correct is None else f", {correct:.1%} of them correctly"
            parts.append(f"{names} answers {entry['answered']:.1%} of the clean images{of_them}")
    if not parts:
        return ""
    return f"Reject option: {'; '.join(parts)}. Accuracy counts an unsure answer with the class that it withholds."


def _keep_latest(folder: Path) -> None:
    """Give the latest report a file of its own if it has none, as after an evaluation by an earlier version."""
    latest = _read(folder / LATEST)
    with suppress(KeyError, TypeError):
        own = folder / file_name(latest)
        if not own.exists():
            write_bytes(own, to_json(latest))


def _read(path: Path) -> Mapping[str, Any]:
    """A stored report; empty if there is none or it cannot be read."""
    if not path.exists():
        return {}
    try:
        content = read_json(path, "report")
    except Damaged:
        return {}
    usable = isinstance(content, dict) and isinstance(content.get("settings"), dict)
    return content if usable else {}

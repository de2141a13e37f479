"""Expected and test results of each budget, and whether they differ by more than chance.

The expected accuracy and cost are measured on the certification split, the test results on the test split. Neither
split selects anything but the reject thresholds, which the certification split selects. The table is plain JSON values,
`reports/expected_and_test.json` in a bundle, one entry for each engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from mexit.calibrate.clusters import Estimate, difference_interval
from mexit.calibrate.reject import RejectSamples, reject_outcome
from mexit.calibrate.trace_evaluator import TraceEvaluator
from mexit.core.atomic_io import read_json, to_json, write_bytes
from mexit.core.budget import format_macs, short_macs
from mexit.core.policies_file import FrontierPoint, PolicyEntry
from mexit.errors import Damaged, NotFound

FILE = Path("reports") / "expected_and_test.json"
CONFIDENCE = 0.95
MAX_NAMES = 3  # classes in a sentence
VISIBLE = 0.01  # share of a budget by which an expected cost exceeds it before a sentence says so
MAX_EXCESS = 0.05  # share of the expected cost by which the test cost may exceed it


def expected_and_test(
    entry: PolicyEntry,
    certification: TraceEvaluator,
    test: TraceEvaluator | None,
    *,
    of: int = 0,
    missing: str = "",
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare the certification split with the test split, for every named budget.

    Args:
        entry: the policies; budgets that share one are compared once.
        certification: measures what is expected.
        test: measures the test results; None without a test split.
        of: number of images in the test split, of which `test` may have fewer.
        missing: the reason why there are no test results.
        classes: names of the classes, (C,), for sentences about classes that one of the splits lacks.

    Returns:
        `engine`, `precision`, `variant`, `confidence`, `certification` and `test` (`n`, `groups`; the latter also `of`;
        None without a test split), `missing`, `budgets` (one row for each policy) and `warnings` (sentences).
    """
    rows = [_row(names, point, entry, certification, test) for names, point in entry.by_policy()]
    unlike = (
        [] if test is None else _lacking_classes(certification, test, classes) + _shared_groups(certification, test)
    )
    return {
        "engine": entry.engine,
        "precision": entry.precision,
        "variant": entry.variant,
        "confidence": CONFIDENCE,
        "certification": _size(certification),
        "test": None if test is None else _size(test) | {"of": of},
        "missing": missing,
        "budgets": rows,
        "warnings": [*_over_budget(rows), *(sentence for row in rows for sentence in _warnings(row)), *unlike],
    }


def save(bundle: Path, model: str, table: Mapping[str, Any]) -> Path:
    """Write the table of one engine into a bundle; tables of other engines of the same model are kept.

    Args:
        bundle: its directory.
        model: its id.
        table: the result of `expected_and_test`.

    Returns:
        The path of the file.
    """
    others = [other for other in _stored(bundle, model) if _key(other) != _key(table)]
    write_bytes(bundle / FILE, to_json({"model": model, "entries": [*others, table]}))
    return bundle / FILE


def load(bundle: Path, model: str, entry: PolicyEntry) -> Mapping[str, Any] | None:
    """The stored table of an engine's policies; None if there is none, or if it is about other thresholds."""
    expected = [list(point.thresholds) for _, point in entry.by_policy()]
    for table in _stored(bundle, model):
        if _key(table) == (entry.engine, entry.precision, entry.variant):
            return table if [row["thresholds"] for row in table["budgets"]] == expected else None
    return None


def _stored(bundle: Path, model: str) -> list[Mapping[str, Any]]:
    """The stored tables of a model; none if the file cannot be used."""
    with suppress(NotFound, Damaged, KeyError, TypeError, AttributeError):
        content = read_json(bundle / FILE, "report")
        if content["model"] == model:
            return [table for table in content["entries"] if _key(table)]
    return []


def _key(table: Mapping[str, Any]) -> tuple[str, str, str]:
    return table["engine"], table["precision"], table["variant"]


def _row(
    names: Sequence[str],
    point: FrontierPoint,
    entry: PolicyEntry,
    certification: TraceEvaluator,
    test: TraceEvaluator | None,
) -> dict[str, Any]:
    """The row of one policy: accuracy (None without labels) and cost on both splits."""
    thresholds = point.thresholds
    expected = certification.accuracy(thresholds)
    tested = None if test is None else test.accuracy(thresholds)
    cost, test_cost = certification.cost(thresholds), None if test is None else test.cost(thresholds)
    return {
        "names": list(names),
        "budget_macs": [entry.frontier[entry.named[name]].budget_macs for name in names],
        "thresholds": list(thresholds),
        "accuracy": None if expected is None else _compare(expected, tested),
        "cost": _compare(cost, test_cost) | {"too_high": _exceeds(cost, test_cost)},
        "reject": _reject(point, test),
        "exits": list(certification.outcome(thresholds).exits),
        "test_exits": None if test is None else list(test.outcome(thresholds).exits),
    }


def _reject(point: FrontierPoint, test: TraceEvaluator | None) -> dict[str, Any] | None:
    """Coverage and error among the answered, expected and in the test; None without a reject option."""
    if point.rejected is None:
        return None
    tested = None if test is None or test.labels is None else reject_outcome(RejectSamples(test), point)
    return {
        "coverage": {"expected": point.rejected.coverage, "test": tested.coverage if tested else None},
        "error": {"expected": point.rejected.error, "test": tested.error if tested else None},
    }


def _compare(expected: Estimate, test: Estimate | None) -> dict[str, Any]:
    """Both estimates; test minus expected, the interval of a test result that chance explains, and if it is outside."""
    values: dict[str, Any] = {"expected": _estimate(expected), "test": None, "difference": None, "half_width": None}
    if test is None:
        return values | {"outside": False}
    difference = test.value - expected.value
    half_width = difference_interval(test, expected, CONFIDENCE)[1] - difference
    finite = half_width if isfinite(half_width) else None
    outside = finite is not None and abs(difference) > finite
    return values | {"test": _estimate(test), "difference": difference, "half_width": finite, "outside": outside}


def _exceeds(expected: Estimate, test: Estimate | None) -> bool:
    """Whether the test cost is significantly more than `MAX_EXCESS` above the expected one."""
    if test is None:
        return False
    factor = 1 + MAX_EXCESS
    limit = replace(expected, value=factor * expected.value, stderr=factor * expected.stderr)
    return difference_interval(test, limit, CONFIDENCE)[0] > 0


def _over_budget(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence if the expected cost exceeds budgets by more than `VISIBLE`."""
    found = []
    for row in rows:
        expected = row["cost"]["expected"]["value"]
        for name, limit in zip(row["names"], row["budget_macs"], strict=True):
            if expected > (1 + VISIBLE) * limit:
                found.append(f"{name} {short_macs(expected)} of {format_macs(limit)}")
    if not found:
        return []
    return [
        f"expected above the budget: {', '.join(found)}; a budget holds for the mean of the images that select the "
        "thresholds, and the mean of others may be higher"
    ]


def _warnings(row: Mapping[str, Any]) -> list[str]:
    """One sentence for each result of a row that lies outside what is expected."""
    names, accuracy, cost = ", ".join(row["names"]), row["accuracy"], row["cost"]
    sentences = []
    if accuracy and accuracy["outside"]:
        value, half = accuracy["expected"]["value"], accuracy["half_width"]
        low, high = max(value - half, 0.0), min(value + half, 1.0)
        sentences.append(
            f"{names}: the test accuracy, {accuracy['test']['value']:.1%}, lies outside the expected interval, "
            f"{low:.1%} to {high:.1%}: chance alone does that in {1 - CONFIDENCE:.0%} of the cases, else the test "
            "images are unlike the images that calibrate and certify"
        )
    if cost["too_high"]:
        sentences.append(
            f"{names}: the mean test cost, {format_macs(cost['test']['value'])}, is significantly more than "
            f"{MAX_EXCESS:.0%} above the expected {format_macs(cost['expected']['value'])}"
        )
    return sentences


def _lacking_classes(certification: TraceEvaluator, test: TraceEvaluator, classes: Sequence[str]) -> list[str]:
    """One sentence for each split without pictures of some classes that the other one has."""
    if certification.labels is None or test.labels is None:
        return []
    certified, tested = set(certification.labels.tolist()), set(test.labels.tolist())
    sentences = []
    for part, other, result, lacking in (
        ("certification", "test", "expected", tested - certified),
        ("test", "certification", "test", certified - tested),
    ):
        if lacking:
            names = [classes[label] if label < len(classes) else str(label) for label in sorted(lacking)]
            shown = ", ".join(names[:MAX_NAMES]) + (" and others" if len(names) > MAX_NAMES else "")
            sentences.append(
                f"the {part} split has no pictures of {len(names)} of the classes of the {other} split ({shown}): the "
                f"{result} results do not count them"
            )
    return sentences


def _shared_groups(certification: TraceEvaluator, test: TraceEvaluator) -> list[str]:
    """A sentence if both splits have pictures of the same groups, which makes their results alike."""
    if certification.groups is None or test.groups is None:
        return []
    shared = set(certification.groups.tolist()) & set(test.groups.tolist())
    if not shared:
        return []
    return [
        f"{len(shared)} of the {len(set(test.groups.tolist()))} groups of the test split are in the certification "
        "split too: the test results agree better with the expected ones than those of new objects would"
    ]


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "stderr": estimate.stderr if isfinite(estimate.stderr) else None}


def _size(evaluator: TraceEvaluator) -> dict[str, Any]:
    """Number of samples, and of groups (None without groups)."""
    groups = None if evaluator.groups is None else len(set(evaluator.groups.tolist()))
    return {"n": evaluator.scores.shape[1], "groups": groups}

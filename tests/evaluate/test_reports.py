"""Stored reports: those of other attacks are kept, those of the same attacks or of other weights are replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mexit.evaluate.reports import LATEST, file_name, merged_budgets, save


def make_report(*attacks: str, model: str = "a", value: float = 0.5, transfer: str | None = None) -> dict[str, Any]:
    settings = {"attacks": list(attacks), "transfer_from": transfer, "model_sha256": model}
    return {"exits": [{"clean": value}], "budgets": {}, "settings": settings}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_reports_of_other_attacks_are_kept_and_returned(tmp_path: Path) -> None:
    attacked, clean = make_report("pgd", "autoattack"), make_report(value=0.9)
    assert save(tmp_path, attacked).others == {}
    saved = save(tmp_path, clean)
    assert saved.written == (tmp_path / LATEST, tmp_path / "evaluation-clean.json")
    assert saved.others == {"evaluation-pgd-autoattack.json": attacked}
    assert not saved.replaced
    assert read(tmp_path / LATEST) == read(tmp_path / "evaluation-clean.json") == clean
    others = save(tmp_path, make_report("pgd")).others
    assert list(others) == ["evaluation-clean.json", "evaluation-pgd-autoattack.json"]


def test_a_report_of_the_same_attacks_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, make_report("pgd"))
    assert save(tmp_path, make_report("pgd", value=0.7)).others == {}
    assert names(tmp_path) == ["evaluation-pgd.json", LATEST]
    assert read(tmp_path / "evaluation-pgd.json")["exits"] == [{"clean": 0.7}]


def test_reports_of_other_weights_are_removed(tmp_path: Path) -> None:
    save(tmp_path, make_report("pgd"))
    save(tmp_path, make_report("corruptions"))
    saved = save(tmp_path, make_report(model="b"))
    assert (saved.others, saved.replaced) == ({}, True)
    assert names(tmp_path) == ["evaluation-clean.json", LATEST]


def test_the_report_of_an_earlier_version_is_kept_under_its_own_name(tmp_path: Path) -> None:
    old = make_report("pgd", "sanity")
    del old["settings"]["model_sha256"]
    (tmp_path / LATEST).write_text(json.dumps(old))
    saved = save(tmp_path, make_report())
    assert saved.others == {}, "its weights are unknown"
    assert read(tmp_path / "evaluation-pgd-sanity.json") == old
    save(tmp_path, make_report(model="b"))
    assert read(tmp_path / "evaluation-pgd-sanity.json") == old


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"settings": 3}', b'{"settings": {"attacks": 3}}'])
def test_a_damaged_report_does_not_stop_an_evaluation(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LATEST).write_bytes(content)
    (tmp_path / "evaluation-pgd.json").write_bytes(content)
    assert save(tmp_path, make_report()).others == {}
    assert read(tmp_path / LATEST) == make_report()


def test_a_file_is_named_after_its_attacks() -> None:
    assert file_name(make_report()) == "evaluation-clean.json"
    assert file_name(make_report("pgd", transfer="runs/other")) == "evaluation-pgd-transfer.json"


def test_budgets_of_one_policy_are_one_row() -> None:
    budgets = {"low": {"a": 1}, "medium": {"a": 1}, "high": {"a": 2}}
    report = {"budgets": budgets, "settings": {"same_policy": [["low", "medium"], ["high"]]}}
    assert merged_budgets(report) == [("low, medium", {"a": 1}), ("high", {"a": 2})]
    assert [names for names, _ in merged_budgets({"budgets": budgets, "settings": {}})] == ["low", "medium", "high"]

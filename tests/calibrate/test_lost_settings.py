"""Two calibrations are compared: what the new one lacks is named with the command that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mexit import Bundle
from mexit.calibrate.lost_settings import lost_settings
from mexit.core.policies_file import Policies, PolicyEntry, RejectTerms

PATH = Path("bundles/my signs")
COMMAND = "mexit calibrate 'bundles/my signs' --backend ort"


@pytest.fixture(scope="module")
def plain(digits_bundle: Path) -> PolicyEntry:
    """An entry without reject option, certificates and own budgets."""
    return Bundle.open(digits_bundle).policies().entry("ort", "fp32", "fp32")


def certificate(name: str, **changed: Any) -> Mapping[str, Any]:
    values = {"name": name, "max_risk": 0.02, "loss": "early-error", "confidence": 0.9, "max_macs": None}
    return values | changed


def compare(before: PolicyEntry, after: PolicyEntry | None) -> tuple[tuple[str, str], ...]:
    new = Policies("another model", () if after is None else (after,))
    return tuple((one.text, one.command) for one in lost_settings(Policies("model", (before,)), new, PATH))


def test_nothing_is_said_where_nothing_is_missing(plain: PolicyEntry) -> None:
    more = replace(plain, reject=RejectTerms(0.05, 0.9, None, 81, None, None), certificates=(certificate("target"),))
    assert compare(plain, plain) == compare(plain, more) == compare(more, more) == ()


@pytest.mark.parametrize(("source", "typed"), [("folder:other things", "'folder:other things'"), (None, "folder:PATH")])
def test_a_reject_option_is_restored_with_its_pictures_of_other_things(
    plain: PolicyEntry, source: str | None, typed: str
) -> None:
    rejecting = replace(plain, reject=RejectTerms(0.05, 0.9, 0.1, 81, None, 60, source))
    [(text, command)] = compare(rejecting, plain)
    assert "the reject option (at most 5.00% wrong answers) and its bound for pictures of other things" in text
    assert command == f"{COMMAND} --max-error 0.05 --reject-from {typed} --max-unknown 0.1 --confidence 0.9"


def test_certificates_and_own_budgets_are_restored(plain: PolicyEntry) -> None:
    certificates = (
        certificate("certified", confidence=0.95, loss="disagreement", max_macs=4e4),
        certificate("target", confidence=0.95, loss="accuracy-gap"),
    )
    [(text, command)] = compare(replace(plain, certificates=certificates, budgets={"night": "30%"}), plain)
    assert (
        "the budget certified with its certificate, the budget target with its certificate and the budget night" in text
    )
    assert command == (
        f"{COMMAND} --max-risk 0.02 --loss disagreement --max-cost 40000 --target-drop 0.02 --budget night=30%"
    )


def test_the_command_keeps_what_the_new_calibration_has(plain: PolicyEntry) -> None:
    rejecting = replace(plain, reject=RejectTerms(0.05, 0.9, None, 81, None, None))
    certified = replace(plain, certificates=(certificate("certified", max_risk=0.1, confidence=0.8),))
    [(text, command)] = compare(rejecting, certified)
    assert "certified" not in text
    assert command == f"{COMMAND} --max-error 0.05 --max-risk 0.1 --confidence 0.8"


def test_an_engine_without_a_new_calibration_is_named(plain: PolicyEntry) -> None:
    other = replace(plain, engine="openvino", precision="bf16")
    [(text, command)] = compare(other, plain)
    assert "thresholds, which the replaced calibration for openvino:bf16 had" in text
    assert command == "mexit calibrate 'bundles/my signs' --backend openvino:bf16"

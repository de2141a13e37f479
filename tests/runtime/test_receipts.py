"""Receipts: what they say is true, and together they are the ledger."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mexit import Bundle, Overloaded, Runtime
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle


@pytest.fixture(scope="module")
def runtime(mixed_bundle) -> Runtime:
    return Runtime.open(mixed_bundle, "60%")


@pytest.fixture(scope="module")
def tensor(runtime, test_digits) -> np.ndarray:
    return runtime.prepare(list(test_digits[0]))


def test_they_are_written_only_when_asked_for(runtime, tensor) -> None:
    assert {found.receipt for found in runtime.answer_tensor(tensor[:9])} == {None}
    assert runtime.answer_tensor(tensor[:1])[0].to_json()["receipt"] is None


def test_a_receipt_says_what_its_prediction_says_and_more(runtime, tensor) -> None:
    for found in runtime.answer_tensor(tensor[:70], receipts=True):
        receipt, wire = found.receipt, found.receipt_json()
        assert (wire["exit"], wire["reason"], wire["macs"]) == (found.exit, found.reason, found.macs)
        assert (wire["saved_macs"], wire["budget"]) == (found.saved_macs, "60%")
        assert list(wire) == [
            "exit", "reason", "macs", "saved_macs", "segment_us", "rows", "queue_us", "budget", "certificates", "model",
        ]  # fmt: skip
        assert receipt.model == runtime.bundle.id
        assert len(receipt.segment_us) == found.exit
        assert min(receipt.segment_us) > 0
        assert receipt.rows in (64, 6)
        assert receipt.queue_us + sum(receipt.segment_us) == pytest.approx(found.latency_ms * 1e3, rel=1e-9)
        assert json.loads(json.dumps(found.to_json()))["receipt"]["macs"] == found.macs


def test_what_waited_before_the_call_is_in_the_queue(runtime, tensor) -> None:
    [found] = runtime.answer_tensor(tensor[:1], queued_s=2.0, receipts=True)
    segments_us = sum(found.receipt.segment_us)
    assert found.receipt.queue_us + segments_us == pytest.approx(2e6 + found.latency_ms * 1e3, rel=1e-9)


def test_together_they_are_the_ledger_to_the_last_mac(mixed_bundle, runtime, tensor) -> None:
    """Thousands of answers: batches of every size, budgets, last exits, deadlines, a rate limiter that intervenes."""
    full = runtime.bundle.manifest.cumulative_macs[-1]
    rate_limited = Runtime.open(mixed_bundle, "60%", rate=4000 * full, burst=20 * full, client_rate=3000 * full)
    rng, found, refused = np.random.default_rng(1), [], 0
    while len(found) < 4000:
        rows = rng.integers(0, len(tensor), rng.choice([1, 7, 64, 65, 150]))
        options = {
            "budget": ("low", "60%", "full")[rng.integers(3)],
            "max_exit": (None, None, 2)[rng.integers(3)],
            "deadline_ms": (None, None, 0.001, 50.0)[rng.integers(4)],
            "client": "ab"[rng.integers(2)],
        }
        call = rate_limited.begin(tensor[rows], receipts=True, wait_ms=20.0, **options)
        try:
            while not call.done:
                if call.acquire_tokens() == 0:
                    rate_limited.run(call)
        except Overloaded:
            refused += 1
        found += call.predictions  # also those of a call that was refused half-way
    snapshot = rate_limited.stats.snapshot()
    assert snapshot.predictions == len(found)
    assert snapshot.macs == sum(one.macs for one in found)
    assert snapshot.saved_macs == sum(one.saved_macs for one in found)
    assert snapshot.rate_limited == sum(one.reason == "rate-limit" for one in found)
    assert {one.reason for one in found} == {"confident", "last", "deadline", "rate-limit", "max-exit"}
    assert refused > 0


def test_certificates_hold_for_undisturbed_answers_of_their_budgets(mixed_bundle, tmp_path, tensor) -> None:
    """A certificate of the frontier's points 10 to 20; its risk does not matter here."""
    path = Path(shutil.copytree(mixed_bundle, tmp_path / "digits"))
    options = CalibrateOptions(
        policy="geometric", measure="max-probability", max_risk=0.2, confidence=0.9, attack="none"
    )
    result = calibrate_bundle(path, options=options)
    [certificate] = result.entry.certificates
    entry = replace(result.entry, certificates=({**certificate, "first": 10, "last": 20},))
    bundle = Bundle.open(path)
    bundle.save_policies(bundle.policies().with_entry(entry))
    runtime = Runtime.open(path, "full")

    def certified(place: int | None, reason: str, **options) -> set[tuple[str, ...]]:
        budget = "full" if place is None else f"{entry.frontier[place].budget_macs + 1:.0f}"
        found = runtime.answer_tensor(tensor, budget=budget, receipts=True, **options)
        return {one.receipt.certificates for one in found if one.reason == reason}

    for place in (10, 15, 20):
        assert certified(place, "confident") == {(certificate["id"],)}
    for place in (9, 21):
        assert certified(place, "confident") == {()}
    assert certified(None, "last") == {()}
    assert certified(15, "max-exit", max_exit=1) == {()}
    assert certified(15, "deadline", deadline_ms=1e-6) == {()}

"""Memory stays bounded over 300,000 predictions or requests, and the check that says so detects a planted leak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PREDICTIONS = 300_000
REQUESTS = int(os.environ.get("MEXIT_SOAK_REQUESTS", "300000"))

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("leak_bytes", "bounded"), [(0, True), (16, False)], ids=["as it is", "planted leak"])
def test_memory_over_many_predictions(digits_bundle, leak_bytes, bounded, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_slope

    program = BENCHMARKS / "memory_slope.py"
    command = [sys.executable, program, "--work", digits_bundle, str(PREDICTIONS), str(leak_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout)
    growth = memory_slope.slope(np.array(run["counts"]), np.array(run["resident"]))
    assert growth.passed == bounded, growth


@pytest.mark.parametrize(
    ("workers", "leak_bytes", "bounded"),
    [(0, 0, True), (2, 0, True), (0, 16, False)],
    ids=["one process", "worker processes", "planted leak"],
)
def test_memory_of_the_server_over_many_requests(
    digits_bundle, workers: int, leak_bytes: int, bounded: bool, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_slope

    arguments = map(str, (digits_bundle, REQUESTS, workers, leak_bytes))
    command = [sys.executable, BENCHMARKS / "server_memory.py", "--work", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout)
    assert set(run["statuses"]) == {"200", "400", "404"}
    growth = memory_slope.slope(np.array(run["counts"]), np.array(run["resident"]))
    assert growth.passed == bounded, growth

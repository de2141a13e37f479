"""The check of `benchmarks/memory_slope.py` on series whose growth is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "memory_slope.py"
SAMPLES, EACH, PAGE = 1000, 1000, 4096


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("memory_slope", PROGRAM)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "memory_slope", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def series(seed: int, leak: float, jumps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A million predictions: warm-up, pages that come and go, pages taken for good, and a leak in bytes each."""
    rng = np.random.default_rng(seed)
    counts = np.arange(SAMPLES) * EACH
    warm_up = 2_000_000 * (1 - np.exp(-counts / 50_000))
    comes_and_goes = PAGE * rng.integers(0, 8, SAMPLES)
    taken = np.zeros(SAMPLES)
    taken[rng.choice(SAMPLES, jumps, replace=False)] = 8 * PAGE
    resident = 75_000_000 + warm_up + comes_and_goes + taken.cumsum() + leak * counts
    return counts, (resident // PAGE * PAGE).astype(np.int64)


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_rare_steps_pass_and_a_leak_does_not(program, seed: int) -> None:
    calm = program.slope(*series(seed, 0, 5))
    assert calm.passed, calm
    leaking = program.slope(*series(seed, 16, 5))
    assert not leaking.passed
    assert leaking.estimate == pytest.approx(16, abs=1)


def test_growth_before_the_second_half_does_not_count(program) -> None:
    counts, resident = series(0, 0, 0)
    resident[: SAMPLES // 4] -= 50_000_000
    assert program.slope(counts, resident).passed


def test_the_bound_holds_as_often_as_it_says(program) -> None:
    """Steps at random, 4 bytes a prediction in the mean: the truth is above the bound in about 1 of 100 series."""
    above = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        steps = rng.poisson(0.1, SAMPLES) * 10 * EACH * program.LIMIT_BYTES
        counts = np.arange(SAMPLES) * EACH
        above += program.slope(counts, steps.cumsum().astype(np.int64), seed).upper < program.LIMIT_BYTES
    assert above <= 12  # 3 are expected, more by the bootstrap's own error on a skewed sample


def test_a_series_that_never_moves_has_no_slope(program) -> None:
    counts = np.arange(SAMPLES) * EACH
    found = program.slope(counts, np.full(SAMPLES, 75_000_000))
    assert (found.estimate, found.upper, found.passed) == (0.0, 0.0, True)

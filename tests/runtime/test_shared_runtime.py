"""Threads that call one runtime share batches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit import Runtime
from mexit.errors import Overloaded, UsageError
from mexit.runtime.fair_buckets import FairBuckets
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.shared_runtime import SharedRuntime
from mexit.runtime.token_buckets import RateLimit


@pytest.mark.parametrize("callers", [1, 4])
def test_the_answers_are_those_of_the_runtime(
    mixed_bundle: Path, test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]], callers: int
) -> None:
    runtime = Runtime.open(mixed_bundle, "low")
    images = test_digits[0][:60]
    alone = [prediction for image in images for prediction in runtime(image)]
    shared = SharedRuntime(runtime, callers)
    with ThreadPoolExecutor(callers) as threads:
        together = [answer for [answer] in threads.map(lambda image: shared(image, receipts=True), images)]
    shared.close()
    assert [(one.label, one.exit) for one in together] == [(one.label, one.exit) for one in alone]
    assert [one.confidence for one in together] == pytest.approx([one.confidence for one in alone], abs=1e-5)
    assert all(one.receipt is not None for one in together)


def test_images_of_several_callers_run_in_one_batch(
    mixed_bundle: Path, test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    """16 threads call again and again; with at most two workers, some of their images meet in a queue."""
    shared = SharedRuntime(Runtime.open(mixed_bundle, "full"), 16)
    images = [test_digits[0][i % 400] for i in range(2000)]
    with ThreadPoolExecutor(16) as threads:
        answers = [answer for [answer] in threads.map(lambda image: shared(image, receipts=True, max_exit=3), images)]
    shared.close()
    assert max(answer.receipt.rows for answer in answers if answer.receipt is not None) > 1


def test_an_error_reaches_its_caller(mixed_bundle: Path) -> None:
    shared = SharedRuntime(Runtime.open(mixed_bundle, "low"), 2)
    with pytest.raises(UsageError, match="'lowest' is not a budget"):
        shared(np.zeros((8, 8), np.uint8), budget="lowest")
    shared.close()
    with pytest.raises(Overloaded):
        shared(np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize("callers", [1, 2])
def test_closing_ends_a_wait_for_tokens(mixed_bundle: Path, callers: int) -> None:
    runtime = Runtime.open(mixed_bundle, "full")
    costs = runtime.bundle.manifest.cumulative_macs
    buckets = FairBuckets(RateLimit(1, costs[-1]), ["a"], costs[-1], time.monotonic_ns())
    runtime.rate_limiter = RateLimiter(costs, buckets.limits, shared=buckets)
    shared = SharedRuntime(runtime, callers)
    shared(np.zeros((8, 8), np.uint8), client="a")
    timer = threading.Timer(0.2, shared.close)
    timer.start()
    with pytest.raises(Overloaded, match="the runtime is closed"):
        shared(np.zeros((8, 8), np.uint8), client="a")
    timer.join()

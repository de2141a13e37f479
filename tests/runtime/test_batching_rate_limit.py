"""Continuous batching with a rate limiter: the same answers and tokens as without batching."""

from __future__ import annotations

import numpy as np
import pytest
from hand_run_batcher import BUDGETS, REQUESTS, SAMPLES, SHAPE, Setup
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit import Bundle
from mexit.errors import Overloaded
from mexit.runtime.backends.fake import images_for
from mexit.runtime.rate_limiter import RateLimiter, segment_macs
from mexit.runtime.token_buckets import RateLimit, RateLimits


def limiter(bundle: Bundle, macs: int) -> RateLimiter:
    """A bucket that holds `macs` and does not refill."""
    limits = RateLimits(RateLimit(1, macs))
    return RateLimiter(bundle.manifest.cumulative_macs, limits, clock_ns=lambda: 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=12), st.floats(1, 20), st.sampled_from(BUDGETS))
def test_a_rate_limited_request_answers_as_the_runtime_does(recited_bundle, rows, images, budget) -> None:
    macs = int(images * recited_bundle.manifest.cumulative_macs[-1])
    setup, plain = (Setup(recited_bundle, rate_limiter=limiter(recited_bundle, macs)) for _ in range(2))
    try:
        expected = plain.runtime.answer_tensor(images_for(np.asarray(rows), SHAPE), budget=budget, wait_ms=0)
    except Overloaded:
        with pytest.raises(Overloaded):
            setup.send(rows, budget, wait_ms=0)
        return
    future = setup.send(rows, budget, wait_ms=0)
    setup.workers.finish()
    found = [(one.exit, one.reason, one.macs, one.probabilities.tolist()) for one in future.result(0)]
    assert found == [(one.exit, one.reason, one.macs, one.probabilities.tolist()) for one in expected]
    states = [one.runtime.rate_limiter.state() for one in (setup, plain)]
    assert states[0] == states[1]


@settings(max_examples=50, deadline=None)
@given(REQUESTS, st.floats(1, 30), st.integers(0, 10**6))
def test_the_computed_macs_are_those_of_the_tokens(recited_bundle, requests, images, seed) -> None:
    macs = int(images * recited_bundle.manifest.cumulative_macs[-1])
    rate_limiter = limiter(recited_bundle, macs)
    setup = Setup(recited_bundle, seed, rate_limiter=rate_limiter)
    for rows, budget, steps in requests:
        try:
            setup.send(rows, budget, wait_ms=0)
        except Overloaded:
            continue
        for _ in range(min(steps, len(setup.workers.waiting))):
            setup.workers.step()
    setup.workers.finish()
    segments = segment_macs(recited_bundle.manifest.cumulative_macs)
    computed = sum(rows * segments[k - 1] for k, rows in setup.batches)
    assert setup.runtime.stats.snapshot().macs == computed == macs - rate_limiter.state().tokens

"""The batcher under a rate limiter: the bound holds, row by row, as it does for calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from batcher_house import POLICIES, REQUESTS, SAMPLES, SHAPE, Hands, House, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.core.budget import Budget
from mexit.errors import Overloaded
from mexit.runtime.backends.fake import images_for
from mexit.runtime.policy_selection import PolicyChoice
from mexit.runtime.request import Call, RequestOptions
from mexit.runtime.ticket import Ticket


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=12),
    st.integers(30, 900),
    st.sampled_from(POLICIES),
    st.booleans(),
)
def test_a_governed_request_answers_as_a_call_does(rows, tokens, policy, company) -> None:
    """Same tokens, same rows let through, same refusals; alone, and among rows of another client."""
    house, plain = House(rate_limiter=frozen(None, tokens)), House(rate_limiter=frozen(None, tokens))
    if company:
        house.send([1, 2], replace(policy, thresholds=(-1e9, None)), client="other")
    wishes = RequestOptions(Budget.parse("full"), PolicyChoice(policy, None), wait_s=0.0)
    images = images_for(np.asarray(rows), SHAPE)
    call, ticket = Call(plain.desk, images, wishes), Ticket(house.desk, images, wishes)
    try:
        call.pay()
    except Overloaded:
        with pytest.raises(Overloaded):
            ticket.pay()
        return
    assert ticket.pay() == 0.0
    expected = call.run()
    house.batcher.submit(ticket)
    house.hands.finish()
    found = ticket.outcome.result(0)
    assert [(one.exit, one.reason, one.macs, one.probabilities.tolist()) for one in found] == [
        (one.exit, one.reason, one.macs, one.probabilities.tolist()) for one in expected
    ]
    assert house.rate_limiter is not None
    assert plain.rate_limiter is not None
    assert house.rate_limiter.state().refused == plain.rate_limiter.state().refused
    assert house.rate_limiter.wait_s("", 90) == plain.rate_limiter.wait_s("", 90)
    assert house.stats.snapshot().rate_limited == plain.stats.snapshot().rate_limited


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(100, 2000), st.integers(0, 10**6))
def test_the_bound_holds_and_no_token_is_lost(requests, tokens, seed) -> None:
    """Everything the rate limiter let through was spent, by the row, and nothing else."""
    rate_limiter = frozen(tokens, tokens // 2)
    house = House(seed, rate_limiter=rate_limiter, hands=Hands(seed))
    for rows, which, client, steps in requests:
        ticket = house.ticket(rows, POLICIES[which], client=client, wait_s=0.0)
        try:
            assert ticket.pay() == 0.0
        except Overloaded:
            continue
        house.batcher.submit(ticket)
        for _ in range(min(steps, len(house.hands.waiting))):
            house.hands.move()
    house.hands.finish()
    state = rate_limiter.state()
    assert house.stats.snapshot().macs == tokens - state.tokens <= tokens
    run = sum(rows * macs for rows, macs in zip(house.rows_run(), (10, 20, 30), strict=True))
    assert run == house.stats.snapshot().macs

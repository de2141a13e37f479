"""A rate-limited `Runtime` on real images: unchanged answers below the limit, early answers, waits and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mexit import Overloaded, Runtime, UsageError
from mexit.cli import app
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.rate_limiter import RateLimit, RateLimiter, RateLimits, segment_macs

SECOND = 10**9


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


@pytest.fixture(scope="module")
def plain(mixed_bundle) -> Runtime:
    return Runtime.open(mixed_bundle, "60%")


@pytest.fixture(scope="module")
def tensor(plain, test_digits) -> np.ndarray:
    return plain.prepare(list(test_digits[0]))


def rate_limited(mixed_bundle, limits: RateLimits, budget: str = "60%", clock: Clock | None = None) -> Runtime:
    """A runtime whose buckets are refilled by `clock`; by default never."""
    bundle = Runtime.open(mixed_bundle, budget).bundle
    limiter = RateLimiter(bundle.manifest.cumulative_macs, limits, clock_ns=clock or Clock())
    return Runtime(bundle, OrtBackend(bundle), budget, rate_limiter=limiter)


def answers(predictions) -> list[tuple]:
    return [(one.index, one.exit, one.reason, one.probabilities.tolist()) for one in predictions]


def test_traffic_below_the_limit_is_unchanged(mixed_bundle, plain, tensor) -> None:
    runtime = Runtime.open(mixed_bundle, "60%", rate="100G", client_rate="90G")
    assert answers(runtime.answer_tensor(tensor)) == answers(plain.answer_tensor(tensor))
    assert len({one.exit for one in plain.answer_tensor(tensor)}) >= 2
    state = runtime.rate_limiter.state()
    assert (state.refused, state.waits, state.overloaded) == ((0, 0), 0, 0)
    assert runtime.stats.snapshot().rate_limited == 0


def test_rows_without_tokens_answer_with_the_exit_before(mixed_bundle, plain, tensor) -> None:
    """Tokens for segment 1 of 40 rows and segment 2 of 3: the first three rows continue."""
    first, second, _ = segment_macs(plain.bundle.manifest.cumulative_macs)
    runtime = rate_limited(mixed_bundle, RateLimits(RateLimit(1, 40 * first + 3 * second)), "full")
    predictions = runtime.answer_tensor(tensor[:40])
    assert [one.exit for one in predictions] == [2] * 3 + [1] * 37
    assert {one.reason for one in predictions} == {"rate-limit"}
    at_exit_1 = plain.answer_tensor(tensor[:40], budget="full", max_exit=1)
    assert [one.index for one in predictions[3:]] == [one.index for one in at_exit_1[3:]]
    snapshot = runtime.stats.snapshot()
    assert (snapshot.rate_limited, snapshot.macs) == (40, 40 * first + 3 * second)
    assert runtime.rate_limiter.state().refused == (37, 3)
    assert runtime.rate_limiter.state().tokens == 0


def test_a_call_without_tokens_waits_and_then_answers(mixed_bundle, plain, tensor) -> None:
    """With the real clock: the tokens of five rows arrive within half a second."""
    costs = plain.bundle.manifest.cumulative_macs
    limiter = RateLimiter(costs, RateLimits(RateLimit(10 * costs[0], costs[-1])))
    runtime = Runtime(plain.bundle, OrtBackend(plain.bundle), "60%", rate_limiter=limiter)
    while limiter.acquire("", 1, 1):
        pass
    predictions = runtime.answer_tensor(tensor[:5], max_exit=1, receipts=True)
    assert answers(predictions) == answers(plain.answer_tensor(tensor[:5], max_exit=1))
    queue_us = [one.receipt.queue_us for one in predictions]
    assert queue_us == sorted(queue_us)
    assert limiter.state().waits >= 1


def test_a_call_whose_tokens_come_too_late_is_refused_at_once(mixed_bundle, plain, tensor) -> None:
    first = plain.bundle.manifest.cumulative_macs[0]
    runtime = rate_limited(mixed_bundle, RateLimits(RateLimit(first, 10 * first)))  # one row a second
    before = runtime.stats.snapshot()
    for options in ({"wait_ms": 4000.0}, {"deadline_ms": 4000.0}, {"deadline_ms": 4000.0, "wait_ms": 9000.0}):
        with pytest.raises(Overloaded, match=r"20 rows within 4000 ms") as caught:
            runtime.answer_tensor(tensor[:20], **options)
        assert caught.value.retry_after_s >= 6  # 10 s for ten more rows, less the 4 s that the call would wait
    assert runtime.stats.snapshot() == before
    assert runtime.rate_limiter.state().overloaded == 3
    assert len(runtime.answer_tensor(tensor[:10], max_exit=1, wait_ms=0.0)) == 10
    with pytest.raises(Overloaded, match=r"1 row within 0 ms"):
        runtime(np.zeros((8, 8), np.uint8), wait_ms=0)
    with pytest.raises(UsageError, match="wait_ms must be at least zero"):
        runtime(np.zeros((8, 8), np.uint8), wait_ms=-1)


def test_each_client_has_its_own_tokens(mixed_bundle, plain, tensor) -> None:
    full = plain.bundle.manifest.cumulative_macs[-1]
    runtime = rate_limited(mixed_bundle, RateLimits(RateLimit(1, 9 * full), RateLimit(1, 4 * full)), "full")
    attacked = [one for row in tensor[:4] for one in runtime.answer_tensor(row[None], client="attacker")]
    assert {one.reason for one in attacked} == {"last"}
    with pytest.raises(Overloaded):
        runtime.answer_tensor(tensor[:1], client="attacker", wait_ms=0)
    clean = runtime.answer_tensor(tensor[:4], client="clean", wait_ms=0)
    assert answers(clean) == answers(plain.answer_tensor(tensor[:4], budget="full"))


def test_the_counted_macs_stay_within_the_bound(mixed_bundle, plain, tensor) -> None:
    """Four clients ask for more than the rate allows, and the drift watch runs beside them."""
    full, clock = plain.bundle.manifest.cumulative_macs[-1], Clock()
    limits = RateLimits(RateLimit(200 * full, 30 * full), RateLimit(60 * full, 10 * full))
    runtime = rate_limited(mixed_bundle, limits, clock=clock)
    runtime.watch_drift(1.0, seed=0)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        clock.ns += int(rng.integers(SECOND // 20))
        rows = rng.integers(0, len(tensor), rng.integers(1, 90))
        options = {"budget": ("low", "60%", "full")[rng.integers(3)], "client": "abcd"[rng.integers(4)]}
        try:
            runtime.answer_tensor(tensor[rows], wait_ms=0, **options)
        except Overloaded:
            refused += 1
        runtime.drift_watch.join()
    snapshot = runtime.stats.snapshot()
    spent, refilled = snapshot.macs + snapshot.watch_macs, 200 * full * clock.ns / SECOND
    assert 0.3 * refilled <= spent <= 30 * full + refilled
    assert min(refused, snapshot.rate_limited) > 0


def test_the_drift_watch_is_skipped_without_tokens(mixed_bundle, plain, tensor) -> None:
    costs = plain.bundle.manifest.cumulative_macs
    confident = [row for row, one in enumerate(plain.answer_tensor(tensor)) if one.exit == 1][:10]
    runtime = rate_limited(mixed_bundle, RateLimits(RateLimit(1, 10 * costs[0] + 3 * costs[-1])))
    runtime.watch_drift(1.0, seed=0)
    assert {one.reason for one in runtime.answer_tensor(tensor[confident])} == {"confident"}
    runtime.drift_watch.join()
    assert runtime.stats.snapshot().watch_macs == 3 * costs[-1]


def test_open_takes_rates_as_typed(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, rate="40M", burst="80M", client_rate=10_000_000)
    assert runtime.rate_limiter.limits == RateLimits(
        RateLimit(40_000_000, 80_000_000), RateLimit(10_000_000, 10_000_000)
    )
    assert Runtime.open(mixed_bundle).rate_limiter is None
    with pytest.raises(UsageError, match="give --rate too"):
        Runtime.open(mixed_bundle, burst="80M")


def test_the_command_takes_a_rate(mixed_bundle, plain, test_digits, tmp_path) -> None:
    """Two images wait for their tokens; a malformed rate or a burst alone is a usage error."""
    picture, costs = tmp_path / "seven.png", plain.bundle.manifest.cumulative_macs
    Image.fromarray(test_digits[0][0]).save(picture)
    command = ["run", str(mixed_bundle), str(picture), str(picture), "--budget", "full", "--json"]
    done = CliRunner().invoke(app, [*command, "--rate", str(10 * costs[-1]), "--burst", f"{costs[-1] / 1e6:.6f}M"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["predictions"][0]["exit"] == 3
    for options in (["--rate", "fast"], ["--burst", "40M"], ["--rate", "40M", "--burst", "1k"]):
        assert CliRunner().invoke(app, [*command, *options]).exit_code == 2

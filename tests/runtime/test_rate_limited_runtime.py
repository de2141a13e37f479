"""A governed `Runtime` on real images: who is untouched, who answers early, who waits, who is refused."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mexit import Overloaded, Runtime, UsageError
from mexit.cli import app
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.rate_limits import RateLimit, RateLimits, segment_macs


@pytest.fixture(scope="module")
def plain(mixed_bundle) -> Runtime:
    return Runtime.open(mixed_bundle, "60%")


@pytest.fixture(scope="module")
def tensor(plain, test_digits) -> np.ndarray:
    return plain.prepare(list(test_digits[0]))


def governed(mixed_bundle, allowed: RateLimits, budget: str = "60%") -> Runtime:
    """With buckets that do not refill while a test runs, if their rate is a few MACs."""
    bundle = Runtime.open(mixed_bundle, budget).bundle
    rate_limiter = RateLimiter(bundle.manifest.cumulative_macs, allowed)
    return Runtime(bundle, OrtBackend(bundle), budget, rate_limiter=rate_limiter)


def essence(predictions) -> list[tuple]:
    return [(found.index, found.exit, found.reason, found.probabilities.tolist()) for found in predictions]


def test_traffic_below_the_limit_is_untouched(mixed_bundle, plain, tensor) -> None:
    runtime = Runtime.open(mixed_bundle, "60%", rate="100G", client_rate="90G")
    assert essence(runtime.answer_tensor(tensor)) == essence(plain.answer_tensor(tensor))
    assert len({found.exit for found in plain.answer_tensor(tensor)}) >= 2
    state = runtime.rate_limiter.state()
    assert (state.refused, state.waits, state.overloaded) == ((0, 0), 0, 0)
    assert runtime.stats.snapshot().governed == 0


def test_rows_without_tokens_answer_with_the_exit_before(mixed_bundle, plain, tensor) -> None:
    """Tokens for segment 1 of 40 rows and segment 2 of 3: the first three that are unsure go on."""
    first, second, _ = segment_macs(plain.bundle.manifest.cumulative_macs)
    runtime = governed(mixed_bundle, RateLimits(RateLimit(1, 40 * first + 3 * second)), "full")
    found = runtime.answer_tensor(tensor[:40])
    assert [one.exit for one in found] == [2] * 3 + [1] * 37
    assert {one.reason for one in found} == {"governor"}
    each = plain.answer_tensor(tensor[:40], budget="full", max_exit=1)
    assert [one.index for one in found[3:]] == [one.index for one in each[3:]]
    snapshot = runtime.stats.snapshot()
    assert (snapshot.governed, snapshot.macs) == (40, 40 * first + 3 * second)
    assert runtime.rate_limiter.state().refused == (37, 3)
    assert runtime.rate_limiter.state().tokens == 0


def test_a_call_without_tokens_waits_and_then_answers(mixed_bundle, plain, tensor) -> None:
    """Ten rows a second can begin, one at a time: five more take half a second."""
    first = plain.bundle.manifest.cumulative_macs[0]
    runtime = governed(mixed_bundle, RateLimits(RateLimit(10 * first, plain.bundle.manifest.cumulative_macs[-1])))
    while runtime.rate_limiter.enter("", 1, 1):
        pass
    began = time.monotonic()
    found = runtime.answer_tensor(tensor[:5], max_exit=1, receipts=True)
    assert 0.35 < time.monotonic() - began < 5
    assert essence(found) == essence(plain.answer_tensor(tensor[:5], max_exit=1))
    queues = [one.receipt.queue_us for one in found]
    assert queues == sorted(queues)
    assert queues[-1] > 0.35e6
    assert runtime.rate_limiter.state().waits >= 1


def test_a_call_whose_tokens_come_too_late_is_refused_at_once(mixed_bundle, plain, tensor) -> None:
    first = plain.bundle.manifest.cumulative_macs[0]
    runtime = governed(mixed_bundle, RateLimits(RateLimit(first, 10 * first)))  # a row a second
    before = runtime.stats.snapshot()
    for options in ({"wait_ms": 4000.0}, {"deadline_ms": 4000.0}, {"deadline_ms": 4000.0, "wait_ms": 9000.0}):
        began = time.monotonic()
        with pytest.raises(Overloaded, match=r"begin 20 rows within 4000 ms") as caught:
            runtime.answer_tensor(tensor[:20], **options)
        assert time.monotonic() - began < 2
        assert caught.value.retry_after_s == pytest.approx(6, abs=2)
    assert runtime.stats.snapshot() == before
    assert runtime.rate_limiter.state().overloaded == 3
    assert len(runtime.answer_tensor(tensor[:10], max_exit=1, wait_ms=0.0)) == 10
    with pytest.raises(Overloaded, match=r"begin 1 row within 0 ms"):
        runtime(np.zeros((8, 8), np.uint8), wait_ms=0)
    with pytest.raises(UsageError, match="wait_ms must be at least zero"):
        runtime(np.zeros((8, 8), np.uint8), wait_ms=-1)


def test_clients_have_tokens_of_their_own(mixed_bundle, plain, tensor) -> None:
    full = plain.bundle.manifest.cumulative_macs[-1]
    runtime = governed(mixed_bundle, RateLimits(RateLimit(1, 9 * full), RateLimit(1, 4 * full)), "full")
    attacked = [found for row in tensor[:4] for found in runtime.answer_tensor(row[None], client="attacker")]
    assert {found.reason for found in attacked} == {"last"}
    with pytest.raises(Overloaded):
        runtime.answer_tensor(tensor[:1], client="attacker", wait_ms=0)
    clean = runtime.answer_tensor(tensor[:4], client="clean", wait_ms=0)
    assert essence(clean) == essence(plain.answer_tensor(tensor[:4], budget="full"))


def test_whatever_is_asked_for_the_ledger_stays_within_the_bound(mixed_bundle, plain, tensor) -> None:
    """Four clients ask for more than there is, and the drift watch joins in."""
    full = plain.bundle.manifest.cumulative_macs[-1]
    allowed = RateLimits(RateLimit(200 * full, 30 * full), RateLimit(60 * full, 10 * full))
    runtime = governed(mixed_bundle, allowed)
    runtime.watch_drift(1.0, seed=0)
    rng, began, refused = np.random.default_rng(0), time.monotonic(), 0
    while time.monotonic() - began < 1.5:
        rows = rng.integers(0, len(tensor), rng.integers(1, 90))
        options = {"budget": ("low", "60%", "full")[rng.integers(3)], "client": "abcd"[rng.integers(4)]}
        try:
            runtime.answer_tensor(tensor[rows], wait_ms=float(rng.integers(0, 30)), **options)
        except Overloaded:
            refused += 1
    seconds = time.monotonic() - began
    snapshot = runtime.stats.snapshot()
    spent = snapshot.macs + snapshot.watch_macs
    assert spent <= 30 * full + 200 * full * seconds
    assert spent >= 0.5 * 200 * full * seconds  # it is used, too
    assert min(refused, snapshot.governed) > 0  # the watch, whose turn comes last, may find nothing left


def test_the_drift_watch_is_skipped_without_tokens(mixed_bundle, plain, tensor) -> None:
    costs = plain.bundle.manifest.cumulative_macs
    confident = [row for row, one in enumerate(plain.answer_tensor(tensor)) if one.exit == 1][:10]
    runtime = governed(mixed_bundle, RateLimits(RateLimit(1, 10 * costs[0] + 3 * costs[-1])))
    runtime.watch_drift(1.0, seed=0)
    assert {one.reason for one in runtime.answer_tensor(tensor[confident])} == {"confident"}
    assert runtime.stats.snapshot().watch_macs == 3 * costs[-1]


def test_open_takes_rates_as_typed(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, rate="40M", burst="80M", client_rate=10_000_000)
    assert runtime.rate_limiter.allowed == RateLimits(
        RateLimit(40_000_000, 80_000_000), RateLimit(10_000_000, 10_000_000)
    )
    assert Runtime.open(mixed_bundle).rate_limiter is None
    with pytest.raises(UsageError, match="give --rate too"):
        Runtime.open(mixed_bundle, burst="80M")


def test_the_command_takes_a_rate(mixed_bundle, plain, test_digits, tmp_path) -> None:
    """Two images wait for their tokens; a rate that is none, or a burst alone, is a usage error."""
    picture, costs = tmp_path / "seven.png", plain.bundle.manifest.cumulative_macs
    Image.fromarray(test_digits[0][0]).save(picture)
    command = ["run", str(mixed_bundle), str(picture), str(picture), "--budget", "full", "--json"]
    done = CliRunner().invoke(app, [*command, "--rate", str(10 * costs[-1]), "--burst", f"{costs[-1] / 1e6:.6f}M"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["predictions"][0]["exit"] == 3
    for options in (["--rate", "fast"], ["--burst", "40M"], ["--rate", "40M", "--burst", "1k"]):
        assert CliRunner().invoke(app, [*command, *options]).exit_code == 2

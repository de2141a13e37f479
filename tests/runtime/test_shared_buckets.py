"""Token buckets that several processes share: the same answers as private ones, one bound for all."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.shared_buckets import SharedBuckets
from mexit.runtime.token_buckets import RateLimit, RateLimits

COSTS = (3, 10, 24)
SECOND = 10**9
LIMIT = st.builds(RateLimit, st.integers(1, 60), st.integers(14, 10**12))
REQUEST = st.tuples(st.sampled_from("abcd"), st.integers(0, 3 * SECOND), st.integers(1, 3), st.integers(0, 12))
PROGRAM = """
import sys
from pathlib import Path
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.shared_buckets import SharedBuckets
from mexit.runtime.token_buckets import RateLimit, RateLimits
limits = RateLimits(RateLimit(1, 20_000), RateLimit(1, 8_000))
limiter = RateLimiter((1, 2), limits, clock_ns=lambda: 0, shared=SharedBuckets(Path(sys.argv[1]), limits, 0))
print(sum(limiter.acquire(client, 1, 1) for _ in range(10_000) for client in "abc"))
"""


class Clock:
    """A clock that the test moves."""

    ns = 0

    def __call__(self) -> int:
        return self.ns


@settings(max_examples=60, deadline=None)
@given(st.none() | LIMIT, st.none() | LIMIT, st.lists(REQUEST, max_size=30))
def test_shared_buckets_answer_as_private_ones(
    overall: RateLimit | None, client: RateLimit | None, requests: list[tuple[str, int, int, int]]
) -> None:
    """Also if two limiters use the file in turns, and one of them opens it late and with other limits."""
    clock, limits = Clock(), RateLimits(overall, client)
    private = RateLimiter(COSTS, limits, clock_ns=clock)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "buckets"
        shared = [RateLimiter(COSTS, limits, clock_ns=clock, shared=SharedBuckets(path, limits, 0))]
        for name, pause_ns, k, rows in requests:
            clock.ns += pause_ns
            limiter = shared[rows % len(shared)]
            assert limiter.wait_s(name, rows) == private.wait_s(name, rows)
            assert limiter.acquire(name, k, rows) == private.acquire(name, k, rows)
            assert limiter.acquire_all(name, rows) == private.acquire_all(name, rows)
            limiter.count_wait()
            private.count_wait()
            assert limiter.state() == private.state()
            if len(shared) == 1:
                other = SharedBuckets(path, RateLimits(RateLimit(1, 1)), clock.ns)
                shared.append(RateLimiter(COSTS, limits, clock_ns=clock, shared=other))
        assert shared[-1].limits == limits


def test_processes_together_keep_the_bound(tmp_path: Path) -> None:
    """Two processes take one token at a time from full buckets that do not refill."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "buckets")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    taken = [int(process.communicate()[0]) for process in processes]
    assert sum(taken) == 20_000


def test_a_full_set_of_places(tmp_path: Path) -> None:
    """Sixteen clients have buckets; the next ones share the overflow bucket until an idle one is full again."""
    limits = RateLimits(None, RateLimit(1, 30))
    buckets, clock = SharedBuckets(tmp_path / "buckets", limits, 0, max_clients=16), Clock()
    limiter = RateLimiter(COSTS, limits, clock_ns=clock, shared=buckets)
    for i in range(16):
        assert limiter.acquire(f"client {i}", 1, 99) == 10
    assert limiter.acquire("new", 1, 6) == 6
    assert limiter.acquire("other", 1, 99) == 4
    assert limiter.state().clients == 16
    clock.ns += 30 * SECOND
    assert limiter.acquire("new", 1, 99) == 10
    assert limiter.state().clients == 16

"""A batcher over recited logits, with workers that a test runs by hand and a clock that moves by the latency table."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mexit import Bundle, Prediction, Runtime
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.fake import FakeBackend, images_for
from mexit.runtime.batch_latency import BatchLatencyTable
from mexit.runtime.batching import ContinuousBatcher
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.reference import answer_slowly

SAMPLES, CLASSES, SHAPE = 50, 10, (1, 8, 8)
THRESHOLDS = {"low": (0.3, 0.3), "medium": (1.0, None), "high": (None, 1.0)}
REJECT = {"low": (0.2, 0.2, 2.0), "medium": (0.5, 1.0, 1.0), "high": None}
BUDGETS = (*THRESHOLDS, "full")
FLAT = BatchLatencyTable.from_times((1, 64), [[1e-3] * 3, [1.01e-3] * 3])  # large batches are efficient
LINEAR = BatchLatencyTable.from_times((1,), [[1e-3] * 3])  # a batch saves nothing
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=9),
        st.sampled_from(BUDGETS),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


class Workers:
    """Threads that a test runs by hand: functions wait here until the test calls them."""

    def __init__(self, seed: int = 0) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._random = random.Random(seed)

    def start(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def step(self) -> None:
        self.waiting.pop(self._random.randrange(len(self.waiting)))()

    def finish(self) -> None:
        while self.waiting:
            self.step()


class Setup:
    """A runtime of recited logits, a batcher, and a clock that moves by the latency table."""

    def __init__(
        self,
        bundle: Bundle,
        seed: int = 0,
        table: BatchLatencyTable = FLAT,
        rate_limiter: RateLimiter | None = None,
        workers: int = 1,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.backend = FakeBackend((2 * rng.normal(size=(3, SAMPLES, CLASSES))).astype(np.float32))
        self.now_s, self.table = 0.0, table
        self.batches: list[tuple[int, int]] = []
        self.before_segment: Callable[[int], Any] = lambda _: None
        for k, segment in enumerate(self.backend.segments, start=1):
            segment.run = self._timed(k, segment.run)  # type: ignore[method-assign]
        self.runtime = Runtime(bundle, self.backend, "full", rate_limiter=rate_limiter)
        self.workers, self.counted = Workers(seed), list[Prediction]()
        self.batcher = ContinuousBatcher(
            self.runtime,
            self.workers.start,
            workers,
            table=table,
            on_predictions=self.counted.extend,
            clock=lambda: self.now_s,
            **options,
        )

    def _timed(self, k: int, run: Callable[[HostCarried], Any]) -> Callable[[HostCarried], Any]:
        def run_and_wait(carried: HostCarried) -> Any:
            self.before_segment(k)
            self.batches.append((k, carried.rows))
            self.now_s += self.table.segment_s(k, carried.rows)
            return run(carried)

        return run_and_wait

    def send(self, rows: Sequence[int], budget: str = "full", **options: Any) -> Future[list[Prediction]]:
        request = self.runtime.begin(images_for(np.asarray(rows), SHAPE), budget=budget, **options)
        request.start_s = self.now_s
        assert request.acquire_tokens() == 0.0
        return self.batcher.submit(request)

    def sizes(self, k: int) -> list[int]:
        """Rows of each batch of segment k."""
        return [rows for segment, rows in self.batches if segment == k]

    def check(self, rows: Sequence[int], budget: str, predictions: Sequence[Prediction]) -> None:
        """The predictions are those of the reference."""
        images = images_for(np.asarray(rows), SHAPE)
        exits, probabilities, unsure = answer_slowly(self.backend, images, self.runtime.policy(budget), CLASSES)
        assert [one.exit for one in predictions] == exits.tolist()
        for one, expected in zip(predictions, probabilities, strict=True):
            np.testing.assert_array_equal(one.probabilities, expected)
        reasons = ["last" if k == 3 else "confident" for k in exits.tolist()]
        expected_reasons = ["unsure" if one else reason for one, reason in zip(unsure, reasons, strict=True)]
        assert [one.reason for one in predictions] == expected_reasons
        assert [one.label is None for one in predictions] == unsure.tolist()

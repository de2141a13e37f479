"""One inference request: its options, its rows, and the tokens that its rows need from the rate limiter.

    request.acquire_tokens()    takes the tokens of the next rows, or returns how long to wait for them
    runtime.run(request)        answers the rows that have tokens; it never waits

The caller decides how to wait: `Runtime` sleeps, the server lends its worker to another request, a camera drops the
frame. Without a rate limiter every row has its tokens at once.
"""

from __future__ import annotations

import time
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from mexit.core.budget import Budget
from mexit.errors import Overloaded, UsageError
from mexit.runtime.policy_selection import PolicyChoice
from mexit.runtime.prediction import Prediction
from mexit.runtime.rate_limiter import RateLimiter

MAX_BATCH = 64  # rows of one run; larger batches gain nothing on a CPU and delay early answers


class RequestOptions(TypedDict, total=False):
    """Options of `Runtime.__call__`, `Runtime.answer_tensor` and `Runtime.begin`.

    Keys:
        budget: budget of this request, such as `low`, `12M`, `40%` or `5ms`; default `runtime.budget`.
        deadline_ms: milliseconds from the call. When they are over, each row under way answers with the deepest exit
            that it has reached. The first exit always runs.
        max_exit: number of the last exit that may answer, from 1. The nearest exit of the bundle below it counts.
        receipts: whether every prediction has a `Receipt`.
        client: name of the client, for the rate limiter's limit of each client.
        wait_ms: milliseconds that rows may wait for the tokens of segment 1; 0 means that they may not wait.
            Default: until the deadline, without one as long as it takes.
        queued_s: seconds that the request waited before the call; for receipts.
    """

    budget: str | Budget | None
    deadline_ms: float | None
    max_exit: int | None
    receipts: bool
    client: str
    wait_ms: float | None
    queued_s: float


OPTIONS = frozenset(RequestOptions.__annotations__)


class Request:
    """The state of one inference request. Not thread-safe.

    Attributes:
        tensor: the images, (B, C, H, W) float32 in [0, 1].
        budget: its budget.
        choice: the policy of that budget.
        predictions: answers of the first rows, in order.
        granted: number of next rows that have their tokens.
        waited_s: seconds spent waiting for tokens.
        deadline_s, wait_s: seconds from `start_s`, or None; see `RequestOptions`.
        max_exit, receipts, client, queued_s: see `RequestOptions`.
        last_exit: position of the exit of `max_exit` in the bundle, from 1; None for the last one.
        start_s: time of the call on the clock of `time.perf_counter`.
    """

    # Of requests without options. An assignment for each would cost a call microseconds.
    deadline_s: float | None = None
    wait_s: float | None = None
    max_exit: int | None = None
    last_exit: int | None = None
    receipts = False
    client = ""
    queued_s = 0.0
    granted = 0
    waited_s = 0.0
    _blocked_s: float | None = None

    def __init__(
        self,
        tensor: NDArray[np.float32],
        budget: Budget,
        choice: PolicyChoice,
        rate_limiter: RateLimiter | None,
        options: RequestOptions,
    ) -> None:
        """A request without answers. `Runtime.begin` makes it.

        Raises:
            UsageError: an option has no valid value.
        """
        self.start_s = time.perf_counter()
        self.tensor, self.budget, self.choice = tensor, budget, choice
        self.predictions: list[Prediction] = []
        self._rate_limiter = rate_limiter
        if options:
            self._read(options)

    def _read(self, options: RequestOptions) -> None:
        deadline_ms, wait_ms = options.get("deadline_ms"), options.get("wait_ms")
        if deadline_ms is not None and not deadline_ms > 0:
            raise UsageError(f"deadline_ms must be above zero, found {deadline_ms}")
        if wait_ms is not None and not wait_ms >= 0:
            raise UsageError(f"wait_ms must be at least zero, found {wait_ms}")
        if wait_ms is None or (deadline_ms is not None and deadline_ms < wait_ms):
            wait_ms = deadline_ms
        self.deadline_s = None if deadline_ms is None else deadline_ms / 1e3
        self.wait_s = None if wait_ms is None else wait_ms / 1e3
        self.max_exit = options.get("max_exit")
        self.receipts = options.get("receipts", False)
        self.client = options.get("client", "")
        self.queued_s = options.get("queued_s", 0.0)

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return len(self.predictions) == len(self.tensor)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call."""
        return time.perf_counter() - self.start_s

    def acquire_tokens(self) -> float:
        """Take the tokens of segment 1 for the next rows, at most `MAX_BATCH`; see `RateLimiter.acquire_all`.

        Returns:
            0.0 if the rows have their tokens; else the seconds after which to try again.

        Raises:
            Overloaded: the remaining rows cannot all start in time, even if no other request takes tokens.
        """
        rows = min(MAX_BATCH, len(self.tensor) - len(self.predictions))
        if self.granted or not rows:
            return 0.0
        limiter = self._rate_limiter
        if limiter is None:
            self.granted = rows
            return 0.0
        self._check_wait(limiter)
        self.granted = limiter.acquire_all(self.client, rows)
        if self.granted:
            if self._blocked_s is not None:
                self.waited_s += self.elapsed_s - self._blocked_s
                self._blocked_s = None
            return 0.0
        if self._blocked_s is None:
            self._blocked_s = self.elapsed_s
            limiter.count_wait()
        return limiter.wait_s(self.client, min(rows, limiter.max_rows))

    def acquire_segment(self, k: int, rows: int) -> int:
        """Take the tokens of segment k (from 2) for as many of `rows` rows as possible; returns that number."""
        return rows if self._rate_limiter is None else self._rate_limiter.acquire(self.client, k, rows)

    def take_granted(self) -> NDArray[np.float32]:
        """The images of the rows that have tokens, which are to run now."""
        first = len(self.predictions)
        images = self.tensor[first : first + self.granted]
        self.granted = 0
        return images

    def _check_wait(self, limiter: RateLimiter) -> None:
        if self.wait_s is None:
            return
        rows = len(self.tensor) - len(self.predictions)
        needed_s = limiter.wait_s(self.client, rows)
        late_s = self.elapsed_s + needed_s - self.wait_s
        if needed_s > 0 and late_s > 0:
            limiter.count_overloaded()
            raise Overloaded(
                f"the rate limiter has no tokens to start {rows} {'row' if rows == 1 else 'rows'} within "
                f"{self.wait_s * 1e3:g} ms: try again later, or with fewer rows",
                retry_after_s=late_s,
            )

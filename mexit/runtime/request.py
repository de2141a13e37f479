"""One call of a runtime: its rows are answered in order, as far and as soon as the rate limiter lets them.

    call.pay()      takes the tokens of segment 1 for the next rows, or says how long that must wait
    call.run()      answers the rows that are paid for; it never waits

Who waits, and where, is the caller's business: `Runtime` sleeps, the server leaves its worker, a camera drops the
frame. Without a rate limiter every row is paid for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.errors import Overloaded
from mexit.runtime.backends.base import Backend
from mexit.runtime.engine import Answers, answer
from mexit.runtime.policy_selection import PolicyChoice
from mexit.runtime.prediction import Prediction
from mexit.runtime.rate_limiter import RateLimiter
from mexit.runtime.receipt import Receipt
from mexit.runtime.stats import RuntimeStats

BATCH = 64  # rows that travel together; more gain nothing on a CPU and hold back early answers
AS_PLANNED = ("confident", "last")  # reasons of answers that the policy gave, undisturbed


class RequestOptions(NamedTuple):  # one is made for every call, and a frozen dataclass takes microseconds to make
    """What a call asks for besides answers.

    Attributes:
        budget: whose plan it is.
        plan: decides who leaves where.
        deadline_s: from the call; once over, rows under way get the deepest exit so far.
        max_exit: nobody goes further.
        wait_s: from the call; how long rows may wait for the rate limiter's tokens. None is for as long as it takes.
        client: who asks, by whatever name; each has its own tokens.
        queued_s: waited before the call; for receipts.
        receipts: whether to write them.
    """

    budget: Budget
    plan: PolicyChoice
    deadline_s: float | None = None
    max_exit: int | None = None
    wait_s: float | None = None
    client: str = ""
    queued_s: float = 0.0
    receipts: bool = False


@dataclass(frozen=True)
class Desk:
    """What every call of one runtime shares.

    Attributes:
        exit_macs: which heads ran, (E,), to what leaving at each exit costs, (E,).
        certificates: ids of those that hold for a plan.
        watch: looks at answers once they are counted: images, answers, plan, client.
    """

    bundle: Bundle
    backend: Backend
    exit_macs: Callable[[tuple[bool, ...]], tuple[int, ...]]
    stats: RuntimeStats
    rate_limiter: RateLimiter | None
    certificates: Callable[[PolicyChoice], tuple[str, ...]]
    watch: Callable[[NDArray[np.float32], Answers, PolicyChoice, str], None]


class Call:
    """Rows on their way to answers. For one thread at a time.

    Attributes:
        predictions: of the rows answered so far, in order.
        waited_s: spent waiting for tokens.
    """

    def __init__(self, desk: Desk, tensor: NDArray[np.float32], wishes: RequestOptions) -> None:
        """`tensor` is (B, C, H, W) float32 in [0, 1], as `Runtime.prepare` returns it."""
        self.predictions: list[Prediction] = []
        self.waited_s = 0.0
        self._desk, self._tensor, self._wishes = desk, tensor, wishes
        self._start_s = time.perf_counter()
        self._paid = 0
        self._blocked_s: float | None = None

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return len(self.predictions) == len(self._tensor)

    def pay(self) -> float:
        """Take the tokens of segment 1 for the next rows, `BATCH` at most; see `RateLimiter.acquire_all`.

        Returns:
            0.0 once they are paid for; else the seconds after which to try again.

        Raises:
            Overloaded: the rows that are left cannot all begin in time, even if nobody else spends anything.
        """
        left = min(BATCH, len(self._tensor) - len(self.predictions))
        if self._paid or not left:
            return 0.0
        rate_limiter = self._desk.rate_limiter
        if rate_limiter is None:
            self._paid = left
            return 0.0
        self._check_patience(rate_limiter)
        self._paid = rate_limiter.acquire_all(self._wishes.client, left)
        if self._paid:
            if self._blocked_s is not None:
                self.waited_s += self._elapsed_s() - self._blocked_s
                self._blocked_s = None
            return 0.0
        if self._blocked_s is None:
            self._blocked_s = self._elapsed_s()
            rate_limiter.count_wait()
        return rate_limiter.wait_s(self._wishes.client, min(left, rate_limiter.max_rows))

    def run(self) -> list[Prediction]:
        """Answer the rows that are paid for; returns their predictions."""
        desk, wishes, first = self._desk, self._wishes, len(self.predictions)
        images = self._tensor[first : first + self._paid]
        self._paid = 0
        begun_s = self._elapsed_s()
        answers = answer(
            desk.backend,
            images,
            wishes.plan.policy,
            len(desk.bundle.manifest.classes),
            max_exit=wishes.max_exit,
            deadline_s=None if wishes.deadline_s is None else wishes.deadline_s - begun_s,
            permit=None if desk.rate_limiter is None else self._permit,
        )
        found = predictions(desk, answers, wishes, begun_s)
        macs = sum(prediction.macs for prediction in found)
        desk.stats.add(answers.exits, (answers.seconds + begun_s) * 1e3, macs, answers.reasons.count("rate-limit"))
        self.predictions += found
        desk.watch(images, answers, wishes.plan, wishes.client)
        return self.predictions[first:]

    def _permit(self, k: int, rows: int) -> int:
        assert self._desk.rate_limiter is not None
        return self._desk.rate_limiter.acquire(self._wishes.client, k, rows)

    def _check_patience(self, rate_limiter: RateLimiter) -> None:
        if self._wishes.wait_s is None:
            return
        rows = len(self._tensor) - len(self.predictions)
        needed_s = rate_limiter.wait_s(self._wishes.client, rows)
        late_s = self._elapsed_s() + needed_s - self._wishes.wait_s
        if needed_s > 0 and late_s > 0:
            rate_limiter.count_overloaded()
            limit_ms = self._wishes.wait_s * 1e3
            raise Overloaded(
                f"the rate limiter has no tokens to begin {rows} {'row' if rows == 1 else 'rows'} within {limit_ms:g} "
                "ms: ask later, or for fewer at once",
                retry_after_s=late_s,
            )

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s


def predictions(desk: Desk, answers: Answers, wishes: RequestOptions, begun_s: float) -> list[Prediction]:
    """Answers as predictions; `begun_s` passed between the call and segment 1."""
    manifest = desk.bundle.manifest
    costs, full = desk.exit_macs(answers.asked), manifest.cumulative_macs[-1]
    exits, latency_ms = answers.exits.tolist(), ((answers.seconds + begun_s) * 1e3).tolist()
    indices = answers.probabilities.argmax(axis=1).tolist()
    receipts = _receipts(desk, answers, wishes, begun_s) if wishes.receipts else [None] * len(exits)
    found = []
    for row, (k, index, probabilities) in enumerate(zip(exits, indices, answers.probabilities, strict=True)):
        found.append(
            Prediction(
                index=index,
                label=manifest.classes[index],
                confidence=float(probabilities[index]),
                probabilities=probabilities,
                exit=k,
                reason=answers.reasons[row],
                macs=costs[k - 1],
                saved_macs=full - costs[k - 1],
                latency_ms=latency_ms[row],
                budget=wishes.budget.text,
                receipt=receipts[row],
            )
        )
    return found


def _receipts(desk: Desk, answers: Answers, wishes: RequestOptions, begun_s: float) -> list[Receipt]:
    manifest, model = desk.bundle.manifest, desk.bundle.id
    costs, full = desk.exit_macs(answers.asked), manifest.cumulative_macs[-1]
    certificates = desk.certificates(wishes.plan)
    segment_us = tuple(seconds * 1e6 for seconds in answers.segment_seconds)
    return [
        Receipt(
            exit=k,
            reason=reason,
            macs=costs[k - 1],
            saved_macs=full - costs[k - 1],
            segment_us=segment_us[:k],
            rows=len(answers.exits),
            queue_us=(wishes.queued_s + begun_s) * 1e6,
            budget=wishes.budget.text,
            certificates=certificates if reason in AS_PLANNED else (),
            model=model,
        )
        for k, reason in zip(answers.exits.tolist(), answers.reasons, strict=True)
    ]

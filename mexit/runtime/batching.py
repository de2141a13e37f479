"""Continuous batching: rows of different requests, with different budgets, share one run of a segment.

Every segment has a queue of requests, the earliest deadline first. A worker takes the most urgent request, joins it
with others of the same queue, runs the segment once, and decides for each row by the thresholds of its own request.
Rows that continue wait in the queue of the next segment. A request never waits for others to join it. Requests that
the static network answers have a queue of their own.

A measured table of batch latencies decides the rest:

- A batch grows up to the size at which a row costs about as little as it can, and no further than its most urgent
  request can afford until the last exit.
- A segment that would end after a deadline does not run. The rows answer with the exit that they have reached; a
  request that cannot reach exit 1 in time is refused.
- If more rows wait than one batch takes, a new request that could not finish in a full batch is refused. Without
  this rule every batch would shrink to the slack of its most urgent request, and throughput would collapse (early drop,
  Nexus, Shen et al., SOSP 2019).
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import should_exit
from mexit.core.scores import Floats, Scorer, State
from mexit.errors import DeadlineExceeded, Overloaded
from mexit.runtime.backends.base import Backend
from mexit.runtime.batch_latency import BatchLatencyTable
from mexit.runtime.engine import Answers, last_exit, runs_static
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import MAX_BATCH, Request
from mexit.runtime.runtime import Runtime

STATIC = 0  # the queue of the static network; queue k is that of segment k
PATIENCE_S = 1.0  # a request without a deadline is as urgent as one with this deadline


class PendingRequest:
    """The rows of a request that were submitted together, and their answers. Only one worker has it at a time.

    Attributes:
        request: the request.
        future: becomes the predictions; it is cancelled if they are not needed any more.
        k: the segment that runs next, from 1.
        is_new: whether no row of the request has an answer yet.
        rows: indices of the rows under way, ascending.
        carried, state: features and scorer state of the rows under way, before segment k.
        deadline_s: on the batcher's clock; infinite without a deadline.
        due_s: the deadline for the order of the queues.
        thresholds: of its policy, (E-1,) float64; NaN stands for None.
        last: the last exit that may answer.
        static: whether the static network answers.
    """

    def __init__(self, request: Request, backend: Backend, scorer: Scorer, *, rate_limited: bool) -> None:
        self.request, self.future = request, Future[list[Prediction]]()
        self.is_new = not request.predictions
        self.images = request.take_granted()
        self.k, self.rows = 1, np.arange(len(self.images))
        self.carried, self.state = backend.carry(self.images), scorer.start(len(self.images))
        self.deadline_s = float("inf") if request.deadline_s is None else request.start_s + request.deadline_s
        self.due_s = min(self.deadline_s, request.start_s + PATIENCE_S)
        self.thresholds = np.array([np.nan if t is None else t for t in request.choice.policy.thresholds])
        self.last = last_exit(len(backend.segments), request.last_exit)
        any_exit = rate_limited or request.deadline_s is not None
        self.static = runs_static(backend, request.choice.policy, self.last, any_exit=any_exit)
        self.start_s, self.batch_rows = 0.0, 0
        self._exits, self._seconds = np.zeros(len(self.images), np.int64), np.zeros(len(self.images))
        self._probabilities, self._scores = np.zeros((len(self.images), scorer.classes)), np.zeros(len(self.images))
        self._reasons = [""] * len(self.images)
        self._segment_seconds: list[float] = []

    @property
    def queue(self) -> int:
        """Index of the queue in which it waits."""
        return STATIC if self.static else self.k

    def add_segment(self, start_s: float, end_s: float, batch_rows: int, probabilities: Floats, scores: Floats) -> None:
        """Segment k ran in a batch of `batch_rows` rows.

        Args:
            start_s, end_s: on the batcher's clock.
            batch_rows: size of the batch.
            probabilities, scores: of the rows under way, (R, C) and (R,).
        """
        if self.k == 1:
            self.start_s, self.batch_rows = start_s, batch_rows
        self._probabilities[self.rows], self._scores[self.rows] = probabilities, scores
        self._segment_seconds.append(end_s - start_s)
        self.k, self.is_new = self.k + 1, False

    def leave(self, leaving: NDArray[np.bool_], reason: str, now_s: float) -> NDArray[np.intp]:
        """The rows under way that the mask selects answer with exit k - 1. Returns the positions of the others."""
        staying = np.flatnonzero(~leaving)
        if len(staying) < len(self.rows):
            left = self.rows[leaving]
            self._exits[left], self._seconds[left] = self.k - 1, now_s - self.start_s
            for row in left.tolist():
                self._reasons[row] = reason
            self.rows = self.rows[staying]
        return staying

    def leave_all(self, reason: str, now_s: float) -> None:
        """All rows under way answer with exit k - 1; before segment 1 they have no answer."""
        self.leave(np.ones(len(self.rows), np.bool_), reason, now_s)

    def resolve(self, result: list[Prediction] | BaseException) -> None:
        """Set the result or the exception of the future, unless it is cancelled or set."""
        with suppress(InvalidStateError):
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)

    def answers(self) -> Answers:
        """The answers of all rows, when none is under way."""
        confident = np.array([reason == "confident" for reason in self._reasons])
        unsure = self.request.choice.policy.unsure(self._exits, self._scores, confident)
        exits, seconds, reasons = self._exits.tolist(), self._seconds.tolist(), tuple(self._reasons)
        withheld = None if unsure is None else unsure.tolist()
        return Answers(exits, self._probabilities, reasons, seconds, self._segment_seconds, withheld, self.static)


def _join(requests: Sequence[PendingRequest]) -> Any:
    """The carried features of all rows under way, in the order of the requests."""
    first, *others = [pending.carried for pending in requests]
    return first.concat(others) if others else first


class RequestQueue:
    """The requests that wait for segment k, the earliest due first; `rows` of them. Not thread-safe."""

    def __init__(self, k: int) -> None:
        self.k, self.rows = k, 0
        self._heap: list[tuple[float, int, PendingRequest]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def head(self) -> PendingRequest:
        """The most urgent request."""
        return self._heap[0][2]

    def push(self, pending: PendingRequest) -> None:
        """Add a request. Of equally urgent requests the first one stays first."""
        self._serial += 1
        self.rows += len(pending.rows)
        heapq.heappush(self._heap, (pending.due_s, self._serial, pending))

    def pop(self) -> PendingRequest:
        """Remove the most urgent request."""
        pending = heapq.heappop(self._heap)[2]
        self.rows -= len(pending.rows)
        return pending


class ContinuousBatcher:
    """Answers requests of one runtime in shared batches. Thread-safe. It has no threads: it calls `start` for one."""

    def __init__(
        self,
        runtime: Runtime,
        start: Callable[[Callable[[], None]], Any],
        workers: int,
        *,
        max_batch: int = MAX_BATCH,
        table: BatchLatencyTable | None = None,
        on_predictions: Callable[[Sequence[Prediction]], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A batcher without requests.

        Args:
            runtime: makes the requests.
            start: calls a function once, soon, in another thread.
            workers: number of such functions that can run at the same time.
            max_batch: the most rows of a batch of several requests.
            table: latencies of batches of up to `MAX_BATCH` rows; measured now by default.
            on_predictions: called with all predictions that are counted, also those of cancelled requests.
            clock: seconds, on the clock of `Request.start_s`.
        """
        self._runtime, self._segments = runtime, runtime.backend.segments
        manifest = runtime.bundle.manifest
        self._scorer = runtime.scorer
        self._table = table or BatchLatencyTable.measure(runtime.backend, self._scorer, manifest.input.shape)
        self._batch_rows = min(max_batch, self._table.efficient_rows)
        self._queues = [RequestQueue(k) for k in range(len(self._segments) + 1)]
        self._start, self._workers, self._on_predictions, self._clock = start, workers, on_predictions, clock
        self._started = 0  # workers that have not returned
        self._running = 0  # workers that run a batch
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, request: Request) -> Future[list[Prediction]]:
        """Answer the rows of a request that have tokens.

        Returns:
            Their predictions. Cancel it if they are not needed any more. Its exception is `DeadlineExceeded` (before
            segment 1), `Overloaded` (the batcher is closed) or an error of the engine.
        """
        limited = self._runtime.rate_limiter is not None
        pending = PendingRequest(request, self._runtime.backend, self._scorer, rate_limited=limited)
        self._enqueue([pending])
        return pending.future

    def close(self) -> None:
        """Refuse the requests that wait and those that come. Batches that run are finished."""
        with self._lock:
            self._closed = True
            waiting = [queue.pop() for queue in self._queues for _ in range(len(queue))]
        for pending in waiting:
            self._end(pending, Overloaded("the server is stopping"))

    def _enqueue(self, requests: Sequence[PendingRequest]) -> None:
        with self._lock:
            closed = self._closed
            for pending in () if closed else requests:
                self._queues[pending.queue].push(pending)
            starts = max(0, min(self._workers - self._started, sum(map(len, self._queues))))
            self._started += starts
        for pending in requests if closed else ():
            self._end(pending, Overloaded("the server is stopping"))
        for _ in range(starts):
            self._start(self._work)

    def _work(self) -> None:
        """Run a few batches, then leave the thread to other work."""
        for _ in self._segments:
            with self._lock:
                requests, rejected = self._next_batch(self._clock())
                if not requests and not rejected:
                    self._started -= 1
                    return
                self._running += 1
            try:
                for pending, reason in rejected:
                    self._end(pending, DeadlineExceeded(reason) if pending.k == 1 else None)
                self._run(requests)
            finally:
                with self._lock:
                    self._running -= 1
        self._start(self._work)

    def _next_batch(self, now_s: float) -> tuple[list[PendingRequest], list[tuple[PendingRequest, str]]]:
        """Take the most urgent request and those that join it; also take those that are too late, with the reason."""
        requests: list[PendingRequest] = []
        rejected: list[tuple[PendingRequest, str]] = []
        if not (waiting := [queue for queue in self._queues if queue]):
            return requests, rejected
        queue, rows = min(waiting, key=lambda queue: (queue.head.due_s, -queue.k)), 0
        idle = max(1, self._workers - self._running)
        limit = min(self._batch_rows, -(-queue.rows // idle))  # idle workers take their share at the same time
        full_batch_s = self._table.remaining_s(1, self._batch_rows)
        while queue:
            pending = queue.head
            joined, time_left_s = rows + len(pending.rows), pending.deadline_s - now_s
            if self._is_late(pending, time_left_s):
                waited_ms = (now_s - pending.request.start_s + pending.request.queued_s) * 1e3
                late = f"{waited_ms:.3f} ms in the queue: the deadline is before the first exit could answer"
                rejected.append((queue.pop(), late))
            elif pending.is_new and full_batch_s > time_left_s and queue.rows > self._batch_rows:
                rejected.append((queue.pop(), "more requests wait than can be answered by their deadlines"))
            elif not rows or (
                joined <= limit and self._table.remaining_s(queue.k, joined) <= requests[0].deadline_s - now_s
            ):
                requests.append(queue.pop())
                rows = joined
            else:
                break
        return requests, rejected

    def _is_late(self, pending: PendingRequest, time_left_s: float) -> bool:
        """Whether the next segment would end after the deadline, or its answers are not needed."""
        if pending.future.done():
            return True
        if pending.k == 1 and not pending.is_new:
            return False  # earlier rows of the request have answers, so its other rows get exit 1 too
        return not pending.static and self._table.segment_s(pending.k, len(pending.rows)) > time_left_s

    def _run(self, requests: Sequence[PendingRequest]) -> None:
        """Run the next segment of requests; those with rows under way wait for the segment after it."""
        try:
            if requests and requests[0].static:
                self._step_static(requests)
            else:
                self._step(requests)
        except BaseException as error:  # every caller of the batch gets the error
            for pending in requests:
                self._end(pending, error)
            return
        done = [pending for pending in requests if not len(pending.rows)]
        self._enqueue([pending for pending in requests if len(pending.rows)])
        for pending in done:
            self._finish(pending)

    def _step(self, requests: Sequence[PendingRequest]) -> None:
        """Take the tokens of the next segment, run it, and let rows leave."""
        for pending in requests:
            self._admit(pending)
        requests = [pending for pending in requests if len(pending.rows)]
        if not requests:
            return
        k, carried = requests[0].k, _join(requests)
        sizes = [len(pending.rows) for pending in requests]
        state = State.concat([pending.state for pending in requests])
        start_s = self._clock()
        carried, logits = self._segments[k - 1].run(carried)
        state, probabilities, score = self._scorer.step(k, logits, state)
        now_s = self._clock()
        if self._scorer.ensemble:
            self._answer_alone(k, requests, logits, probabilities, score)
        confident = np.zeros(sum(sizes), np.bool_)
        if k < len(self._segments):
            thresholds = np.array([pending.thresholds[k - 1] for pending in requests])
            confident = should_exit(score, np.repeat(thresholds, sizes))
        for pending, (first, end) in zip(requests, pairwise(np.cumsum([0, *sizes]).tolist()), strict=True):
            pending.add_segment(start_s, now_s, sum(sizes), probabilities[first:end], score[first:end])
            staying = first + pending.leave(confident[first:end], "confident", now_s)
            if k == len(self._segments):
                pending.leave_all("last", now_s)
            elif now_s >= pending.deadline_s or pending.future.done():
                pending.leave_all("deadline", now_s)
            elif k == pending.last:
                pending.leave_all("max-exit", now_s)
            elif len(staying):
                pending.carried, pending.state = carried.take(staying), state.take(staying)

    def _answer_alone(
        self,
        k: int,
        requests: Sequence[PendingRequest],
        logits: NDArray[np.float32],
        probabilities: Floats,
        scores: Floats,
    ) -> None:
        """Set the answers of requests whose policy is that of the static network, also where the others ensemble."""
        policies = [pending.request.choice.policy for pending in requests for _ in pending.rows]
        alone = np.array([not policy.ensemble for policy in policies])
        if alone.any():
            scorer = policies[int(alone.argmax())].scorer(self._scorer.classes)
            _, probabilities[alone], scores[alone] = scorer.step(k, logits[alone], scorer.start(int(alone.sum())))

    def _step_static(self, requests: Sequence[PendingRequest]) -> None:
        """Run the static network, which answers all rows."""
        backend, policy = self._runtime.backend, requests[0].request.choice.policy.static
        assert backend.static is not None
        assert policy is not None
        sizes = [len(pending.rows) for pending in requests]
        carried, start_s = _join(requests), self._clock()
        scorer = policy.scorer(self._scorer.classes)
        _, probabilities, scores = scorer.step(1, backend.static.run(carried)[1], scorer.start(sum(sizes)))
        now_s = self._clock()
        for pending, (first, end) in zip(requests, pairwise(np.cumsum([0, *sizes]).tolist()), strict=True):
            pending.add_segment(start_s, now_s, sum(sizes), probabilities[first:end], scores[first:end])
            pending.k = len(self._segments) + 1
            pending.leave_all("last", now_s)

    def _admit(self, pending: PendingRequest) -> None:
        """Take the tokens of segment k > 1; rows without tokens leave."""
        rows = len(pending.rows)
        if pending.k > 1 and (admitted := pending.request.acquire_segment(pending.k, rows)) < rows:
            staying = pending.leave(np.arange(rows) >= admitted, "rate-limit", self._clock())
            pending.carried, pending.state = pending.carried.take(staying), pending.state.take(staying)

    def _end(self, pending: PendingRequest, error: BaseException | None) -> None:
        """Run no more segments of a request; what ran is counted. Its caller gets the error, if any."""
        if error is not None:
            pending.resolve(error)
        pending.leave_all("deadline", self._clock())
        self._finish(pending)

    def _finish(self, pending: PendingRequest) -> None:
        """No row is under way: count the answers, and give the caller the predictions."""
        if pending.k == 1:  # nothing ran
            pending.resolve([])
            return
        request, answers = pending.request, pending.answers()
        try:
            start_s = pending.start_s - request.start_s
            predictions = self._runtime.complete(request, answers, start_s, pending.batch_rows)
            if self._on_predictions is not None:
                self._on_predictions(predictions)
            pending.resolve(predictions)
            self._runtime.check_drift(request, pending.images, answers)
        except Exception as error:  # of `on_predictions`
            pending.resolve(error)

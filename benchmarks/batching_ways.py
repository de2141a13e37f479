"""The servers that `continuous_batching.py` compares, and the load generator that sends requests to them."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from mexit import Runtime
from mexit.runtime.batch_latency import BatchLatencyTable
from mexit.runtime.batching import ContinuousBatcher
from mexit.runtime.request import MAX_BATCH

BUDGETS = ("low", "medium", "high")
MOST_ROWS = 8
POLICY_REASONS = {"confident", "last"}


@dataclass(frozen=True)
class Request:
    """A request for `rows` images from index `first`, due `due_s` seconds after the start."""

    first: int
    rows: int
    budget: str
    due_s: float


@dataclass(frozen=True)
class Outcome:
    """Seconds from the due time to the answer (None if refused); whether the policy chose every exit."""

    seconds: float | None
    by_policy: bool


class OneAtATime:
    """Each worker answers one request per call."""

    def __init__(self, runtime: Runtime, tensor: np.ndarray, workers: int, deadline_s: float) -> None:
        self.runtime, self.tensor, self.deadline_s = runtime, tensor, deadline_s
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes: deque[Outcome] = deque()
        self.threads = [threading.Thread(target=self._work) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def send(self, request: Request, due_s: float) -> None:
        self.queue.put((request, due_s))

    def finish(self) -> None:
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            self._answer([item])

    def _answer(self, batch: list[tuple[Request, float]]) -> None:
        """One call, with the deadline of the oldest request, which is the first."""
        left_s = self.deadline_s - (time.perf_counter() - batch[0][1])
        if left_s <= 0:
            self.outcomes.append(Outcome(None, False))
            if batch[1:]:
                self._answer(batch[1:])
            return
        parts = [self.tensor[one.first : one.first + one.rows] for one, _ in batch]
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        answers = self.runtime.answer_tensor(images, budget=batch[0][0].budget, deadline_ms=left_s * 1e3)
        now_s, first = time.perf_counter(), 0
        for request, due_s in batch:
            own = answers[first : first + request.rows]
            self.outcomes.append(Outcome(now_s - due_s, all(one.reason in POLICY_REASONS for one in own)))
            first += request.rows


class WholeBatches(OneAtATime):
    """Each worker takes all waiting requests, and makes one call for each budget."""

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            batch, rows = [item], item[0].rows
            while rows <= MAX_BATCH - MOST_ROWS:
                try:
                    item = self.queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    self.queue.put(None)
                    break
                batch.append(item)
                rows += item[0].rows
            for budget in BUDGETS:
                if same_budget := [one for one in batch if one[0].budget == budget]:
                    self._answer(same_budget)


class Continuous:
    """The continuous batcher."""

    def __init__(self, runtime: Runtime, tensor: np.ndarray, workers: int, deadline_s: float) -> None:
        self.runtime, self.tensor, self.deadline_s = runtime, tensor, deadline_s
        self.outcomes: deque[Outcome] = deque()
        self.pool = ThreadPoolExecutor(workers)
        self.batcher = ContinuousBatcher(runtime, self.pool.submit, workers, table=_table(runtime))
        self.sent = 0

    def send(self, request: Request, due_s: float) -> None:
        self.sent += 1
        left_s = self.deadline_s - (time.perf_counter() - due_s)
        if left_s <= 0:
            self.outcomes.append(Outcome(None, False))
            return
        pending = self.runtime.begin(
            self.tensor[request.first : request.first + request.rows],
            budget=request.budget,
            deadline_ms=left_s * 1e3,
        )
        pending.acquire_tokens()
        self.batcher.submit(pending).add_done_callback(lambda outcome: self._record(outcome, due_s))

    def finish(self) -> None:
        while len(self.outcomes) < self.sent:
            time.sleep(0.001)
        self.pool.shutdown()

    def _record(self, outcome, due_s: float) -> None:
        if outcome.exception() is not None:
            self.outcomes.append(Outcome(None, False))
            return
        by_policy = all(one.reason in POLICY_REASONS for one in outcome.result())
        self.outcomes.append(Outcome(time.perf_counter() - due_s, by_policy))


class DiscardRequests:
    """Discards every request, which measures the cost of the load generator."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def send(self, request: Request, due_s: float) -> None:
        pass

    def finish(self) -> None:
        pass


@cache
def _table(runtime: Runtime) -> BatchLatencyTable:
    manifest = runtime.bundle.manifest
    return BatchLatencyTable.measure(
        runtime.backend, runtime.policy().scorer(len(manifest.classes)), manifest.input.shape
    )


def send_stream(server, stream: list[Request]) -> tuple[list[Outcome], float, float]:
    """Send requests at their due times; returns outcomes, seconds until the last one, and processor seconds."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for request in stream:
        due_s = began_s + request.due_s
        while (early_s := due_s - time.perf_counter()) > 0:
            time.sleep(early_s)
        server.send(request, due_s)
    server.finish()
    return list(server.outcomes), time.perf_counter() - began_s, time.process_time() - began_cpu_s

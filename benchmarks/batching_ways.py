"""The ways of answering that `continuous_batching.py` compares, and how a stream of requests is played to them."""

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
from mexit.runtime.batching import BatchLatencyTable, ContinuousBatcher
from mexit.runtime.request import MAX_BATCH

BUDGETS = ("low", "medium", "high")
MOST_ROWS = 8
AS_PLANNED = {"confident", "last"}


@dataclass(frozen=True)
class Request:
    """`rows` images of the tensor from index `first`, to be sent `due_s` seconds after the start."""

    first: int
    rows: int
    budget: str
    due_s: float


@dataclass(frozen=True)
class Outcome:
    """Seconds from the due time to the answer, None if refused; whether the policy chose the exit of every row."""

    seconds: float | None
    as_planned: bool


class OneAtATime:
    """Each worker takes the next request and answers it in a call of its own."""

    def __init__(self, runtime: Runtime, tensor: np.ndarray, workers: int, deadline_s: float) -> None:
        self.runtime, self.tensor, self.deadline_s = runtime, tensor, deadline_s
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes: deque[Outcome] = deque()
        self.threads = [threading.Thread(target=self._work) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def send(self, request: Request, due_s: float) -> None:
        self.waiting.put((request, due_s))

    def finish(self) -> None:
        for _ in self.threads:
            self.waiting.put(None)
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        while (found := self.waiting.get()) is not None:
            self._answer([found])

    def _answer(self, together: list[tuple[Request, float]]) -> None:
        """One call, with the deadline of the first request, which has waited longest."""
        left_s = self.deadline_s - (time.perf_counter() - together[0][1])
        if left_s <= 0:
            self.outcomes.append(Outcome(None, False))
            if together[1:]:
                self._answer(together[1:])
            return
        images = [self.tensor[one.first : one.first + one.rows] for one, _ in together]
        images = images[0] if len(images) == 1 else np.concatenate(images)
        answers = self.runtime.answer_tensor(images, budget=together[0][0].budget, deadline_ms=left_s * 1e3)
        now_s, first = time.perf_counter(), 0
        for request, due_s in together:
            own = answers[first : first + request.rows]
            self.outcomes.append(Outcome(now_s - due_s, all(one.reason in AS_PLANNED for one in own)))
            first += request.rows


class WholeBatches(OneAtATime):
    """Each worker takes all requests that wait, and makes one call for each budget."""

    def _work(self) -> None:
        while (found := self.waiting.get()) is not None:
            together, rows = [found], found[0].rows
            while rows <= MAX_BATCH - MOST_ROWS:
                try:
                    found = self.waiting.get_nowait()
                except queue.Empty:
                    break
                if found is None:
                    self.waiting.put(None)
                    break
                together.append(found)
                rows += found[0].rows
            for budget in BUDGETS:
                if alike := [one for one in together if one[0].budget == budget]:
                    self._answer(alike)


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
        planned = all(one.reason in AS_PLANNED for one in outcome.result())
        self.outcomes.append(Outcome(time.perf_counter() - due_s, planned))


class NoServer:
    """Discards every request: what remains is the cost of the load generator."""

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


def play(way, stream: list[Request]) -> tuple[list[Outcome], float, float]:
    """Send a stream of requests: outcomes, seconds until the last one, processor seconds."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for request in stream:
        due_s = began_s + request.due_s
        while (early_s := due_s - time.perf_counter()) > 0:
            time.sleep(early_s)
        way.send(request, due_s)
    way.finish()
    return list(way.outcomes), time.perf_counter() - began_s, time.process_time() - began_cpu_s

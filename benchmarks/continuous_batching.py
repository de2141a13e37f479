"""Three ways to answer the same stream of requests: one at a time, in whole batches, continuously.

    python benchmarks/continuous_batching.py BUNDLE [SECONDS]

Requests of 1 to 8 test images with the budgets low, medium and high come at random times (Poisson), whether or
not earlier ones were answered; latency counts from when a request was due. All have the same workers and deadline:

- one at a time: workers take requests in order, each is a call of its own.
- whole batches: a worker takes all that waits, up to 64 rows, and makes one call of each budget's rows.
- continuous: `runtime.batcher`.

The load is a share of the capacity, which is measured first: how many requests a second the first way answers when
there is always one waiting. The deadline is a multiple of the mean time of a request that is alone. A request that
was in the queue until its deadline is refused by every way. The ways take turns, round after round, so that they
share whatever else the machine does.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from page import table, write_page

from mexit import Runtime
from mexit.data import catalog
from mexit.data.splits import Splits
from mexit.runtime.batch_costs import BatchCosts, measure
from mexit.runtime.batcher import Batcher
from mexit.runtime.call import BATCH
from mexit.runtime.grant import granted
from mexit.runtime.ticket import Ticket

BUDGETS = ("low", "medium", "high")
MOST_ROWS = 8
LOADS = (0.3, 0.6, 0.8, 1.0, 1.3, 2.0)
ROUNDS = 3
DEADLINE = 25  # mean times of a request alone
AS_PLANNED = {"confident", "last"}


@dataclass(frozen=True)
class Request:
    """Images of the tensor from `first` on; `due_s` from the beginning."""

    first: int
    rows: int
    budget: str
    due_s: float


@dataclass(frozen=True)
class Outcome:
    """Seconds from when it was due, None if it was refused; whether the deadline cut no answer short."""

    seconds: float | None
    as_planned: bool


class OneAtATime:
    """Workers that take requests in order."""

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
        """One call; the deadline is that of the first one, which has waited longest."""
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
    """Workers that take all that waits."""

    def _work(self) -> None:
        while (found := self.waiting.get()) is not None:
            together, rows = [found], found[0].rows
            while rows <= BATCH - MOST_ROWS:
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
    """The batcher."""

    def __init__(self, runtime: Runtime, tensor: np.ndarray, workers: int, deadline_s: float) -> None:
        self.runtime, self.tensor, self.deadline_s = runtime, tensor, deadline_s
        self.outcomes: deque[Outcome] = deque()
        self.pool = ThreadPoolExecutor(workers)
        self.batcher = Batcher(runtime, self.pool.submit, workers, costs=_costs(runtime))
        self.sent = 0

    def send(self, request: Request, due_s: float) -> None:
        self.sent += 1
        left_s = self.deadline_s - (time.perf_counter() - due_s)
        if left_s <= 0:
            self.outcomes.append(Outcome(None, False))
            return
        ticket = self.runtime.begin(
            self.tensor[request.first : request.first + request.rows],
            budget=request.budget,
            deadline_ms=left_s * 1e3,
            kind=Ticket,
        )
        ticket.pay()
        self.batcher.submit(ticket).add_done_callback(lambda outcome: self._hear(outcome, due_s))

    def finish(self) -> None:
        while len(self.outcomes) < self.sent:
            time.sleep(0.001)
        self.pool.shutdown()

    def _hear(self, outcome, due_s: float) -> None:
        if outcome.exception() is not None:
            self.outcomes.append(Outcome(None, False))
            return
        planned = all(one.reason in AS_PLANNED for one in outcome.result())
        self.outcomes.append(Outcome(time.perf_counter() - due_s, planned))


@cache
def _costs(runtime: Runtime) -> BatchCosts:
    manifest = runtime.bundle.manifest
    return measure(runtime.backend, runtime.policy().scorer(len(manifest.classes)), manifest.input.shape)


WAYS = {"one at a time": OneAtATime, "whole batches": WholeBatches, "continuous": Continuous}


def requests(count: int, rate: float, samples: int, seed: int) -> list[Request]:
    """`count` requests at `rate` a second."""
    rng = np.random.default_rng(seed)
    due_s = np.cumsum(rng.exponential(1 / rate, count))
    rows = rng.integers(1, MOST_ROWS + 1, count)
    first = rng.integers(0, samples - MOST_ROWS, count)
    budgets = rng.integers(0, len(BUDGETS), count)
    return [
        Request(int(one), int(some), BUDGETS[which], float(due))
        for one, some, which, due in zip(first, rows, budgets, due_s, strict=True)
    ]


def play(way, stream: list[Request]) -> tuple[list[Outcome], float, float]:
    """Send a stream: outcomes, seconds until the last one, processor seconds."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for request in stream:
        due_s = began_s + request.due_s
        while (early_s := due_s - time.perf_counter()) > 0:
            time.sleep(early_s)
        way.send(request, due_s)
    way.finish()
    return list(way.outcomes), time.perf_counter() - began_s, time.process_time() - began_cpu_s


def alone_s(runtime: Runtime, tensor: np.ndarray) -> float:
    """Mean seconds of a request when nothing else runs, without the slowest fifth, which others held up."""
    seconds = []
    for request in requests(400, 1.0, len(tensor), seed=1):
        began_s = time.perf_counter()
        runtime.answer_tensor(tensor[request.first : request.first + request.rows], budget=request.budget)
        seconds.append(time.perf_counter() - began_s)
    return float(np.mean(np.sort(seconds)[: int(0.8 * len(seconds))]))


def capacity(open_way: Callable, tensor: np.ndarray, count: int = 1000) -> float:
    """Requests a second when all are there at once: the median of some tries."""
    rates = []
    for seed in range(5):
        way = open_way()
        _, seconds, _ = play(way, requests(count, 1e9, len(tensor), seed))
        rates.append(count / seconds)
    return float(np.median(rates))


@dataclass(frozen=True)
class Figures:
    """One round of one way at one load."""

    goodput: float
    missed: float
    cut: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def figures(outcomes: list[Outcome], seconds: float, cpu_s: float, deadline_s: float) -> Figures:
    times = np.array([np.inf if one.seconds is None else one.seconds for one in outcomes])
    in_time = times <= deadline_s
    planned = np.array([one.as_planned for one in outcomes])
    p50, p99 = np.quantile(times, (0.5, 0.99), method="higher") * 1e3
    return Figures(
        float((in_time & planned).sum() / seconds),
        float(1 - in_time.mean()),
        float((in_time & ~planned).mean()),
        float(p50),
        float(p99),
        cpu_s / len(outcomes) * 1e6,
    )


def main(bundle: str, seconds: str = "2.5") -> None:
    runtime = Runtime.open(bundle, "medium", threads=1)
    manifest = runtime.bundle.manifest
    data = catalog.load(manifest.splits.data_set)
    index = Splits.from_bytes(runtime.bundle.splits(), runtime.bundle.path).part("test")
    tensor = data.batch(index, manifest.input)
    workers = granted().threads
    service_s = alone_s(runtime, tensor)
    deadline_s = DEADLINE * service_s
    able = capacity(lambda: OneAtATime(runtime, tensor, workers, 1e9), tensor)
    found: dict[tuple[float, str], list[Figures]] = {(load, name): [] for load in LOADS for name in WAYS}
    for seed in range(ROUNDS):
        for load in LOADS:
            stream = requests(int(load * able * float(seconds)), load * able, len(tensor), 10 + seed)
            for name, kind in WAYS.items():
                played = play(kind(runtime, tensor, workers, deadline_s), stream)
                found[load, name].append(figures(*played, deadline_s))
    write(bundle, float(seconds), service_s, able, workers, found)


def write(
    bundle: str,
    seconds: float,
    service_s: float,
    able: float,
    workers: int,
    found: dict[tuple[float, str], list[Figures]],
) -> None:
    def median(load: float, name: str, what: str) -> float:
        return float(np.median([getattr(one, what) for one in found[load, name]]))

    lines, ratios = [], []
    for load in LOADS:
        for name in WAYS:
            good = median(load, name, "goodput")
            spread = [one.goodput for one in found[load, name]]
            missed = sum(one.missed for one in found[load, name]) / ROUNDS
            cut = sum(one.cut for one in found[load, name]) / ROUNDS
            times = [f"{median(load, name, what):.2f}" for what in ("p50_ms", "p99_ms")]
            cpu = f"{median(load, name, 'cpu_us'):.0f}"
            lines.append(
                [
                    f"{load:.0%}",
                    name,
                    f"{good:.0f} ({min(spread):.0f} to {max(spread):.0f})",
                    f"{missed:.2%}",
                    f"{cut:.2%}",
                    *times,
                    cpu,
                ]
            )
        better = max(median(load, name, "goodput") for name in list(WAYS)[:2])
        ratios.append((load, median(load, "continuous", "goodput") / better))
    columns = ["load", "way", "goodput/s", "missed", "cut short", "p50 ms", "p99 ms", "CPU us a request"]
    worst = min(ratio for _, ratio in ratios)
    missed_at_80 = sum(one.missed for one in found[0.8, "continuous"]) / ROUNDS
    write_page(
        "continuous_batching",
        "2-core-cpu",
        "Continuous batching against one at a time and whole batches",
        [
            f"`{bundle.rstrip('/').rpartition('/')[2]}`: requests of 1 to {MOST_ROWS} images with budgets "
            f"{', '.join(BUDGETS)}, {seconds:g} s a round, {ROUNDS} rounds, {workers} workers. A request alone "
            f"takes {service_s * 1e3:.2f} ms in the mean; the deadline is {DEADLINE} times that, "
            f"{DEADLINE * service_s * 1e3:.1f} ms; the capacity is {able:.0f} requests a second. The load "
            f"generator runs in the same process. Others wanted the machine too: the load average was "
            f"{os.getloadavg()[1]:.1f} in the end.",
            table(columns, lines),
            "Goodput: answered in time, and by the exit that the policy chose (median of the rounds, and their "
            "range). Missed: refused or answered after the deadline. Cut short: answered in time, but some row "
            "by an earlier exit because of the deadline. Latencies count from when a request was due, refused "
            "ones as infinite; the CPU time holds the load generator's.",
            "Continuous against the better of the other two, by load: "
            + ", ".join(f"{load:.0%}: {ratio:.2f}" for load, ratio in ratios)
            + f". At least 0.95 everywhere was aimed at: {'met' if worst >= 0.95 else 'not met'}. Missed by "
            f"continuous at 80 %: {missed_at_80:.2%}; none was aimed at.",
        ],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

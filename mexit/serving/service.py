"""The runtime behind the routes: what a worker does with one request, and what is known of all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.errors import BadInput, DeadlineExceeded, Overloaded
from mexit.runtime.batching import ContinuousBatcher
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import Request
from mexit.runtime.runtime import Runtime
from mexit.serving import oip
from mexit.serving.limits import Limits
from mexit.serving.metrics import Metrics, Timings
from mexit.serving.refusals import RefusalPace
from mexit.serving.request_body import inflate
from mexit.serving.request_options import Options
from mexit.serving.worker_pool import Job, MemoryQuota, WorkerPool

_SOON_MS = 1e-3  # the first exit always runs once a worker has taken the request
_MAX_WORKERS = 4
BATCHING = ("off", "continuous")


@dataclass(frozen=True)
class IncomingRequest:
    """One request, all of it here.

    Attributes:
        body: as sent.
        encoding: its `Content-Encoding`.
        at_ns: when its last byte came, by the clock of `time.perf_counter_ns`.
        client: who sent it; see `access.client_of`.
    """

    body: bytes
    encoding: str
    at_ns: int
    client: str


class Service:
    """One runtime being served.

    Attributes:
        stopping: set once; from then on nothing new is begun and the server is not ready.
        active: requests being answered.
        refusals: when clients hear of them; None where clients are not told apart.
    """

    def __init__(
        self,
        runtime: Runtime,
        limits: Limits,
        *,
        threads: int = 1,
        deadline_ms: float | None = None,
        batching: str = BATCHING[0],
    ) -> None:
        """A service that begins nothing yet.

        Args:
            runtime: what is served.
            limits: what clients can make it do.
            threads: what the engine was opened with.
            deadline_ms: for requests that name none.
            batching: one of `BATCHING`: each request has its own runs of a segment, or they share them (see
                `batching`).
        """
        self.runtime = runtime
        self.limits = limits
        self.metrics = Metrics(runtime.bundle.manifest.name, runtime.budget.text)
        if (drift := runtime.drift_watch) is not None:
            self.metrics.watch_drift(lambda: runtime.stats.snapshot().watch_macs, lambda: len(drift.alarms))
        rate_limiter = runtime.rate_limiter
        told_apart = rate_limiter is not None and rate_limiter.limits.client is not None
        share = limits.share if told_apart else 1
        self.refusals = RefusalPace() if told_apart else None
        workers = _workers(threads)
        self.worker_pool = WorkerPool(workers, limits.jobs, share)
        self._batcher: ContinuousBatcher | None = None
        if batching == "continuous":
            self._batcher = ContinuousBatcher(
                runtime, self.worker_pool.lend, workers, on_predictions=self.metrics.predicted
            )
        self.storage = MemoryQuota(limits.held_bytes, share)
        if rate_limiter is not None:
            self.metrics.watch_rate_limiter(rate_limiter.state, lambda: self.worker_pool.waiting)
        self.stopping = False
        self.active = 0
        self._deadline_ms = deadline_ms

    def close(self) -> None:
        """Drop what was not begun; threads end after what they are doing."""
        if self._batcher is not None:
            self._batcher.close()
        self.worker_pool.close()

    @contextmanager
    def serving(self, route: str) -> Iterator[None]:
        """Around everything one request costs. Raises `Overloaded` when the server is stopping."""
        if self.stopping:
            raise Overloaded("the server is stopping")
        start = time.perf_counter()
        self.active += 1
        self.metrics.started(route)
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.finished(route, time.perf_counter() - start)

    def infer(self, arrival: IncomingRequest, header_lengths: Sequence[str]) -> Job[tuple[bytes, dict[str, str]]]:
        """A worker's job: a request of the Open Inference Protocol to the body and headers of its response."""
        begun_ns = time.perf_counter_ns()
        body = inflate(arrival.body, arrival.encoding, self.limits.body_bytes)
        length = oip.parse_header_length(header_lengths, len(body))
        request = oip.parse_request(body, length, self.runtime.bundle.manifest.input, self.limits)
        read_ns = time.perf_counter_ns()
        call = yield from self._answer(request.tensor, request.options, arrival, begun_ns)
        answered_ns = time.perf_counter_ns()
        response = oip.write_response(request, call.predictions, self.runtime.bundle.manifest.name)
        written_ns = time.perf_counter_ns()
        waited_ns = round(call.waited_s * 1e9)
        spans = Timings(
            begun_ns - arrival.at_ns + waited_ns,
            read_ns - begun_ns,
            answered_ns - read_ns - waited_ns,
            written_ns - answered_ns,
        )
        self.metrics.succeeded(len(call.predictions), spans)
        return response

    def classify(self, arrival: IncomingRequest, options: Options) -> Job[Prediction]:
        """A worker's job: the bytes of an image to its answer."""
        begun_ns = time.perf_counter_ns()
        self.runtime.policy(options.budget)  # a budget that is none is refused before an image is decoded
        body = inflate(arrival.body, arrival.encoding, self.limits.body_bytes)
        if not body:
            raise BadInput("the body is empty: send the bytes of an image (curl --data-binary @image.png)")
        call = yield from self._answer(self.runtime.prepare(body), options, arrival, begun_ns)
        return call.predictions[0]

    def _answer(
        self, tensor: NDArray[np.float32], options: Options, arrival: IncomingRequest, begun_ns: int
    ) -> Job[Request]:
        deadline_ms = self._deadline_ms if options.deadline_ms is None else options.deadline_ms
        if deadline_ms is not None:
            waited_ms = (begun_ns - arrival.at_ns) / 1e6
            if waited_ms >= deadline_ms:
                raise DeadlineExceeded(f"{waited_ms:.3f} ms in the queue, the deadline was {deadline_ms:g} ms")
            deadline_ms = max(_SOON_MS, deadline_ms - (time.perf_counter_ns() - arrival.at_ns) / 1e6)
        call = self.runtime.begin(
            tensor,
            budget=options.budget,
            deadline_ms=deadline_ms,
            max_exit=options.max_exit,
            receipts=options.receipts,
            client=arrival.client,
            wait_ms=self.limits.wait_s * 1e3 if deadline_ms is None else None,
            queued_s=(begun_ns - arrival.at_ns) / 1e9,
        )
        while not call.done:
            if call.acquire_tokens() > 0:
                yield call.acquire_tokens
            if self._batcher is not None:
                yield (outcome := self._batcher.submit(call))
                outcome.result()
            else:
                self.metrics.predicted(self.runtime.run(call))
        return call


def _workers(threads: int) -> int:
    """As many as keep the processors busy: each worker runs an engine of `threads` threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_WORKERS, usable // threads))

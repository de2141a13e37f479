"""A version of a model in service: answers one request in a worker thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mexit.errors import DeadlineExceeded, Overloaded
from mexit.runtime.batching import ContinuousBatcher
from mexit.runtime.explanation import explain
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import Request, RequestOptions
from mexit.runtime.runtime import Runtime
from mexit.serving import oip
from mexit.serving.explanation_json import explanation_json
from mexit.serving.image_body import image_bytes
from mexit.serving.metrics import Timings
from mexit.serving.request_body import decompress
from mexit.serving.server_state import ServerState
from mexit.serving.worker_pool import Job

T = TypeVar("T")
_SHORTEST_DEADLINE_MS = 1e-3  # once a worker has the request, the first exit always runs
_PROFILE_RUNS = 8
_JSON_S_PER_BYTE = 2e-8  # to parse, roughly


@dataclass(frozen=True)
class IncomingRequest:
    """A request whose body has arrived.

    Attributes:
        body: the body as sent.
        encoding: its `Content-Encoding`.
        arrival_ns: when the last byte arrived, by `time.perf_counter_ns`.
        client: identity of the client, see `middleware.client_id`.
    """

    body: bytes
    encoding: str
    arrival_ns: int
    client: str


class Service:
    """One version of a model, opened.

    Attributes:
        server: what the models of the server share.
        runtime: the opened version.
        name: name of the model in routes, answers and metrics.
        version: number of the version.
        identity: number of the version and what its files hold: equal in processes that opened the same.
        may_be_short: whether a request with one image is short, see `is_short`.
        metrics: the model's series and statistics.
    """

    def __init__(
        self,
        server: ServerState,
        runtime: Runtime,
        name: str | None = None,
        version: str = "1",
        identity: str = "",
    ) -> None:
        """Serve a runtime, whose rate limiter becomes the server's.

        Args:
            server: what the models of the server share.
            runtime: the opened version.
            name: name of the model; default the bundle's.
            version, identity: see the attributes.

        Raises:
            UsageError: the rate limiter could never run a segment of the network.
        """
        self.server = server
        self.runtime = runtime
        self.name = name or runtime.bundle.manifest.name
        self.version = version
        self.identity = identity
        if server.rate_limiter is not None:
            runtime.rate_limiter = server.rate_limiter.for_costs(runtime.bundle.manifest.cumulative_macs)
        self.metrics = server.metrics.model(self.name, version, runtime)
        measure = server.limits.short_s and server.batching == "off"
        self._row_s = self._measure_row_s() if measure else float("inf")
        self.may_be_short = self._row_s < server.limits.short_s
        self._row_bytes = 4 * math.prod(runtime.bundle.manifest.input.shape)
        self._batcher: ContinuousBatcher | None = None
        if server.batching == "continuous":
            self._batcher = ContinuousBatcher(
                runtime, server.worker_pool.submit, server.workers, on_predictions=self.metrics.count_predictions
            )

    def close(self) -> None:
        """Answer requests that wait in the batcher with `Overloaded`, and end background work."""
        if self._batcher is not None:
            self._batcher.close()
        self.runtime.close()

    def is_short(self, request: IncomingRequest, *, binary: bool) -> bool:
        """Whether a tensor request is expected to take less than `Limits.short_s`; `binary`: its tensor is bytes."""
        size = len(request.body)
        parse_s = 0.0 if binary else size * _JSON_S_PER_BYTE
        rows = max(1, size // self._row_bytes)
        return not request.encoding and rows * self._row_s + parse_s < self.server.limits.short_s

    def infer(self, request: IncomingRequest, header_lengths: Sequence[str]) -> Job[tuple[bytes, dict[str, str]]]:
        """The job of an Open Inference Protocol request over HTTP.

        Args:
            request: the request.
            header_lengths: values of the header `oip.HEADER_LENGTH`.

        Returns:
            Body and headers of the response.
        """

        def parse() -> oip.InferRequest:
            body = decompress(request.body, request.encoding, self.server.limits.body_bytes)
            header_length = oip.parse_header_length(header_lengths, len(body))
            return oip.parse_request(body, header_length, self.runtime.bundle.manifest.input, self.server.limits)

        return self.answer(request, parse, oip.write_response)

    def answer(
        self,
        request: IncomingRequest,
        parse: Callable[[], oip.InferRequest],
        write: Callable[[oip.InferRequest, Sequence[Prediction], str, str], T],
    ) -> Job[T]:
        """The job of a tensor request.

        Args:
            request: the request.
            parse: parses it.
            write: makes the response from the parsed request, its predictions, and the model's name and version.
        """
        start_ns = time.perf_counter_ns()
        parsed = parse()
        parsed_ns = time.perf_counter_ns()
        inference = yield from self._run(parsed.tensor, parsed.options, request, start_ns)
        answered_ns = time.perf_counter_ns()
        response = write(parsed, inference.predictions, self.name, self.version)
        written_ns = time.perf_counter_ns()
        token_wait_ns = round(inference.waited_s * 1e9)
        timings = Timings(
            queue=start_ns - request.arrival_ns + token_wait_ns,
            parse=parsed_ns - start_ns,
            infer=answered_ns - parsed_ns - token_wait_ns,
            write=written_ns - answered_ns,
        )
        self.metrics.statistics.record_success(len(inference.predictions), timings)
        return response

    @contextmanager
    def record_failure(self) -> Iterator[None]:
        """Record a tensor request that ends in an error, in the statistics of the protocol."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        except Exception:
            self.metrics.statistics.record_failure(time.perf_counter_ns() - start_ns)
            raise

    def classify(self, request: IncomingRequest, options: RequestOptions) -> Job[Prediction]:
        """The job of a `/v1/classify` request: encoded image to prediction. Raises `BadInput`."""
        start_ns = time.perf_counter_ns()
        self.runtime.policy(options.get("budget"))  # refuses an unknown budget before the image is decoded
        body = decompress(request.body, request.encoding, self.server.limits.body_bytes)
        tensor = self.runtime.prepare(image_bytes(body, self.server.limits))
        inference = yield from self._run(tensor, options, request, start_ns)
        return inference.predictions[0]

    def explain(self, request: IncomingRequest, budget: str | None) -> Job[dict[str, Any]]:
        """The job of a `/v1/explain` request: encoded image to the answers of all exits. Raises `BadInput`."""
        self.runtime.policy(budget)
        body = decompress(request.body, request.encoding, self.server.limits.body_bytes)
        image = self.runtime.prepare(image_bytes(body, self.server.limits))
        limiter = self.runtime.rate_limiter
        if limiter is not None and not limiter.acquire_full_pass(request.client, 1):
            raise Overloaded("the rate limiter has no tokens for all exits of one image now: try again later")
        yield from ()
        return explanation_json(explain(self.runtime, image, budget), self.runtime.bundle.manifest.classes)

    def _run(
        self, tensor: NDArray[np.float32], options: RequestOptions, request: IncomingRequest, start_ns: int
    ) -> Job[Request]:
        """Run the rows of a request; `start_ns` is when a worker took it."""
        deadline_ms = options.get("deadline_ms")
        deadline_ms = self.server.deadline_ms if deadline_ms is None else deadline_ms
        if deadline_ms is not None:
            queue_ms = (start_ns - request.arrival_ns) / 1e6
            if queue_ms >= deadline_ms:
                raise DeadlineExceeded(f"{queue_ms:.3f} ms in the queue, the deadline was {deadline_ms:g} ms")
            elapsed_ms = (time.perf_counter_ns() - request.arrival_ns) / 1e6
            deadline_ms = max(_SHORTEST_DEADLINE_MS, deadline_ms - elapsed_ms)
        options = {
            **options,
            "deadline_ms": deadline_ms,
            "client": request.client,
            "wait_ms": self.server.limits.token_wait_s * 1e3 if deadline_ms is None else None,
            "queued_s": (start_ns - request.arrival_ns) / 1e9,
        }
        inference = self.runtime.begin(tensor, **options)
        while not inference.done:
            if inference.acquire_tokens() > 0:
                yield inference.acquire_tokens
            if self._batcher is not None:
                yield (outcome := self._batcher.submit(inference))
                outcome.result()
            else:
                self.metrics.count_predictions(self.runtime.run(inference))
        return inference

    def _measure_row_s(self) -> float:
        """The time of one image through all segments, seconds."""
        seconds = []
        for _ in range(_PROFILE_RUNS):
            start_s = time.perf_counter()
            self.runtime.run_to_exit(len(self.runtime.bundle.manifest.exits))
            seconds.append(time.perf_counter() - start_s)
        return min(seconds)

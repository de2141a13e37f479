"""Worker threads for request jobs: clients take turns, and the number of requests is bounded.

The event loop only moves bytes. Decompression, parsing, inference and writing the response run in a few threads,
so health checks are answered while every worker is busy. Clients take turns: a client's next job waits for at
most one job of each other client per worker, however many jobs the others have queued.

A job is a generator. It runs in a worker until it returns or yields what it waits for, and leaves the worker to
other jobs meanwhile. It yields either

    a function    that returns the seconds until its rate limiter tokens are available (0.0 is now); the event loop
                  calls it, and queues the job again
    a future      of the batching scheduler; the thread that resolves the future continues the job
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mexit.errors import Overloaded

T = TypeVar("T")
SecondsLeft = Callable[[], float]
Job = Generator[SecondsLeft | Future[Any], None, T]


class ClientDisconnected(Exception):
    """The client disconnected before its job was done."""


class WorkerPool:
    """Runs the jobs of requests in worker threads.

    Attributes:
        waiting: jobs that wait for tokens of the rate limiter.
    """

    def __init__(self, threads: int, max_requests: int, client_share: int = 1) -> None:
        """Start no thread yet.

        Args:
            threads: number of worker threads.
            max_requests: jobs that wait or run at a time.
            client_share: one client may have 1/client_share of `max_requests`.
        """
        self._requests = Quota(max_requests, client_share, "{} requests are waiting already")
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mexit-worker")
        self._lock = threading.Lock()
        self._queues: dict[str, deque[JobStep[Any]]] = {}  # by client; the first client is next
        self.waiting = 0

    async def run(self, job: Job[T], disconnected: Callable[[], Awaitable[object]], client: str = "") -> T:
        """Run a job and return its result. Called in the event loop.

        Args:
            job: the job, not started.
            disconnected: returns when the client has disconnected. A queued or waiting job is then dropped; a
                job in a worker runs until it would leave the worker.
            client: identity of the client.

        Raises:
            Overloaded: `max_requests` jobs wait or run.
            ClientDisconnected: the job was dropped.
        """
        with self._requests.reserve(client) as add:
            add(1)
            disconnect = asyncio.ensure_future(disconnected())
            try:
                while isinstance(outcome := await self._run_step(job, client, disconnect), TokenWait):
                    await self._wait_for_tokens(outcome.seconds_left, disconnect)
                return outcome
            finally:
                disconnect.cancel()

    def submit(self, function: Callable[[], None]) -> None:
        """Run a function in a worker, after everything that was queued before."""
        self._executor.submit(function)

    def close(self) -> None:
        """Cancel what is queued. Threads end after their present job."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for step in (step for queue in self._queues.values() for step in queue):
                step.outcome.cancel()

    async def _run_step(self, job: Job[T], client: str, disconnect: asyncio.Future[Any]) -> T | TokenWait:
        step = JobStep(job)
        with self._lock:
            self._queues.setdefault(client, deque()).append(step)
        self._executor.submit(self._run_next)
        outcome = asyncio.wrap_future(step.outcome)
        either: set[asyncio.Future[Any]] = {outcome, disconnect}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not outcome.done() and step.cancel():
            raise ClientDisconnected
        return await outcome

    def _run_next(self) -> None:
        """Run the first step of the client whose turn it is; that client is last afterwards."""
        with self._lock:
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            step = queue.popleft()
            if queue:
                self._queues[client] = queue
        step.run()

    async def _wait_for_tokens(self, seconds_left: SecondsLeft, disconnect: asyncio.Future[Any]) -> None:
        self.waiting += 1
        try:
            while (wait_s := seconds_left()) > 0:
                await asyncio.wait({disconnect}, timeout=wait_s)
                if disconnect.done():
                    raise ClientDisconnected
        finally:
            self.waiting -= 1


@dataclass(frozen=True)
class TokenWait:
    """A job left its worker to wait for tokens; `seconds_left` returns how long, 0.0 once they are available."""

    seconds_left: SecondsLeft


class JobStep(Generic[T]):
    """A job from its present state to its end, or to its next wait for tokens.

    Attributes:
        outcome: the job's result, or its wait for tokens.
    """

    def __init__(self, job: Job[T]) -> None:
        self.outcome: Future[T | TokenWait] = Future()
        self._job = job
        self._awaited: Future[Any] | None = None
        self._cancelled = False

    def run(self) -> None:
        """Run in this thread until the job ends or waits."""
        if self.outcome.set_running_or_notify_cancel():
            self._advance()

    def cancel(self) -> bool:
        """Cancel the step; returns True if it had not started, and then it never starts.

        A running step goes on until it waits for a future, which is cancelled.
        """
        if self.outcome.cancel():
            return True
        self._cancelled = True  # before `_awaited` is read; `_await` accesses the two in the opposite order
        if (awaited := self._awaited) is not None:
            awaited.cancel()
        return False

    def _advance(self) -> None:
        try:
            awaited = next(self._job)
        except StopIteration as end:
            self.outcome.set_result(end.value)
        except BaseException as error:  # the event loop waits for the outcome, so every error must reach it
            self.outcome.set_exception(error)
        else:
            if isinstance(awaited, Future):
                self._await(awaited)
            else:
                self.outcome.set_result(TokenWait(awaited))

    def _await(self, future: Future[Any]) -> None:
        self._awaited = future
        if self._cancelled:
            future.cancel()
        future.add_done_callback(self._resume)

    def _resume(self, future: Future[Any]) -> None:
        if future.cancelled():
            self._job.close()
            self.outcome.set_exception(ClientDisconnected())
        else:
            self._advance()


class Quota:
    """Bounds a number, such as bytes or requests, in total and per client. For the event loop's thread only."""

    def __init__(self, limit: int, client_share: int, message: str) -> None:
        """Nothing is reserved yet.

        Args:
            limit: the largest total.
            client_share: one client may reserve 1/client_share of `limit`.
            message: text of the error; `{}` stands for the reserved number.
        """
        self._limit, self._client_limit = limit, max(1, limit // client_share)
        self._message = message
        self._total = 0
        self._by_client: Counter[str] = Counter()

    @contextmanager
    def reserve(self, client: str = "") -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves a number; all of it is released when the block ends.

        The function raises `Overloaded` beyond a limit.
        """
        reserved = 0

        def add(number: int) -> None:
            nonlocal reserved
            if self._total + number > self._limit:
                raise Overloaded(self._message.format(self._total))
            if self._by_client[client] + number > self._client_limit:
                raise Overloaded(self._message.format(self._by_client[client]) + ", all of them yours")
            self._total += number
            self._by_client[client] += number
            reserved += number

        try:
            yield add
        finally:
            self._total -= reserved
            self._by_client[client] -= reserved
            if not self._by_client[client]:
                del self._by_client[client]

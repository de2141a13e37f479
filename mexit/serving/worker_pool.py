"""Runs the jobs of requests: clients take turns, and the number of requests is bounded.

The event loop moves bytes. Decompression, parsing, inference and writing the response run in a few threads, so health
checks are answered while every worker is busy. A short job runs in the event loop itself, because passing it to a
thread and back takes longer than the job. The loop receives and sends between two short jobs.

Clients take turns: a client's next job waits for at most one job of each other client per worker, however many jobs
the others have queued.

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
from mexit.serving.asgi import ClientDisconnected

T = TypeVar("T")
SecondsLeft = Callable[[], float]
Job = Generator[SecondsLeft | Future[Any], None, T]


class WorkerPool:
    """Runs the jobs of requests in worker threads or in the event loop."""

    def __init__(
        self, threads: int, max_requests: int, client_share: int = 1, on_wait: Callable[[int], None] = lambda _: None
    ) -> None:
        """Start no thread yet.

        Args:
            threads: number of worker threads.
            max_requests: jobs that wait or run at a time, except short ones that do not wait for tokens.
            client_share: one client may have 1/client_share of `max_requests`.
            on_wait: called with the change of the number of jobs that wait for tokens.
        """
        self._requests = Quota(max_requests, client_share, "{} requests are waiting already")
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mexit-worker")
        self._lock = threading.Lock()
        self._queue, self._short_queue = _Turns(), _Turns()
        self._on_wait = on_wait

    async def run(
        self, job: Job[T], disconnected: Callable[[], Awaitable[object]], client: str = "", *, short: bool = False
    ) -> T:
        """Run a job and return its result. Called in the event loop.

        Args:
            job: the job, not started.
            disconnected: returns when the client has disconnected. A queued or waiting job is then dropped; a
                job in a worker runs until it would leave the worker, and a short job runs.
            client: identity of the client.
            short: whether to run the job in the event loop.

        Raises:
            Overloaded: `max_requests` jobs wait or run. A short job counts while it waits for tokens.
            ClientDisconnected: the job was dropped.
        """
        disconnect: asyncio.Future[object] | None = None
        with self._requests.reserve(client) as add:
            counted = not short  # to answer a short job at once takes hardly longer than to refuse it
            if counted:
                add(1)
            try:
                while True:
                    if short:
                        outcome = await self._run_short_step(job, client)
                    else:
                        disconnect = disconnect or asyncio.ensure_future(disconnected())
                        outcome = await self._run_step(job, client, disconnect)
                    if not isinstance(outcome, TokenWait):
                        return outcome
                    if not counted:
                        add(1)
                        counted = True
                    disconnect = disconnect or asyncio.ensure_future(disconnected())
                    await self._wait_for_tokens(outcome.seconds_left, disconnect)
            finally:
                if disconnect is not None:
                    disconnect.cancel()

    def check_room(self, client: str) -> None:
        """Raise `Overloaded` if a job of this client would be refused now, unless it is short."""
        with self._requests.reserve(client) as add:
            add(1)

    def submit(self, function: Callable[[], None]) -> None:
        """Run a function in a worker, after everything that was queued before."""
        self._executor.submit(function)

    def close(self) -> None:
        """Cancel what is queued. Threads end after their present job."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for step in (*self._queue.steps(), *self._short_queue.steps()):
                step.outcome.cancel()

    async def _run_step(self, job: Job[T], client: str, disconnect: asyncio.Future[Any]) -> T | TokenWait:
        outcome: Future[T | TokenWait] = Future()
        step = JobStep(job, outcome)
        with self._lock:
            self._queue.add(client, step)
        self._executor.submit(self._run_next)
        result = asyncio.wrap_future(outcome)
        either: set[asyncio.Future[Any]] = {result, disconnect}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not result.done() and step.cancel():
            raise ClientDisconnected
        return await result

    def _run_next(self) -> None:
        with self._lock:
            step = self._queue.next()
        step.run()

    async def _run_short_step(self, job: Job[T], client: str) -> T | TokenWait:
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T | TokenWait] = loop.create_future()
        if not self._short_queue:
            loop.call_soon(self._run_next_short, loop)
        self._short_queue.add(client, JobStep(job, outcome))
        return await outcome

    def _run_next_short(self, loop: asyncio.AbstractEventLoop) -> None:
        self._short_queue.next().run()
        if self._short_queue:  # one step per turn of the loop, which receives and sends in between
            loop.call_soon(self._run_next_short, loop)

    async def _wait_for_tokens(self, seconds_left: SecondsLeft, disconnect: asyncio.Future[Any]) -> None:
        self._on_wait(1)
        try:
            while (wait_s := seconds_left()) > 0:
                await asyncio.wait({disconnect}, timeout=wait_s)
                if disconnect.done():
                    raise ClientDisconnected
        finally:
            self._on_wait(-1)


@dataclass(frozen=True)
class TokenWait:
    """A job left its worker to wait for tokens; `seconds_left` returns how long, 0.0 once they are available."""

    seconds_left: SecondsLeft


class JobStep(Generic[T]):
    """A job from its present state to its end, or to its next wait for tokens.

    Attributes:
        outcome: the job's result, or its wait for tokens. A future of asyncio for a step in the event loop.
    """

    def __init__(self, job: Job[T], outcome: Future[T | TokenWait] | asyncio.Future[T | TokenWait]) -> None:
        self.outcome = outcome
        self._job = job
        self._awaited: Future[Any] | None = None
        self._cancelled = False

    def run(self) -> None:
        """Run in this thread until the job ends or waits."""
        if isinstance(self.outcome, Future):
            runs = self.outcome.set_running_or_notify_cancel()
        else:
            runs = not self.outcome.done()
        if runs:
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


class _Turns:
    """Queued steps of clients, which take turns."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[JobStep[Any]]] = {}  # by client; the first client is next

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, client: str, step: JobStep[Any]) -> None:
        self._queues.setdefault(client, deque()).append(step)

    def next(self) -> JobStep[Any]:
        """Remove the first step of the client whose turn it is; that client is last afterwards."""
        client = next(iter(self._queues))
        queue = self._queues.pop(client)
        step = queue.popleft()
        if queue:
            self._queues[client] = queue
        return step

    def steps(self) -> Iterator[JobStep[Any]]:
        return (step for queue in self._queues.values() for step in queue)


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

"""Work off the event loop, few jobs at a time; what does not fit is refused at once.

The event loop only moves bytes. Inflating, parsing, decoding, inference and writing the response are done in a
small thread pool, so health checks answer while every worker is busy. Clients take turns: however much one of them
sends, another one's job waits for one job of each other client at most, on every worker.

A job is a generator. It runs in a worker until it has to wait for the governor; then it yields, leaves the worker
to others and is taken up again once the function that it yielded says so.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from mexit.errors import Overloaded

T = TypeVar("T")
Ready = Callable[[], float]  # seconds after which to ask again; 0.0 is now
Job = Generator[Ready, None, T]


class ClientGone(Exception):
    """The client left before its job was done."""


class Workshop:
    """A thread pool with a bounded number of jobs in it, waiting ones included.

    Attributes:
        waiting: jobs that wait for the governor.
    """

    def __init__(self, threads: int, jobs: int, share: int = 1) -> None:
        """`share`: one client may have a `share`-th of the jobs."""
        self._turns = _Turns(threads)
        self._places = Storage(jobs, share, "{} requests are waiting already")
        self.waiting = 0

    async def run(self, job: Job[T], gone: Callable[[], Awaitable[object]], client: str = "") -> T:
        """Do a job.

        Args:
            job: what to do; it is not begun yet.
            gone: returns when nobody waits for the result any more. A job that is in no worker is then dropped;
                one that is in a worker is finished up to where it would leave it, so that whatever it counts
                stays true.
            client: whose turn it takes.

        Raises:
            Overloaded: as many jobs as fit are waiting or under way.
            ClientGone: the job was dropped.
        """
        with self._places.shelf(client) as take:
            take(1)
            leaving = asyncio.ensure_future(gone())
            try:
                while isinstance(outcome := await self._step(job, client, leaving), _Waits):
                    await self._wait(outcome.ready, leaving)
                return outcome
            finally:
                leaving.cancel()

    async def _step(self, job: Job[T], client: str, leaving: asyncio.Future[Any]) -> T | _Waits:
        future = self._turns.submit(client, partial(_advance, job))
        result = asyncio.wrap_future(future)
        either: set[asyncio.Future[Any]] = {result, leaving}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not result.done() and future.cancel():
            raise ClientGone
        return await result

    async def _wait(self, ready: Ready, leaving: asyncio.Future[Any]) -> None:
        self.waiting += 1
        try:
            while (wait_s := ready()) > 0:
                await asyncio.wait({leaving}, timeout=wait_s)
                if leaving.done():
                    raise ClientGone
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Drop what was not begun; threads end after what they are doing."""
        self._turns.close()


class _Waits:
    """A job has left its worker; `ready` says when it can go on."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready


def _advance(job: Job[T]) -> T | _Waits:
    """Run a job to its next wait or to its end."""
    try:
        return _Waits(next(job))
    except StopIteration as done:
        result: T = done.value
        return result


class _Turns:
    """Workers that take the jobs of one client in order, and clients in turn."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mexit-worker")
        self._lock = threading.Lock()
        self._queues: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def submit(self, client: str, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            self._queues.setdefault(client, deque()).append((future, work))
        self._pool.submit(self._take_one)
        return future

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for queue in self._queues.values():
                for future, _ in queue:
                    future.cancel()

    def _take_one(self) -> None:
        with self._lock:
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            future, work = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind all other clients
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:  # whoever waits for the future must hear of it
                future.set_exception(error)


class Storage:
    """Counts what all requests at hand take up, such as bytes. For the event loop's thread only."""

    def __init__(
        self, limit: int, share: int = 1, words: str = "request bodies of {} bytes are waiting already"
    ) -> None:
        """One client may have a `share`-th of `limit`; `words` say how much is taken."""
        self._limit, self._each, self._words = limit, max(1, limit // share), words
        self._held = 0
        self._of: Counter[str] = Counter()

    @contextmanager
    def shelf(self, client: str = "") -> Iterator[Callable[[int], None]]:
        """Yield the function that takes room; all of it is given back when the block ends."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held + size > self._limit:
                raise Overloaded(self._words.format(self._held))
            if self._of[client] + size > self._each:
                raise Overloaded(self._words.format(self._of[client]) + ", all of them yours")
            self._held += size
            self._of[client] += size
            taken += size

        try:
            yield take
        finally:
            self._held -= taken
            self._of[client] -= taken
            if not self._of[client]:
                del self._of[client]

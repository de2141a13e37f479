"""Work off the event loop, few jobs at a time; what does not fit is refused at once.

The event loop only moves bytes. Inflating, parsing, decoding, inference and writing the response are done in a
small thread pool, so health checks answer while every worker is busy. Clients take turns: however much one of them
sends, another one's job waits for one job of each other client at most, on every worker.

A job is a generator. It runs in a worker until it has to wait, and leaves the worker to others by yielding what it
waits for: a function that says how long the rate limiter still lets it wait, which the event loop asks, or a future of
the batcher, whose batches run in the same workers; it is then taken up again by whoever resolves that future.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from mexit.errors import Overloaded

T = TypeVar("T")
Ready = Callable[[], float]  # seconds after which to ask again; 0.0 is now
Job = Generator[Ready | Future[Any], None, T]


class ClientGone(Exception):
    """The client left before its job was done."""


class WorkerPool:
    """A thread pool with a bounded number of jobs in it, waiting ones included.

    Attributes:
        waiting: jobs that wait for the rate limiter.
    """

    def __init__(self, threads: int, jobs: int, share: int = 1) -> None:
        """`share`: one client may have a `share`-th of the jobs."""
        self._turns = _Turns(threads)
        self._places = MemoryQuota(jobs, share, "{} requests are waiting already")
        self.waiting = 0

    async def run(self, job: Job[T], gone: Callable[[], Awaitable[object]], client: str = "") -> T:
        """Do a job.

        Args:
            job: what to do; it is not begun yet.
            gone: returns when nobody waits for the result any more. A job that is in no worker is then dropped;
                one that is in a worker is finished up to where it would leave it. Whatever was computed is
                counted.
            client: whose turn it takes.

        Raises:
            Overloaded: as many jobs as fit are waiting or under way.
            ClientGone: the job was dropped.
        """
        with self._places.reserve(client) as take:
            take(1)
            leaving = asyncio.ensure_future(gone())
            try:
                while isinstance(outcome := await self._stretch(job, client, leaving), _Waits):
                    await self._wait(outcome.ready, leaving)
                return outcome
            finally:
                leaving.cancel()

    def lend(self, work: Callable[[], None]) -> None:
        """Have a worker call a function, after whatever was asked of the workers before."""
        self._turns.lend(work)

    async def _stretch(self, job: Job[T], client: str, leaving: asyncio.Future[Any]) -> T | _Waits:
        stretch = _Stretch(job)
        self._turns.submit(client, stretch)
        result = asyncio.wrap_future(stretch.outcome)
        either: set[asyncio.Future[Any]] = {result, leaving}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not result.done() and stretch.drop():
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


class _Stretch(Generic[T]):
    """A job from where it is to its end, or to where it waits for the rate limiter.

    Attributes:
        outcome: the job's, or what it waits for.
    """

    def __init__(self, job: Job[T]) -> None:
        self.outcome: Future[T | _Waits] = Future()
        self._job = job
        self._awaited: Future[Any] | None = None
        self._dropped = False

    def begin(self) -> None:
        """Run it in this thread, as far as it goes."""
        if self.outcome.set_running_or_notify_cancel():
            self._go_on()

    def drop(self) -> bool:
        """Nobody waits any more. Returns whether it was not begun yet, and never will be.

        One that is in a worker goes on; what it waits for then, or waits for now, is cancelled.
        """
        if self.outcome.cancel():
            return True
        self._dropped = True  # before a look at what is awaited, as `_go_on` looks in the other order
        if (awaited := self._awaited) is not None:
            awaited.cancel()
        return False

    def _go_on(self) -> None:
        try:
            found = next(self._job)
        except StopIteration as done:
            self.outcome.set_result(done.value)
        except BaseException as error:  # whoever waits for the outcome must hear of it
            self.outcome.set_exception(error)
        else:
            if isinstance(found, Future):
                self._await(found)
            else:
                self.outcome.set_result(_Waits(found))

    def _await(self, found: Future[Any]) -> None:
        self._awaited = found
        if self._dropped:
            found.cancel()
        found.add_done_callback(self._resume)

    def _resume(self, found: Future[Any]) -> None:
        if found.cancelled():
            self._job.close()
            self.outcome.set_exception(ClientGone())
        else:
            self._go_on()


class _Turns:
    """Workers that take the jobs of one client in order, and clients in turn."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mexit-worker")
        self._lock = threading.Lock()
        self._queues: dict[str, deque[_Stretch[Any]]] = {}

    def submit(self, client: str, stretch: _Stretch[Any]) -> None:
        with self._lock:
            self._queues.setdefault(client, deque()).append(stretch)
        self._pool.submit(self._take_one)

    def lend(self, work: Callable[[], None]) -> None:
        self._pool.submit(work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for queue in self._queues.values():
                for stretch in queue:
                    stretch.outcome.cancel()

    def _take_one(self) -> None:
        with self._lock:
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            stretch = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind all other clients
        stretch.begin()


class MemoryQuota:
    """Counts what all requests at hand take up, such as bytes. For the event loop's thread only."""

    def __init__(
        self, limit: int, share: int = 1, words: str = "request bodies of {} bytes are waiting already"
    ) -> None:
        """One client may have a `share`-th of `limit`; `words` say how much is taken."""
        self._limit, self._each, self._words = limit, max(1, limit // share), words
        self._held = 0
        self._of: Counter[str] = Counter()

    @contextmanager
    def reserve(self, client: str = "") -> Iterator[Callable[[int], None]]:
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

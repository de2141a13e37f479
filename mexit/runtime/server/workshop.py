"""Work off the event loop, few jobs at a time; what does not fit is refused at once.

The event loop only moves bytes. Inflating, parsing, decoding, inference and writing the response are one job
in a small thread pool, so health checks answer while every worker is busy.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from mexit.errors import Overloaded

T = TypeVar("T")


class ClientGone(Exception):
    """The client left before its job was begun."""


class Workshop:
    """A thread pool with a bounded number of jobs in it, waiting ones included."""

    def __init__(self, threads: int, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mexit-worker")
        self._places = threading.BoundedSemaphore(jobs)
        self._jobs = jobs

    async def run(self, job: Callable[[], T], gone: Callable[[], Awaitable[object]]) -> T:
        """Run a job in a thread.

        Args:
            job: what to do.
            gone: returns when nobody waits for the result any more. A job that was not begun is then dropped;
                one under way is finished, so that whatever it counts stays true.

        Raises:
            Overloaded: as many jobs as fit are waiting or under way.
            ClientGone: the job was dropped.
        """
        if not self._places.acquire(blocking=False):
            raise Overloaded(f"{self._jobs} requests are waiting already")
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._places.release())
        result = asyncio.wrap_future(future)
        leaving = asyncio.ensure_future(gone())
        either: set[asyncio.Future[Any]] = {result, leaving}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not result.done() and future.cancel():
                raise ClientGone
            return await result
        finally:
            leaving.cancel()

    def close(self) -> None:
        """Drop what was not begun; threads end after what they are doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Storage:
    """Counts the bytes of all request bodies at hand. For the event loop's thread only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @contextmanager
    def shelf(self) -> Iterator[Callable[[int], None]]:
        """Yield the function that takes room for bytes; all of it is given back when the block ends."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held + size > self._limit:
                raise Overloaded(f"request bodies of {self._held} bytes are waiting already")
            self._held += size
            taken += size

        try:
            yield take
        finally:
            self._held -= taken

"""The worker pool: bounded requests, clients in turn, waits, disconnected clients; and quotas."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from mexit.errors import Overloaded
from mexit.serving.asgi import ClientDisconnected
from mexit.serving.limits import Limits
from mexit.serving.server_state import ServerState
from mexit.serving.worker_pool import Job, Quota, WorkerPool


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    return None


def job(work: Callable[[], object], *waits: Callable[[], float] | Future[Any]) -> Job[object]:
    """A job that yields the given waits, then works."""
    yield from waits
    return work()


class Gate:
    """A job's work that blocks its worker until the gate opens."""

    def __init__(self) -> None:
        self._entered, self._opened = threading.Event(), threading.Event()

    def __call__(self) -> bool:
        self._entered.set()
        return self._opened.wait(30)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 30)

    def open(self) -> None:
        self._opened.set()


def start(pool: WorkerPool, work: Callable[[], object], client: str = "") -> asyncio.Future[object]:
    return asyncio.ensure_future(pool.run(job(work), never, client))


def test_a_full_pool_refuses_jobs() -> None:
    async def run() -> None:
        pool, gate = WorkerPool(threads=1, max_requests=2), Gate()
        running = start(pool, gate)
        await gate.entered()
        queued = start(pool, lambda: 1)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests are waiting already") as refusal:
            await pool.run(job(lambda: 2), never)
        assert refusal.value.retry_after_s == 1.0
        gate.open()
        assert await asyncio.gather(running, queued) == [True, 1]
        assert await pool.run(job(lambda: 7), never) == 7

    asyncio.run(run())


def test_one_client_has_its_share_of_the_pool() -> None:
    async def run() -> None:
        pool, gate = WorkerPool(threads=1, max_requests=8, client_share=4), Gate()
        jobs = [start(pool, gate, "a")]
        await gate.entered()
        jobs.append(start(pool, lambda: True, "a"))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests are waiting already, all of them yours"):
            await pool.run(job(gate), never, "a")
        jobs.append(start(pool, lambda: True, "b"))
        gate.open()
        assert await asyncio.gather(*jobs) == [True] * 3

    asyncio.run(run())


def test_short_jobs_run_in_the_event_loop() -> None:
    """One by one in turns of clients; the loop does other work in between."""

    async def run() -> None:
        pool, done, ticks = WorkerPool(threads=1, max_requests=20), list[str](), list[int]()
        loop, main = asyncio.get_running_loop(), threading.get_ident()

        def tick() -> None:
            ticks.append(len(done))
            if len(done) < 4:
                loop.call_soon(tick)

        def work(client: str) -> int:
            done.append(client)
            return threading.get_ident()

        jobs = [pool.run(job(partial(work, client)), never, client, short=True) for client in ("a", "a", "a", "b")]
        loop.call_soon(tick)
        assert await asyncio.gather(*jobs) == [main] * 4
        assert done == ["a", "b", "a", "a"]
        assert {1, 2, 3} <= set(ticks)

    asyncio.run(run())


def test_short_jobs_are_refused_only_if_they_would_wait_for_tokens() -> None:
    """A refusal takes nearly as long as a short answer. Connections bound their number."""

    async def run() -> None:
        pool, gone = WorkerPool(threads=1, max_requests=2), asyncio.Event()
        answers = [pool.run(job(lambda: 7), never, short=True) for _ in range(20)]
        assert await asyncio.gather(*answers) == [7] * 20
        waiting = [
            asyncio.ensure_future(pool.run(job(lambda: 7, lambda: 60.0), gone.wait, short=True)) for _ in range(2)
        ]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="2 requests are waiting already"):
            pool.check_room("")
        with pytest.raises(Overloaded, match="2 requests are waiting already"):
            await pool.run(job(lambda: 7, lambda: 60.0), never, short=True)
        assert await pool.run(job(lambda: 7), never, short=True) == 7
        gone.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        pool.check_room("")

    asyncio.run(run())


def test_a_short_job_waits_for_tokens_and_fails() -> None:
    async def run() -> None:
        pool, left = WorkerPool(threads=1, max_requests=1), [0.01, 0.0]
        assert await pool.run(job(lambda: 7, lambda: left.pop(0)), never, short=True) == 7
        with pytest.raises(ZeroDivisionError):
            await pool.run(job(lambda: 1 // 0), never, short=True)
        with pytest.raises(ClientDisconnected):
            await pool.run(job(lambda: 7, lambda: 60.0), at_once, short=True)

    asyncio.run(run())


def test_jobs_of_disconnected_clients() -> None:
    """A running job is finished, a queued one is dropped and leaves its place free."""

    async def run() -> None:
        pool, gate, done = WorkerPool(threads=1, max_requests=2), Gate(), list[str]()
        running = asyncio.ensure_future(pool.run(job(lambda: (gate(), done.append("running"))), gate.entered))
        await gate.entered()
        with pytest.raises(ClientDisconnected):
            await pool.run(job(lambda: done.append("dropped")), at_once)
        queued = start(pool, lambda: done.append("queued"))
        gate.open()
        await asyncio.gather(running, queued)
        assert done == ["running", "queued"]

    asyncio.run(run())


def test_clients_take_turns() -> None:
    """Nine jobs of one client are queued before two of another, which then run second and fourth."""

    async def run() -> None:
        pool, gate, done = WorkerPool(threads=1, max_requests=20), Gate(), list[str]()
        clients = ["busy"] * 9 + ["other"] * 2
        jobs = [start(pool, gate, "busy")]
        await gate.entered()
        jobs += [start(pool, partial(done.append, client), client) for client in clients]
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(*jobs)
        assert [i for i, client in enumerate(done) if client == "other"] == [1, 3]

    asyncio.run(run())


def test_a_job_that_waits_for_tokens_leaves_its_worker() -> None:
    async def run() -> None:
        changes, done = list[int](), list[str]()
        pool = WorkerPool(threads=1, max_requests=4, on_wait=changes.append)
        waiting = asyncio.ensure_future(
            pool.run(job(lambda: done.append("first"), lambda: 0.0 if done else 0.01), never)
        )
        while not changes:
            await asyncio.sleep(0.001)
        await pool.run(job(lambda: done.append("second")), never)
        await waiting
        assert (done, changes) == (["second", "first"], [1, -1])

    asyncio.run(run())


def test_a_job_that_waits_for_tokens_is_dropped_on_disconnect() -> None:
    async def run() -> None:
        changes, done, disconnected = list[int](), list[str](), asyncio.Event()
        pool = WorkerPool(threads=1, max_requests=1, on_wait=changes.append)
        wait = job(lambda: done.append("first"), lambda: 60.0)
        waiting = asyncio.ensure_future(pool.run(wait, disconnected.wait))
        while not changes:
            await asyncio.sleep(0.001)
        disconnected.set()
        with pytest.raises(ClientDisconnected):
            await waiting
        assert (done, changes) == ([], [1, -1])
        assert await pool.run(job(lambda: 7), never) == 7

    asyncio.run(run())


def test_a_job_that_waits_for_a_future_leaves_its_worker() -> None:
    """It continues when the future is resolved, and its future is cancelled on disconnect."""

    async def run() -> None:
        pool, disconnected = WorkerPool(threads=1, max_requests=2), asyncio.Event()
        batches: list[Future[None]] = [Future(), Future()]
        resumed = asyncio.ensure_future(pool.run(job(lambda: "resumed", batches[0]), never))
        dropped = asyncio.ensure_future(pool.run(job(lambda: "dropped", batches[1]), disconnected.wait))
        await asyncio.sleep(0.01)
        batches[0].set_result(None)
        assert await resumed == "resumed"
        disconnected.set()
        with pytest.raises(ClientDisconnected):
            await dropped
        assert batches[1].cancelled()

    asyncio.run(run())


def test_a_quota_is_released() -> None:
    quota = Quota(100, 1, "{} bytes are waiting")
    with quota.reserve() as add:
        add(60)
        with quota.reserve() as add_other:
            add_other(40)
            with pytest.raises(Overloaded, match="100 bytes are waiting"):
                add_other(1)
        add(40)
    with quota.reserve() as add:
        add(100)


def test_a_quota_bounds_each_client() -> None:
    quota = Quota(100, 4, "{} bytes are waiting")
    with quota.reserve("a") as add:
        add(25)
        with pytest.raises(Overloaded, match="25 bytes are waiting, all of them yours"):
            add(1)
        with quota.reserve("b") as add_other:
            add_other(25)
    with quota.reserve("a") as add:
        add(25)


@pytest.mark.parametrize(("cpus", "threads", "workers"), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (6, 2, 3), (2, 4, 1)])
def test_the_number_of_workers(cpus: int, threads: int, workers: int) -> None:
    """One worker for each processor that the process may use and an engine's thread takes, up to the limit."""
    server = ServerState(Limits(), cpus=cpus, threads=threads)
    assert server.workers == workers
    server.close()


def test_the_number_of_workers_follows_the_resource_limits() -> None:
    """By default, the server counts the processors that affinity and control groups leave to the process."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        server = ServerState(Limits())
    finally:
        os.sched_setaffinity(0, allowed)
    assert server.workers == 1
    server.close()

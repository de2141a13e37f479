"""What all models of a server share: limits, worker threads, memory, metrics, and whether the server is stopping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from mexit.core.resource_limits import read_limits
from mexit.errors import Overloaded
from mexit.runtime.rate_limiter import RateLimiter
from mexit.serving.camera_views import CameraCollector, Cameras, CameraViews
from mexit.serving.limits import Limits
from mexit.serving.metrics import Metrics
from mexit.serving.worker_pool import Job, Quota, WorkerPool

BATCHING = ("off", "continuous")
MAX_LOADS = 8


class ServerState:
    """The state of one server.

    Attributes:
        limits: sizes, counts and times that bound the server.
        rate_limiter: bounds the MACs of all models together; None without a bound.
        deadline_ms: deadline of requests that name none, milliseconds; None without one.
        batching: "off": every request runs alone; "continuous": requests for one model share runs of a segment.
        metrics: of all models.
        memory: bounds the bytes of request bodies.
        workers: number of worker threads.
        worker_pool: runs the jobs of requests.
        loader: runs one load or unload of a model at a time.
        stopping: set once a stop signal came; new requests are then refused and the server is not ready.
        active: requests in flight.
        cameras: what the routes of cameras show; None without cameras.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        threads: int = 1,
        rate_limiter: RateLimiter | None = None,
        deadline_ms: float | None = None,
        batching: str = "off",
        cpus: int | None = None,
    ) -> None:
        """Prepare the server; worker threads start with the first requests.

        Args:
            limits: the server's limits.
            threads: threads of one engine; the processors are divided by it.
            rate_limiter, deadline_ms, batching: see the attributes.
            cpus: processors that workers may use; by default what affinity and control groups allow.
        """
        self.limits = limits
        self.rate_limiter = rate_limiter
        self.deadline_ms = deadline_ms
        self.batching = batching
        cpus = read_limits().threads if cpus is None else cpus
        self.workers = max(1, min(limits.workers, cpus // threads))
        per_client = rate_limiter is not None and rate_limiter.limits.client is not None
        client_share = limits.client_share if per_client else 1
        self.memory = Quota(limits.held_bytes, client_share, "request bodies of {} bytes are waiting already")
        self.metrics = Metrics(rate_limiter)
        self.worker_pool = WorkerPool(self.workers, limits.requests, client_share, self.metrics.count_waiting)
        self.loader = WorkerPool(1, MAX_LOADS)
        self.stopping = False
        self.active = 0
        self.cameras: CameraViews | None = None

    def show_cameras(self, cameras: Cameras) -> None:
        """Show running cameras in the routes and in the metrics."""
        self.cameras = CameraViews(cameras, lambda: self.stopping)
        self.metrics.add_collector(CameraCollector(cameras))

    def close(self) -> None:
        """Cancel queued requests. Threads end after their present job."""
        self.loader.close()
        self.worker_pool.close()

    def check_running(self) -> None:
        """Raise `Overloaded` if the server is stopping."""
        if self.stopping:
            raise Overloaded("the server is stopping")

    async def change(self, change: Callable[[], None], disconnected: Callable[[], Awaitable[object]]) -> None:
        """Run a load or unload in the loader's thread; `disconnected` as for `WorkerPool.run`."""

        def job() -> Job[None]:
            change()
            yield from ()

        await self.loader.run(job(), disconnected)

    @contextmanager
    def in_flight(self, route: str, model: str) -> Iterator[None]:
        """Count a request for a loaded model while it is answered. Raises `Overloaded` if the server is stopping."""
        self.check_running()
        self.active += 1
        try:
            with self.metrics.measure(route, model):
                yield
        finally:
            self.active -= 1

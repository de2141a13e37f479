"""`Runtime`: open a bundle, answer images within a budget, keep account."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.budget import Budget, Macs
from mexit.core.bundle import Bundle
from mexit.core.cost import Costs
from mexit.core.policies import PolicyEntry
from mexit.core.policy import Policy
from mexit.data.preprocess import check_tensor, prepare_batch
from mexit.errors import BadInput, NotCalibrated, UsageError
from mexit.runtime.autotune import choose, open_chosen
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.registry import AUTO, find
from mexit.runtime.drift import DriftWatch
from mexit.runtime.engine import Answers, last_exit
from mexit.runtime.policy_selection import PolicyChoice, PolicySelector
from mexit.runtime.prediction import Prediction
from mexit.runtime.rate_limiter import RateLimiter, read_rate_limits
from mexit.runtime.reference import run_all_exits
from mexit.runtime.request import Call, Desk, RequestOptions
from mexit.runtime.stats import RuntimeStats

if TYPE_CHECKING:
    from mexit.camera.pipeline import Answered


class Runtime:
    """A bundle in an engine. Safe to call from several threads.

    Attributes:
        bundle: the opened bundle.
        backend: the loaded engine.
        threads: of the engine.
        costs: MACs of leaving at each exit in this engine.
        ledger: what was spent; `runtime.ledger.account()`.
        rate limiter: bounds what is spent from now on; None is without bound.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        budget: str | Budget = "low",
        *,
        threads: int = 1,
        use_policies: bool = True,
        rate_limiter: RateLimiter | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.threads = threads
        self.costs = bundle.manifest.costs if backend.drops_heads else Costs(bundle.manifest.cumulative_macs)
        self.stats = RuntimeStats(len(bundle.manifest.exits), bundle.manifest.cumulative_macs[-1])
        self.rate_limiter = rate_limiter
        exit_macs = lru_cache(maxsize=256)(self.costs.under)
        self._desk = Desk(bundle, backend, exit_macs, self.stats, rate_limiter, self._certificates, self._watch)
        entry = _entry_or_none(bundle, backend) if use_policies else None
        self._selector = PolicySelector(bundle, backend, entry, threads, self.rehearse)
        self.drift_watch: DriftWatch | None = None
        self.budget = budget

    @staticmethod
    def open(
        path: str | Path,
        budget: str | Budget = "low",
        *,
        backend: str = "auto",
        threads: int | None = None,
        use_policies: bool = True,
        watch_drift: float = 0.0,
        on_drift: str = "alarm",
        rate: Macs | None = None,
        burst: Macs | None = None,
        client_rate: Macs | None = None,
        client_burst: Macs | None = None,
    ) -> Runtime:
        """Open a bundle directory.

        Args:
            path: the directory.
            budget: default for calls that name none; `low`, `12M`, `40%`, `5ms`, ... (see `core.budget`).
            backend: one of `backends.catalog.ENGINES`, or "auto": the fastest calibrated one, if they were timed
                on this device (see `autotune`), else ONNX Runtime.
            threads: of the engine; default as many as were fastest, else 1.
            use_policies: False leaves `policies.json` unread, as calibration does; only `full` works then.
            watch_drift: share of early answers that are compared with the full network's (see `drift_watch`).
            on_drift: "alarm" logs a changed data distribution; "safer" also moves to a safer policy.
            rate: MACs a second (`40M`, `1.5G`) that all calls together are bounded by; see `rate_limiter`.
            burst: MACs that can be saved up; one second's worth by default, or a full image if that is more.
            client_rate, client_burst: likewise for each client that a call names.

        Raises:
            NotFound, Damaged, Untrusted, SchemaTooNew, StalePolicy: see `Bundle.open` and `Bundle.policies`.
            NotCalibrated: no thresholds for this engine; only the budget `full` works without.
            BudgetInfeasible: below the cost of exit 1.
            MissingExtra: the engine is not installed.
        """
        if backend != AUTO:
            find(backend)
        bundle = Bundle.open(path)
        costs = bundle.manifest.cumulative_macs
        limits = read_rate_limits(costs, rate, burst, client_rate, client_burst)
        choice = choose(bundle, backend, threads)
        runtime = Runtime(
            bundle,
            open_chosen(bundle, choice),
            budget,
            threads=choice.threads,
            use_policies=use_policies,
            rate_limiter=RateLimiter(costs, limits) if limits.overall or limits.client else None,
        )
        if watch_drift:
            runtime.watch_drift(watch_drift, on_drift)
        return runtime

    def watch_drift(self, share: float, on_drift: str = "alarm", seed: int | None = None) -> None:
        """Compare a share of early answers with the full network's from now on; see `drift_watch`."""
        if self._selector.entry is None:
            raise NotCalibrated("there are no early answers to watch: run mexit calibrate")
        self.drift_watch = DriftWatch(self._selector.entry, share, on_drift, seed)

    @property
    def budget(self) -> Budget:
        """The budget of calls that name none."""
        return self._budget

    @budget.setter
    def budget(self, budget: str | Budget) -> None:
        budget = self._selector.parse(budget)
        self._selector.plan(budget)
        self._budget = budget

    @property
    def calibrated(self) -> bool:
        """Whether thresholds exist for the engine at hand."""
        return self._selector.entry is not None

    def __call__(
        self,
        images: NDArray[Any] | Sequence[Any] | bytes,
        *,
        budget: str | Budget | None = None,
        deadline_ms: float | None = None,
        max_exit: int | None = None,
        receipts: bool = False,
        client: str = "",
        wait_ms: float | None = None,
    ) -> list[Prediction]:
        """Answer images.

        Args:
            images: uint8 (H, W), (H, W, 3) or (B, H, W, 3); float32 (B, C, H, W) in [0, 1]; encoded bytes; or
                a sequence of single images.
            budget: for this call; the default is `runtime.budget`.
            deadline_ms: once over, rows under way get the deepest exit computed so far. The first exit
                always runs.
            max_exit: no input goes further.
            receipts: give every prediction its `receipt.Receipt`.
            client: whose tokens the rate limiter takes, where it has tokens for each client.
            wait_ms: how long rows may wait until the rate limiter has tokens for segment 1; 0 not at all. By default
                until the deadline, and without one as long as it takes.

        Returns:
            One `Prediction` an image, in order.

        Raises:
            BadInput, TooLarge: an image that cannot be one.
            BudgetInfeasible, NotCalibrated, UsageError: see `open`.
            Overloaded: the rate limiter has no tokens in time. Of several rows, the first may have been answered and
                counted by then.
        """
        return self.answer_tensor(
            self.prepare(images),
            budget=budget,
            deadline_ms=deadline_ms,
            max_exit=max_exit,
            receipts=receipts,
            client=client,
            wait_ms=wait_ms,
        )

    def answer_tensor(self, tensor: NDArray[np.float32], **options: Any) -> list[Prediction]:
        """As a call, for images that `prepare` returned."""
        call = self.begin(tensor, **options)
        while not call.done:
            if (wait_s := call.pay()) > 0:
                time.sleep(wait_s)
            else:
                call.run()
        return call.predictions

    def begin(
        self,
        tensor: NDArray[np.float32],
        *,
        budget: str | Budget | None = None,
        deadline_ms: float | None = None,
        max_exit: int | None = None,
        receipts: bool = False,
        client: str = "",
        wait_ms: float | None = None,
        queued_s: float = 0.0,
        kind: type[Call] = Call,
    ) -> Call:
        """A call that waits nowhere by itself, for programs with an event loop of their own; see `call.Call`.

        `queued_s` is what the images waited before, for their receipts; `kind` is `ticket.Ticket` for a batcher;
        the others are those of a call.
        """
        if deadline_ms is not None and not deadline_ms > 0:
            raise UsageError(f"deadline_ms must be above zero, found {deadline_ms}")
        if wait_ms is not None and not wait_ms >= 0:
            raise UsageError(f"wait_ms must be at least zero, found {wait_ms}")
        budget = self._budget if budget is None else self._selector.parse(budget)
        plan = self._plan(budget)
        last_exit(len(self.backend.segments), max_exit)
        if wait_ms is None or (deadline_ms is not None and deadline_ms < wait_ms):
            wait_ms = deadline_ms
        wishes = RequestOptions(
            budget,
            plan,
            deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
            max_exit=max_exit,
            wait_s=None if wait_ms is None else wait_ms / 1e3,
            client=client,
            queued_s=queued_s,
            receipts=receipts,
        )
        return kind(self._desk, tensor, wishes)

    def prepare(self, images: NDArray[Any] | Sequence[Any] | bytes) -> NDArray[np.float32]:
        """Any accepted images as the input tensor (B, C, H, W) float32 in [0, 1]."""
        spec = self.bundle.manifest.input
        if isinstance(images, np.ndarray):
            if images.dtype.kind == "f":
                return check_tensor(images, spec)
            if images.dtype != np.uint8:
                raise BadInput(f"expected uint8 or float32 images, found {images.dtype}")
            if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (3, 4)):
                return prepare_batch(images[None], spec)
            if images.ndim != 4:
                raise BadInput(f"expected uint8 (H, W), (H, W, 3) or (B, H, W, 3), found {images.shape}")
            return prepare_batch(images, spec)
        if isinstance(images, list | tuple):
            return prepare_batch(images, spec)
        return prepare_batch([images], spec)

    def camera(self, source: str, **options: Any) -> Generator[Answered, None, None]:
        """Frames and answers of a video, image, folder, glob or live camera.

        Args:
            source: see `camera.address`.
            options: those of `camera.pipeline.watch`.

        Yields:
            A frame, uint8 RGB (H, W, 3), and its `camera.pipeline.CameraPrediction`.
        """
        # Only now: it brings sockets and threads, a tenth of the time that starting mexit takes.
        from mexit.camera.pipeline import watch

        return watch(self, source, **options)

    def policy(self, budget: str | Budget | None = None) -> Policy:
        """The policy that a budget selects."""
        return self._plan(self._budget if budget is None else self._selector.parse(budget)).policy

    def _plan(self, budget: Budget) -> PolicyChoice:
        plan = self._selector.plan(budget)
        if self.drift_watch is None or plan.place is None:
            return plan
        safer = self.drift_watch.safer(plan.place)
        return plan if safer == plan.place else self._selector.at(safer)

    def _watch(self, images: NDArray[np.float32], answers: Answers, plan: PolicyChoice, client: str) -> None:
        """Run some early answers to the last exit, after they were counted; as many as there are tokens for."""
        if self.drift_watch is None or plan.place is None:
            return
        rows = self.drift_watch.choose(plan.place, answers.reasons)
        if self.rate_limiter is not None:
            rows = rows[: self.rate_limiter.acquire_full_pass(client, len(rows))]
        if len(rows):
            scorer = plan.policy.scorer(len(self.bundle.manifest.classes))
            full = scorer.answer(run_all_exits(self.backend, images[rows]))[1][-1]
            self.stats.add_watched(len(rows))
            self.drift_watch.observe(plan.place, answers.probabilities[rows].argmax(axis=1) != full)

    def _certificates(self, plan: PolicyChoice) -> tuple[str, ...]:
        """Those that hold for a plan. They are about the frontier's own points, which `full` may not be."""
        entry, place = self._selector.entry, plan.place
        if entry is None or place is None or plan.policy != entry.policy(entry.frontier[place]):
            return ()
        return tuple(found["id"] for found in entry.certificates if found["first"] <= place <= found["last"])

    def rehearse(self, k: int) -> list[Prediction]:
        """Answer one grey image that leaves at exit `k`, every head on the way asked, off the books."""
        double, image = self._double
        return double.answer_tensor(image, budget="full", max_exit=k)

    @cached_property
    def _double(self) -> tuple[Runtime, NDArray[np.float32]]:
        """A runtime that does all that this one does for a call, into books that nobody reads, and an image."""
        double = copy(self)
        double.stats = RuntimeStats(len(self.bundle.manifest.exits), self.bundle.manifest.cumulative_macs[-1])
        double.rate_limiter, double.drift_watch = None, None
        double._desk = replace(self._desk, stats=double.stats, rate_limiter=None, watch=double._watch)
        double._selector = self._selector.for_rehearsals()
        return double, np.full((1, *self.bundle.manifest.input.shape), 0.5, np.float32)


def _entry_or_none(bundle: Bundle, backend: Backend) -> PolicyEntry | None:
    try:
        return bundle.policies().usable(backend.engine, backend.precision, backend.variant)
    except NotCalibrated:
        return None

"""`Runtime`: opens a bundle in an engine, and answers images within a budget."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.budget import Budget, Macs
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import Policy
from mexit.core.scores import Scorer
from mexit.errors import NotCalibrated
from mexit.runtime.autotune import choose, open_chosen
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.registry import AUTO, find
from mexit.runtime.drift import DriftWatch
from mexit.runtime.engine import Answers, answer, exit_position, runs_static
from mexit.runtime.input_images import prepare_images
from mexit.runtime.latency_profile import Profile, TimedCalls
from mexit.runtime.policy_selection import PolicyChoice, PolicySelector, entry_or_none
from mexit.runtime.prediction import RATE_LIMIT, Prediction
from mexit.runtime.prediction_builder import PredictionBuilder
from mexit.runtime.profile_cache import device_profile
from mexit.runtime.rate_limiter import RateLimiter, read_rate_limits
from mexit.runtime.reference import run_all_exits
from mexit.runtime.request import OPTIONS, Request, RequestOptions
from mexit.runtime.stats import RuntimeStats
from mexit.runtime.time_policies import TimePolicies, check_cost, open_in_time

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mexit.camera.pipeline import AnsweredFrame


class Runtime:
    """A bundle loaded in an engine. Thread-safe.

    Attributes:
        bundle: the opened bundle.
        backend: the loaded engine.
        threads: number of threads of the engine.
        costs: MACs of leaving at each exit, and of the static network.
        stats: running totals of all answers; `runtime.stats.snapshot()`.
        rate_limiter: bounds the MACs that are computed; None without a bound.
        drift_watch: compares early answers with the full network's; None unless `watch_drift` was called.
        timing: the policies in time; None where budgets are in MACs.
        why_not_time: why `use_time` left them in MACs, in words.
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
        all_heads: bool = False,
    ) -> None:
        """A runtime of an opened bundle; `Runtime.open` opens one.

        Args:
            bundle: the opened bundle.
            backend: the engine with the segments of the bundle.
            budget: default of requests that name no budget.
            threads: number of threads of the engine.
            use_policies: whether to read `policies.json`; without it only the budget `full` works.
            rate_limiter: bounds the MACs of all requests.
            all_heads: whether the budget `full` runs every segment, as the latency profile needs it.

        Raises:
            NotCalibrated, BudgetInfeasible, UsageError: see `open`.
        """
        self.bundle = bundle
        self.backend = backend
        self.threads = threads
        self.costs = bundle.manifest.costs
        self._builder = PredictionBuilder(bundle)
        self.stats = RuntimeStats(len(bundle.manifest.exits), int(self.costs.static))
        self.rate_limiter = rate_limiter
        self.drift_watch: DriftWatch | None = None
        self.timing: TimePolicies | None = None
        self.why_not_time = ""
        entry = entry_or_none(bundle, backend) if use_policies else None
        self._selector = PolicySelector(bundle, backend, entry, lambda: self._profile, all_heads=all_heads)
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
        cost: str = "macs",
        profile: str | Path | None = None,
    ) -> Runtime:
        """Open a bundle directory.

        Args:
            path: the directory.
            budget: default of requests that name no budget; `low`, `12M`, `40%`, `5ms`, ... (see `core.budget`).
            backend: one of `backends.registry.ENGINES`, or "auto": the fastest calibrated engine, if the engines
                were timed on this device (see `autotune`), else ONNX Runtime.
            threads: number of threads of the engine; default the fastest measured number, else 1.
            use_policies: whether to read `policies.json`; without it only the budget `full` works.
            watch_drift: share of the early answers that are compared with the full network's; see `watch_drift`.
            on_drift: "alarm" logs a changed data distribution; "safer" also moves to a safer policy.
            rate: MACs per second (`40M`, `1.5G`) that bound all requests together; see `rate_limiter`.
            burst: MACs that can be saved up; default the MACs of one second, or of a full image if that is more.
            client_rate, client_burst: the same for each client.
            cost: "macs": the stored policies; "time": policies that are selected in time on this device, see
                `use_time`.
            profile: file of the times to select with; default the device cache, or measured. It needs "time".

        Raises:
            NotFound, Damaged, Untrusted, SchemaTooNew, StalePolicy: see `Bundle.open` and `Bundle.policies`.
            NotCalibrated: there are no thresholds for this engine; only the budget `full` works without.
            BudgetInfeasible: the budget is below the cost of exit 1.
            MissingExtra: the engine is not installed.
        """
        check_cost(cost, profile)
        if backend != AUTO:
            find(backend)
        bundle = Bundle.open(path)
        costs = bundle.manifest.cumulative_macs
        limits = read_rate_limits(costs, rate, burst, client_rate, client_burst)
        choice = choose(bundle, backend, threads)
        runtime = Runtime(
            bundle,
            open_chosen(bundle, choice),
            "full" if cost == "time" else budget,
            threads=choice.threads,
            use_policies=use_policies,
            rate_limiter=RateLimiter(costs, limits) if limits.overall or limits.client else None,
        )
        if cost == "time":
            runtime.use_time(profile)
            runtime.budget = budget
        if watch_drift:
            runtime.watch_drift(watch_drift, on_drift)
        return runtime

    def use_time(self, profile: str | Path | None = None, *, again: bool = False) -> None:
        """Select budgets in time; see `time_policies.open_in_time`, which raises and has the arguments."""
        key = (self.bundle, self.backend, self.threads, self._selector.entry)
        timed, self.why_not_time = open_in_time(*key, self.timed_calls(), profile, again)
        if timed is not None:
            self.timing = timed
            self._selector.use_time(timed)

    def watch_drift(self, share: float, on_drift: str = "alarm", seed: int | None = None) -> None:
        """Start to compare a share of the early answers with the full network's; see `drift`."""
        if self._selector.entry is None:
            raise NotCalibrated("there are no early answers to watch: run mexit calibrate")
        watch = DriftWatch(self._selector.entry, share, on_drift, seed)
        self.close()
        self.drift_watch = watch

    def close(self) -> None:
        """End the background thread of the drift watch, if there is one. The runtime still answers."""
        if self.drift_watch is not None:
            self.drift_watch.close()

    @property
    def budget(self) -> Budget:
        """The default of requests that name no budget."""
        return self._budget

    @budget.setter
    def budget(self, budget: str | Budget) -> None:
        self._budget, _ = self._selector.find(budget)
        self._given = budget  # found by the text faster than by the parsed budget

    @property
    def calibrated(self) -> bool:
        """Whether thresholds exist for the engine."""
        return self._selector.entry is not None

    @property
    def scorer(self) -> Scorer:
        """The scorer of all policies that let rows leave early."""
        return self._selector.scorer(len(self.bundle.manifest.classes))

    def __call__(
        self, images: NDArray[Any] | Sequence[Any] | bytes, **options: Unpack[RequestOptions]
    ) -> list[Prediction]:
        """Answer images.

        Args:
            images: uint8 (H, W), (H, W, 3) or (B, H, W, 3); float32 (B, C, H, W) in [0, 1]; encoded bytes; or
                a sequence of single images. Channels are in the order RGB.
            options: see `request.RequestOptions`: budget, deadline_ms, max_exit, receipts, client, wait_ms.

        Returns:
            One `Prediction` per image, in order.

        Raises:
            BadInput, TooLarge: an input is not a valid image.
            BudgetInfeasible, NotCalibrated, UsageError: see `open`.
            Overloaded: the rate limiter has no tokens in time. Of several rows, the first may have been answered and
                counted by then.
        """
        return self.answer_tensor(self.prepare(images), **options)

    def answer_tensor(self, tensor: NDArray[np.float32], **options: Unpack[RequestOptions]) -> list[Prediction]:
        """Answer images that `prepare` returned, (B, C, H, W) float32; otherwise as a call of the runtime."""
        request = self.begin(tensor, **options)
        while len(request.predictions) < len(tensor):
            if (wait_s := request.acquire_tokens()) > 0:
                time.sleep(wait_s)
            else:
                self.run(request)
        return request.predictions

    def begin(self, tensor: NDArray[np.float32], **options: Unpack[RequestOptions]) -> Request:
        """A request that has not run yet, for callers that wait for tokens in their own way; see `request`.

        Args:
            tensor: images that `prepare` returned, (B, C, H, W) float32.
            options: see `request.RequestOptions`.
        """
        if not OPTIONS.issuperset(options):
            raise TypeError(f"unknown option '{min(options.keys() - OPTIONS)}' of a request")
        budget = options.pop("budget", None)
        request = Request(tensor, *self._find(budget), self.rate_limiter, options)
        if request.max_exit is not None:
            request.last_exit = exit_position(self.bundle.manifest.numbers, request.max_exit)
        return request

    def run(self, request: Request) -> list[Prediction]:
        """Answer the rows of a request that have tokens; returns their predictions."""
        images, start_s = request.take_granted(), request.elapsed_s
        answers = answer(
            self.backend,
            images,
            request.choice.policy,
            len(self.bundle.manifest.classes),
            max_exit=request.last_exit,
            deadline_s=None if request.deadline_s is None else request.deadline_s - start_s,
            permit=None if self.rate_limiter is None else request.acquire_segment,
        )
        predictions = self.complete(request, answers, start_s)
        if self.drift_watch is not None:
            self.check_drift(request, images, answers)
        return predictions

    def complete(
        self, request: Request, answers: Answers, start_s: float, batch_rows: int | None = None
    ) -> list[Prediction]:
        """Add answers of the next rows to a request and to the statistics; returns their predictions.

        Args:
            request: the request of the rows.
            answers: of the rows.
            start_s: seconds from the call to the start of segment 1.
            batch_rows: size of the batch in segment 1; default the number of answers.
        """
        predictions = self._builder.build(request, answers, start_s, batch_rows)
        for k, reason, prediction in zip(answers.exits, answers.reasons, predictions, strict=True):
            unsure = prediction.label is None
            self.stats.add(k, prediction.latency_ms, prediction.macs, reason == RATE_LIMIT, unsure)
        request.predictions += predictions
        return predictions

    def check_drift(self, request: Request, images: NDArray[np.float32], answers: Answers) -> None:
        """Let the drift watch compare some early answers with the full network's, in its background thread."""
        index = request.choice.frontier_index
        if self.drift_watch is None or index is None:
            return
        rows = self.drift_watch.choose(index, answers.reasons)
        if len(rows):
            predicted = answers.probabilities[rows].argmax(axis=1)
            check = partial(self._compare, self.drift_watch, index, request.client, images[rows], predicted)
            self.drift_watch.submit(check)

    def _compare(
        self,
        watch: DriftWatch,
        frontier_index: int,
        client: str,
        images: NDArray[np.float32],
        predicted: NDArray[np.int64],
    ) -> None:
        """Compare early answers (R,) with those of the full network, for as many rows as there are tokens."""
        rows = len(images)
        if self.rate_limiter is not None:
            rows = self.rate_limiter.acquire_full_pass(client, rows)
        if rows:
            full, macs = self._full_network(images[:rows])
            self.stats.add_watched(rows * macs)
            watch.observe(frontier_index, predicted[:rows] != full)

    def _full_network(self, images: NDArray[np.float32]) -> tuple[NDArray[np.int64], int]:
        """Classes (R,) that the budget `full` predicts for images, and the MACs of one of them."""
        segments, full = self.backend.segments, self._selector.find("full")[1].policy
        # The rate limiter's tokens are those of the segments.
        if self.rate_limiter is None and runs_static(self.backend, full, len(segments), any_exit=False):
            answers = answer(self.backend, images, full, len(self.bundle.manifest.classes))
            return answers.probabilities.argmax(axis=1), int(self.costs.static)
        scorer = full.scorer(len(self.bundle.manifest.classes))
        return scorer.answer(run_all_exits(self.backend, images))[1][-1], self.bundle.manifest.cumulative_macs[-1]

    def prepare(self, images: NDArray[Any] | Sequence[Any] | bytes) -> NDArray[np.float32]:
        """Convert accepted images to the input tensor, (B, C, H, W) float32 in [0, 1]."""
        return prepare_images(images, self.bundle.manifest.input)

    def camera(self, source: str, **options: Any) -> Generator[AnsweredFrame, None, None]:
        """Answer the frames of a video, an image, a folder, a glob or a live camera.

        Args:
            source: see `mexit.camera.parse_source`.
            options: those of `mexit.camera.pipeline.classify_frames`.

        Yields:
            A frame, uint8 RGB (H, W, 3), and its `mexit.camera.prediction.CameraPrediction`.
        """
        # Imported here because it loads sockets and threads, a tenth of the time that mexit takes to start.
        from mexit.camera.pipeline import classify_frames

        return classify_frames(self, source, **options)

    def policy(self, budget: str | Budget | None = None) -> Policy:
        """The policy that a budget selects; default `runtime.budget`."""
        return self._find(budget)[1].policy

    def run_to_exit(self, k: int) -> list[Prediction]:
        """Answer one grey image that leaves at the k-th exit of the bundle, from 1; `stats` do not count it."""
        runtime, image = self._profiling_copy
        return runtime.answer_tensor(image, budget="full", max_exit=self.bundle.manifest.numbers[k - 1])

    def timed_calls(self) -> TimedCalls:
        """The calls that a latency profile times: one image that leaves at each exit, and at the static network."""
        static = Runtime(self.bundle, self.backend, "full", threads=self.threads, use_policies=self.calibrated)
        exits = [partial(self.run_to_exit, k) for k in range(1, len(self.bundle.manifest.exits) + 1)]
        return (*exits, partial(static.answer_tensor, self._profiling_copy[1]))

    def _find(self, budget: str | Budget | None) -> tuple[Budget, PolicyChoice]:
        """A budget, by default `budget`, and its policy; with a drift watch that moved, a safer one."""
        found = self._selector.find(self._given if budget is None else budget)
        if self.drift_watch is None or (index := found[1].frontier_index) is None:
            return found
        safer = self.drift_watch.safer(index)
        return found if safer == index else (found[0], self._selector.at(safer))

    @cached_property
    def _profiling_copy(self) -> tuple[Runtime, NDArray[np.float32]]:
        """A runtime on the same engine that runs every segment, with separate statistics, and a grey image."""
        runtime = Runtime(
            self.bundle, self.backend, "full", threads=self.threads, use_policies=self.calibrated, all_heads=True
        )
        return runtime, np.full((1, *self.bundle.manifest.input.shape), 0.5, np.float32)

    @cached_property
    def _profile(self) -> Profile:
        """The latency profile of the engine, which is measured unless the device cache has it."""
        return device_profile(self.bundle, self.backend, self.threads, self.timed_calls())

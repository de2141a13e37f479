"""`Runtime`: open a bundle, answer images within a budget, keep account."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.policies import PolicyEntry
from mexit.core.policy import Policy
from mexit.data.prepare import check_tensor, prepare_batch
from mexit.errors import BadInput, NotCalibrated, UsageError
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.camera.pipeline import Answered, watch
from mexit.runtime.drift_watch import DriftWatch
from mexit.runtime.engine import Answers, answer, last_exit
from mexit.runtime.ledger import Ledger
from mexit.runtime.plan import Plan, Planner
from mexit.runtime.prediction import Prediction
from mexit.runtime.reference import run_all_exits

BACKENDS = ("auto", "ort")
BATCH = 64  # rows that travel together; more gain nothing on a CPU and hold back early answers


class Runtime:
    """A bundle in an engine. Safe to call from several threads.

    Attributes:
        bundle: the opened bundle.
        backend: the loaded engine.
        ledger: what was spent; `runtime.ledger.account()`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        budget: str | Budget = "low",
        *,
        threads: int = 1,
        use_policies: bool = True,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.ledger = Ledger(bundle.manifest.cumulative_macs)
        entry = _entry_or_none(bundle, backend) if use_policies else None
        self._planner = Planner(bundle, backend, entry, threads, self._rehearse)
        self.drift_watch: DriftWatch | None = None
        self.budget = budget

    @staticmethod
    def open(
        path: str | Path,
        budget: str | Budget = "low",
        *,
        backend: str = "auto",
        threads: int = 1,
        use_policies: bool = True,
        watch_drift: float = 0.0,
        on_drift: str = "alarm",
    ) -> Runtime:
        """Open a bundle directory.

        Args:
            path: the directory.
            budget: default for calls that name none; `low`, `12M`, `40%`, `5ms`, ... (see `core.budget`).
            backend: "auto" or "ort".
            threads: of the engine.
            use_policies: False leaves `policies.json` unread, as calibration does; only `full` works then.
            watch_drift: share of early answers that are compared with the full network's (see `drift_watch`).
            on_drift: "alarm" logs a changed data distribution; "safer" also moves to a safer policy.

        Raises:
            NotFound, Damaged, Untrusted, SchemaTooNew, StalePolicy: see `Bundle.open` and `Bundle.policies`.
            NotCalibrated: no thresholds for this engine; only the budget `full` works without.
            BudgetInfeasible: below the cost of exit 1.
            MissingExtra: the engine is not installed.
        """
        if backend not in BACKENDS:
            raise UsageError(f"unknown backend '{backend}': choose from {', '.join(BACKENDS)}")
        bundle = Bundle.open(path)
        runtime = Runtime(bundle, OrtBackend(bundle, threads), budget, threads=threads, use_policies=use_policies)
        if watch_drift:
            runtime.watch_drift(watch_drift, on_drift)
        return runtime

    def watch_drift(self, share: float, on_drift: str = "alarm", seed: int | None = None) -> None:
        """Compare a share of early answers with the full network's from now on; see `drift_watch`."""
        if self._planner.entry is None:
            raise NotCalibrated("there are no early answers to watch: run mexit calibrate")
        self.drift_watch = DriftWatch(self._planner.entry, share, on_drift, seed)

    @property
    def budget(self) -> Budget:
        """The budget of calls that name none."""
        return self._budget

    @budget.setter
    def budget(self, budget: str | Budget) -> None:
        budget = self._planner.parse(budget)
        self._planner.plan(budget)
        self._budget = budget

    @property
    def calibrated(self) -> bool:
        """Whether thresholds exist for the engine at hand."""
        return self._planner.entry is not None

    def __call__(
        self,
        images: NDArray[Any] | Sequence[Any] | bytes,
        *,
        budget: str | Budget | None = None,
        deadline_ms: float | None = None,
        max_exit: int | None = None,
    ) -> list[Prediction]:
        """Answer images.

        Args:
            images: uint8 (H, W), (H, W, 3) or (B, H, W, 3); float32 (B, C, H, W) in [0, 1]; encoded bytes; or
                a sequence of single images.
            budget: for this call; the default is `runtime.budget`.
            deadline_ms: once over, rows under way get the deepest exit computed so far. The first exit
                always runs.
            max_exit: no input goes further.

        Returns:
            One `Prediction` an image, in order.

        Raises:
            BadInput, TooLarge: an image that cannot be one.
            BudgetInfeasible, NotCalibrated, UsageError: see `open`.
        """
        if deadline_ms is not None and not deadline_ms > 0:
            raise UsageError(f"deadline_ms must be above zero, found {deadline_ms}")
        return self.answer_tensor(self.prepare(images), budget=budget, deadline_ms=deadline_ms, max_exit=max_exit)

    def answer_tensor(
        self,
        tensor: NDArray[np.float32],
        *,
        budget: str | Budget | None = None,
        deadline_ms: float | None = None,
        max_exit: int | None = None,
    ) -> list[Prediction]:
        """As a call, for images that `prepare` returned."""
        budget = self._budget if budget is None else self._planner.parse(budget)
        plan = self._plan(budget)
        last_exit(len(self.backend.segments), max_exit)
        predictions: list[Prediction] = []
        waited_s = 0.0
        for start in range(0, len(tensor), BATCH):
            left_s = None if deadline_ms is None else deadline_ms / 1e3 - waited_s
            images = tensor[start : start + BATCH]
            answers = answer(
                self.backend,
                images,
                plan.policy,
                len(self.bundle.manifest.classes),
                max_exit=max_exit,
                deadline_s=left_s,
            )
            self.ledger.add(answers.exits, (answers.seconds + waited_s) * 1e3)
            predictions += self._predictions(answers, budget, waited_s)
            waited_s += float(answers.seconds.max(initial=0.0))
            self._watch(images, answers, plan)
        return predictions

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
        return watch(self, source, **options)

    def policy(self, budget: str | Budget | None = None) -> Policy:
        """The policy that a budget selects."""
        return self._plan(self._budget if budget is None else self._planner.parse(budget)).policy

    def _plan(self, budget: Budget) -> Plan:
        plan = self._planner.plan(budget)
        if self.drift_watch is None or plan.place is None:
            return plan
        safer = self.drift_watch.safer(plan.place)
        return plan if safer == plan.place else self._planner.at(safer)

    def _watch(self, images: NDArray[np.float32], answers: Answers, plan: Plan) -> None:
        """Run some early answers to the last exit, after they were timed and counted."""
        if self.drift_watch is None or plan.place is None:
            return
        rows = self.drift_watch.choose(plan.place, answers.reasons)
        if len(rows):
            scorer = plan.policy.scorer(len(self.bundle.manifest.classes))
            full = scorer.answer(run_all_exits(self.backend, images[rows]))[1][-1]
            self.ledger.add_watched(len(rows))
            self.drift_watch.observe(plan.place, answers.probabilities[rows].argmax(axis=1) != full)

    def _rehearse(self, k: int) -> list[Prediction]:
        """Answer one grey image that leaves at exit `k`, as `answer_tensor` would, off the books."""
        image = np.full((1, *self.bundle.manifest.input.shape), 0.5, np.float32)
        full = Budget.parse("full")
        policy, classes = self._planner.plan(full).policy, len(self.bundle.manifest.classes)
        return self._predictions(answer(self.backend, image, policy, classes, max_exit=k), full, 0.0)

    def _predictions(self, answers: Answers, budget: Budget, waited_s: float) -> list[Prediction]:
        manifest = self.bundle.manifest
        costs, full = manifest.cumulative_macs, manifest.cumulative_macs[-1]
        latency_ms = (answers.seconds + waited_s) * 1e3
        classes = answers.probabilities.argmax(axis=1)
        predictions = []
        for row, index in enumerate(classes.tolist()):
            k = int(answers.exits[row])
            probabilities = answers.probabilities[row]
            predictions.append(
                Prediction(
                    index=index,
                    label=manifest.classes[index],
                    confidence=float(probabilities[index]),
                    probabilities=probabilities,
                    exit=k,
                    reason=answers.reasons[row],
                    macs=costs[k - 1],
                    saved_macs=full - costs[k - 1],
                    latency_ms=float(latency_ms[row]),
                    budget=budget.text,
                )
            )
        return predictions


def _entry_or_none(bundle: Bundle, backend: Backend) -> PolicyEntry | None:
    try:
        return bundle.policies().entry(backend.engine, backend.precision, backend.variant)
    except NotCalibrated:
        return None

"""The adaptive engine: runs a segment, decides which rows exit, and continues with the others.

A batch of one image takes a faster path. Its features stay in buffers of the engine (`backends.bound_runner`), and
plain floats decide (`scores.ScalarScorer`). `reference.py` computes the same answers without either optimisation.

A policy that lets no row leave early runs the static network in place of the segments.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import Policy, should_exit
from mexit.core.scores import ScalarScorer, Scorer
from mexit.errors import UsageError
from mexit.runtime.backends.base import Backend, Carried, Segment
from mexit.runtime.backends.bound_runner import PlainRunner, Runner, RunnerPool

Permit = Callable[[int, int], int]


class Answers(NamedTuple):  # a frozen dataclass takes microseconds to make
    """Answers for B rows.

    Attributes:
        exits: exit of each row, from 1, (B,).
        probabilities: of the exit that answered, (B, C) float64.
        reasons: why each row left at its exit: one of `prediction.REASONS`, never "unsure".
        seconds: from the start of segment 1 to the answer, (B,).
        segment_seconds: of each segment that ran, with its decision; of the static network, which is one segment.
        unsure: whether each answer is unsure, (B,); None without a reject option.
        static: whether the static network ran, in place of the segments.
    """

    exits: Sequence[int]
    probabilities: NDArray[np.float64]
    reasons: tuple[str, ...]
    seconds: Sequence[float]
    segment_seconds: Sequence[float]
    unsure: Sequence[bool] | None = None
    static: bool = False


class _Task(NamedTuple):
    """The arguments of both paths; `pool` as `Backend.runners`, `carry` as `Backend.carry`.

    The static network is one segment, `static` is true, and `skipped` is the number of exits before its own.
    """

    segments: Sequence[Segment]
    pool: RunnerPool | None
    carry: Callable[[NDArray[np.float32]], Carried]
    policy: Policy
    classes: int
    last: int
    deadline_s: float = np.inf
    permit: Permit | None = None
    static: bool = False
    skipped: int = 0

    @property
    def exits(self) -> int:
        return len(self.segments)

    def reason(self, k: int, confident: bool, late: bool) -> str:
        """Why a row leaves at exit k."""
        if k == self.exits:
            return "last"
        if confident:
            return "confident"
        if late:
            return "deadline"
        return "max-exit" if k == self.last else "rate-limit"


def answer(
    backend: Backend,
    images: NDArray[np.float32],
    policy: Policy,
    classes: int,
    *,
    max_exit: int | None = None,
    deadline_s: float | None = None,
    permit: Permit | None = None,
) -> Answers:
    """Answer each image at the first exit whose score reaches its threshold; see `core.exit_policy`.

    The static network answers where `runs_static` says so.

    Args:
        backend: the loaded segments.
        images: (B, C, H, W) float32 in [0, 1].
        policy: scorer and thresholds.
        classes: number of classes, C.
        max_exit: the last exit that may answer, from 1; default E.
        deadline_s: seconds from now; when they are over, the rows under way leave at the exit just computed.
        permit: called before segment k = 2, 3, ... with k and the number of rows that would continue; returns how many
            of them may. The first ones do, in the order of the batch; the others answer with exit k - 1.

    Raises:
        UsageError: `max_exit` is not in 1..E.
    """
    exits = len(backend.segments)
    last = last_exit(exits, max_exit)
    if runs_static(backend, policy, last, any_exit=permit is not None or deadline_s is not None):
        assert backend.static is not None
        assert policy.static is not None
        pool = getattr(backend, "static_runners", None)
        if len(images) == 1 and pool is not None and policy.static.reject is None:
            return _answer_static(pool, policy.static.scorer(classes), images, exits)
        task = _Task([backend.static], pool, backend.carry, policy.static, classes, 1, static=True, skipped=exits - 1)
        return _answer(task, images)
    pool, latest_s = getattr(backend, "runners", None), np.inf if deadline_s is None else deadline_s
    return _answer(_Task(backend.segments, pool, backend.carry, policy, classes, last, latest_s, permit), images)


def _answer(task: _Task, images: NDArray[np.float32]) -> Answers:
    return _answer_one(task, images) if len(images) == 1 else _answer_rows(task, images)


def _answer_one(task: _Task, image: NDArray[np.float32]) -> Answers:
    """As `_answer_rows` for B = 1. A runner that raised is not returned to the pool."""
    start, pool = time.perf_counter(), task.pool
    runner: Runner = PlainRunner(task.carry, task.segments) if pool is None else pool.take()
    runner.start(image)
    scorer, thresholds, exits = ScalarScorer(task.policy.scorer(task.classes)), task.policy.thresholds, task.exits
    now, segment_seconds = 0.0, []
    for k in range(1, task.last + 1):
        scorer.add(runner.run(k))
        confident = k == exits or scorer.reaches(thresholds[k - 1])
        before, now = now, time.perf_counter() - start
        segment_seconds.append(now - before)
        late = now >= task.deadline_s
        if confident or k == task.last or late or (task.permit is not None and not task.permit(k + 1, 1)):
            break
    unsure = None
    if task.policy.reject is not None:
        sure = (confident and task.policy.selective[k - 1]) or scorer.reaches(
            float(task.policy.reject_thresholds[k - 1])
        )
        unsure = [not sure]
    probabilities = scorer.probabilities()
    if pool is not None:
        pool.give_back(runner)
    return Answers(
        [k + task.skipped],
        probabilities[None],
        (task.reason(k, confident, late),),
        [now],
        segment_seconds,
        unsure,
        task.static,
    )


def _answer_static(pool: RunnerPool, scorer: Scorer, image: NDArray[np.float32], exits: int) -> Answers:
    """The static network decides nothing; without task and loop its answer costs microseconds less."""
    start = time.perf_counter()
    runner = pool.take()
    runner.start(image)
    logits = runner.run(1)
    seconds = [time.perf_counter() - start]
    probabilities = scorer.row_probabilities([logits])
    pool.give_back(runner)
    return Answers([exits], probabilities[None], ("last",), seconds, seconds, None, True)


def _answer_rows(task: _Task, images: NDArray[np.float32]) -> Answers:
    start = time.perf_counter()
    segments, count = task.segments, len(images)
    scorer = task.policy.scorer(task.classes)
    state = scorer.start(count)
    exits, seconds = np.zeros(count, np.int64), np.zeros(count)
    probabilities, scores, early = np.zeros((count, task.classes)), np.zeros(count), np.zeros(count, np.bool_)
    reasons = [""] * count
    now, segment_seconds = 0.0, []
    rows = np.arange(count)
    carried = task.carry(images)
    for k in range(1, task.last + 1):
        if not len(rows):
            break
        carried, logits = segments[k - 1].run(carried)
        state, exit_probabilities, score = scorer.step(k, logits, state)
        before, now = now, time.perf_counter() - start
        segment_seconds.append(now - before)
        late = now >= task.deadline_s
        all_rows = np.ones(len(rows), np.bool_)
        confident = should_exit(score, task.policy.threshold(k)) if k < task.exits else all_rows
        leaving = confident
        if k == task.last or late:
            leaving = all_rows
        elif task.permit is not None and not confident.all():
            continuing = np.flatnonzero(~confident)
            leaving = confident.copy()
            leaving[continuing[task.permit(k + 1, len(continuing)) :]] = True
        left = rows[leaving]
        exits[left], probabilities[left], seconds[left] = k, exit_probabilities[leaving], now
        scores[left], early[left] = score[leaving], confident[leaving]
        for row, is_confident in zip(left.tolist(), confident[leaving].tolist(), strict=True):
            reasons[row] = task.reason(k, is_confident, late)
        staying = np.flatnonzero(~leaving)
        if k < task.last and len(staying) < len(rows):
            rows, carried, state = rows[staying], carried.take(staying), state.take(staying)
    unsure = task.policy.unsure(exits, scores, early)
    return Answers(
        (exits + task.skipped).tolist(),
        probabilities,
        tuple(reasons),
        seconds.tolist(),
        segment_seconds,
        None if unsure is None else unsure.tolist(),
        task.static,
    )


def runs_static(backend: Backend, policy: Policy, last: int, *, any_exit: bool) -> bool:
    """Whether the static network answers in place of the segments.

    Args:
        backend: the loaded engine.
        policy: scorer and thresholds.
        last: the last exit that may answer.
        any_exit: whether rows may have to leave at any exit, as a deadline and a rate limiter want it.
    """
    if any_exit or last < len(backend.segments) or policy.static is None:
        return False
    return backend.static is not None


def last_exit(exits: int, max_exit: int | None) -> int:
    """The last exit that may answer, of `exits` ones. Raises `UsageError` if `max_exit` is not in 1..exits."""
    return exits if max_exit is None else exit_position(range(1, exits + 1), max_exit)


def exit_position(numbers: Sequence[int], number: int) -> int:
    """The position, from 1, of an exit by its number in the network; of the nearest one below, if it was left out.

    Args:
        numbers: of the exits that were kept, (E,), ascending.
        number: of the exit.

    Raises:
        UsageError: there is no exit below, or the network has no such exit.
    """
    if not numbers[0] <= number <= numbers[-1]:
        raise UsageError(f"max_exit must lie in {numbers[0]}..{numbers[-1]}, found {number}")
    return bisect_right(numbers, number)

"""The adaptive engine: runs a segment, decides which rows exit, and continues with the others.

A batch of one image takes a faster path. Its features stay in buffers of the engine (`backends.bound_runner`), and
plain floats decide (`scores.ScalarScorer`). `reference.py` computes the same answers without either optimisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mexit.core.exit_policy import Policy, should_exit
from mexit.core.scores import ScalarScorer
from mexit.errors import UsageError
from mexit.runtime.backends import bound_runner
from mexit.runtime.backends.base import Backend

Permit = Callable[[int, int], int]


@dataclass(frozen=True)
class Answers:
    """Answers for B rows.

    Attributes:
        exits: exit of each row, from 1, (B,) int64.
        probabilities: of the exit that answered, (B, C) float64.
        reasons: why each row left at its exit: one of `prediction.REASONS`, never "unsure".
        seconds: from the start of segment 1 to the answer, (B,) float64.
        segment_seconds: of each segment that ran, with its decision.
        active_heads: whether the head of each exit ran with its segment, (E,).
        unsure: whether each answer is unsure, (B,); None without a reject option.
    """

    exits: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    reasons: tuple[str, ...]
    seconds: NDArray[np.float64]
    segment_seconds: tuple[float, ...]
    active_heads: tuple[bool, ...]
    unsure: NDArray[np.bool_] | None = None


class _Task(NamedTuple):  # a frozen dataclass takes microseconds to make
    """The arguments of both paths."""

    backend: Backend
    policy: Policy
    classes: int
    heads: tuple[bool, ...]
    last: int
    deadline_s: float
    permit: Permit | None

    @property
    def exits(self) -> int:
        return len(self.backend.segments)

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

    Heads that the policy does not need are left out, except where a deadline or a rate limiter may need the answer of
    any exit.

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
    last = last_exit(len(backend.segments), max_exit)
    heads = active_heads(backend, policy, last, any_exit=permit is not None or deadline_s is not None)
    task = _Task(backend, policy, classes, heads, last, np.inf if deadline_s is None else deadline_s, permit)
    return _answer_one(task, images) if len(images) == 1 else _answer_rows(task, images)


def _answer_one(task: _Task, image: NDArray[np.float32]) -> Answers:
    """As `_answer_rows` for B = 1. A runner that raised is not returned to the pool."""
    start = time.perf_counter()
    pool = bound_runner.runner_pool(task.backend)
    runner: bound_runner.Runner = bound_runner.PlainRunner(task.backend) if pool is None else pool.take()
    runner.start(image)
    scorer, thresholds = ScalarScorer(task.policy.scorer(task.classes)), task.policy.thresholds
    ends: list[float] = []
    for k in range(1, task.last + 1):
        if not task.heads[k - 1]:
            runner.features(k)
            scorer.skip()
            ends.append(time.perf_counter() - start)
            continue
        scorer.add(runner.run(k))
        confident = k == task.exits or scorer.reaches(thresholds[k - 1])
        now = time.perf_counter() - start
        ends.append(now)
        late = now >= task.deadline_s
        if confident or k == task.last or late or (task.permit is not None and not task.permit(k + 1, 1)):
            break
    unsure = None
    if task.policy.reject is not None:
        sure = (confident and task.policy.selective[k - 1]) or scorer.reaches(
            float(task.policy.reject_thresholds[k - 1])
        )
        unsure = np.array([not sure])
    probabilities = scorer.probabilities()
    if pool is not None:
        pool.give_back(runner)
    return Answers(
        np.array([k], np.int64),
        probabilities[None],
        (task.reason(k, confident, late),),
        np.array([now]),
        tuple(end - before for before, end in zip([0.0, *ends], ends, strict=False)),
        task.heads,
        unsure,
    )


def _answer_rows(task: _Task, images: NDArray[np.float32]) -> Answers:
    start = time.perf_counter()
    segments, count = task.backend.segments, len(images)
    scorer = task.policy.scorer(task.classes)
    state = scorer.start(count)
    exits, seconds = np.zeros(count, np.int64), np.zeros(count)
    probabilities, scores, early = np.zeros((count, task.classes)), np.zeros(count), np.zeros(count, np.bool_)
    reasons = [""] * count
    ends: list[float] = []
    rows = np.arange(count)
    carried = task.backend.carry(images)
    for k in range(1, task.last + 1):
        if not len(rows):
            break
        if not task.heads[k - 1]:
            carried = segments[k - 1].features(carried)
            ends.append(time.perf_counter() - start)
            continue
        carried, logits = segments[k - 1].run(carried)
        state, exit_probabilities, score = scorer.step(k, logits, state)
        now = time.perf_counter() - start
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
        ends.append(now)
        staying = np.flatnonzero(~leaving)
        if k < task.last and len(staying) < len(rows):
            rows, carried, state = rows[staying], carried.take(staying), state.take(staying)
    segment_seconds = tuple(end - before for before, end in zip([0.0, *ends], ends, strict=False))
    unsure = task.policy.unsure(exits, scores, early)
    return Answers(exits, probabilities, tuple(reasons), seconds, segment_seconds, task.heads, unsure)


def active_heads(backend: Backend, policy: Policy, last: int, *, any_exit: bool) -> tuple[bool, ...]:
    """Whether the head of each exit runs, (E,).

    Args:
        backend: the loaded segments.
        policy: scorer and thresholds.
        last: the last exit that may answer; its head always runs.
        any_exit: whether rows may have to leave at any exit, which needs every head.
    """
    if any_exit or not backend.drops_heads:
        return (True,) * len(backend.segments)
    heads = policy.active_heads
    return heads if heads[last - 1] else (*heads[: last - 1], True, *heads[last:])


def last_exit(exits: int, max_exit: int | None) -> int:
    """The last exit that may answer, of `exits` ones. Raises `UsageError` if `max_exit` is not in 1..exits."""
    if max_exit is None:
        return exits
    if not 1 <= max_exit <= exits:
        raise UsageError(f"max_exit must lie in 1..{exits}, found {max_exit}")
    return max_exit

"""The adaptive engine: run a segment, decide, keep only the rows that are still unsure.

One image alone takes a path of its own: features stay in the engine's buffers (`backends.walk`) and plain floats
decide (`core.scalar_scorer`). `reference.py` gives the same answers without tricks, one row at a time; a test compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import Policy, should_exit
from mexit.core.scalar_scorer import ScalarScorer
from mexit.errors import UsageError
from mexit.runtime.backends import bound_runner as walking
from mexit.runtime.backends.base import Backend

Permit = Callable[[int, int], int]


@dataclass(frozen=True)
class Answers:
    """Answers for B rows.

    Attributes:
        exits: (B,) int64, from 1.
        probabilities: (B, C) float64, of the exit that answered.
        reasons: one of `prediction.REASONS` for each row.
        seconds: (B,) from the start of the call to the answer.
        segment_seconds: of each segment that ran, its decision included.
        asked: whether each exit's head ran with its segment, (E,).
    """

    exits: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    reasons: tuple[str, ...]
    seconds: NDArray[np.float64]
    segment_seconds: tuple[float, ...]
    asked: tuple[bool, ...]


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
    """Answer each image at the first exit that is sure.

    Heads that the policy does not ask are left out, but not where a deadline or a rate limiter may need any exit's
    answer.

    Args:
        backend: the loaded segments.
        images: (B, C, H, W) float32 in [0, 1].
        policy: decides who leaves where.
        classes: C.
        max_exit: nobody goes further than this exit.
        deadline_s: seconds from now; once over, rows under way get the exit just computed.
        permit: asked before segment k = 2, 3, ... with k and the number of rows that want to go on: how many may.
            The first of them do, in the order of the batch; the others answer with exit k - 1.
    """
    last = last_exit(len(backend.segments), max_exit)
    asked = heads(backend, policy, last, may_stop=permit is not None or deadline_s is not None)
    one_or_many = _answer_one if len(images) == 1 else _answer_rows
    return one_or_many(backend, images, policy, classes, asked, last, deadline_s, permit)


def _answer_one(
    backend: Backend,
    image: NDArray[np.float32],
    policy: Policy,
    classes: int,
    asked: tuple[bool, ...],
    last: int,
    deadline_s: float | None,
    permit: Permit | None,
) -> Answers:
    """As `_answer_rows`, for B = 1. A walk that failed is not lent again."""
    start = time.perf_counter()
    count = len(backend.segments)
    walks = walking.of(backend)
    walk: walking.Runner = walking.PlainRunner(backend) if walks is None else walks.take()
    walk.start(image)
    row = ScalarScorer(policy, classes)
    ends: list[float] = []
    for k in range(1, last + 1):
        if not asked[k - 1]:
            walk.features(k)
            row.skip()
            ends.append(time.perf_counter() - start)
            continue
        row.add(walk.run(k))
        sure = k == count or row.sure()
        now = time.perf_counter() - start
        ends.append(now)
        late = deadline_s is not None and now >= deadline_s
        if sure or k == last or late or (permit is not None and not permit(k + 1, 1)):
            break
    probabilities = row.probabilities()
    if walks is not None:
        walks.give_back(walk)
    return Answers(
        np.array([k], np.int64),
        probabilities[None],
        (_reason(k, count, last, sure, late),),
        np.array([now]),
        tuple(end - before for before, end in zip([0.0, *ends], ends, strict=False)),
        asked,
    )


def _answer_rows(
    backend: Backend,
    images: NDArray[np.float32],
    policy: Policy,
    classes: int,
    asked: tuple[bool, ...],
    last: int,
    deadline_s: float | None,
    permit: Permit | None,
) -> Answers:
    start = time.perf_counter()
    scorer = policy.scorer(classes)
    state = scorer.start(len(images))
    exits = np.zeros(len(images), np.int64)
    probabilities = np.zeros((len(images), classes))
    seconds = np.zeros(len(images))
    reasons = [""] * len(images)
    segment_seconds: list[float] = []
    before = 0.0
    rows = np.arange(len(images))
    carried = backend.carry(images)
    for k in range(1, last + 1):
        if not len(rows):
            break
        if not asked[k - 1]:
            carried = backend.segments[k - 1].features(carried)
            now = time.perf_counter() - start
            segment_seconds.append(now - before)
            before = now
            continue
        carried, logits = backend.segments[k - 1].run(carried)
        state, exit_probabilities, score = scorer.step(k, logits, state)
        now = time.perf_counter() - start
        late = deadline_s is not None and now >= deadline_s
        sure = (
            should_exit(score, policy.threshold(k)) if k < len(backend.segments) else np.ones(len(rows), np.bool_)
        )
        leaving = np.ones(len(rows), np.bool_) if k == last or late else sure
        if permit is not None and not leaving.all():
            unsure = np.flatnonzero(~leaving)
            leaving = leaving.copy()
            leaving[unsure[permit(k + 1, len(unsure)) :]] = True
        gone = rows[leaving]
        exits[gone], probabilities[gone], seconds[gone] = k, exit_probabilities[leaving], now
        for row, is_confident in zip(gone, sure[leaving], strict=True):
            reasons[row] = _reason(k, len(backend.segments), last, bool(is_confident), late)
        segment_seconds.append(now - before)
        before = now
        staying = np.flatnonzero(~leaving)
        if k < last and len(staying) < len(rows):
            rows, carried, state = rows[staying], carried.take(staying), state.take(staying)
    return Answers(exits, probabilities, tuple(reasons), seconds, tuple(segment_seconds), asked)


def heads(backend: Backend, policy: Policy, last: int, *, may_stop: bool) -> tuple[bool, ...]:
    """Which heads run, (E,): all where rows may have to stop anywhere, else those that the policy asks."""
    if may_stop or not backend.drops_heads:
        return (True,) * len(backend.segments)
    asked = policy.asked
    return asked if asked[last - 1] else (*asked[: last - 1], True, *asked[last:])


def _reason(k: int, count: int, last: int, confident: bool, late: bool) -> str:
    if k == count:
        return "last"
    if confident:
        return "confident"
    if late:
        return "deadline"
    return "max-exit" if k == last else "rate-limit"


def last_exit(count: int, max_exit: int | None) -> int:
    """The exit beyond which nobody goes. Raises `UsageError` outside 1..count."""
    if max_exit is None:
        return count
    if not 1 <= max_exit <= count:
        raise UsageError(f"max_exit must lie in 1..{count}, found {max_exit}")
    return max_exit

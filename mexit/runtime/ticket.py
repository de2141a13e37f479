"""A request on its way through the batcher: a call whose rows travel among those of other calls.

    ticket.pay()       as in a call: takes the tokens of segment 1 for the next rows
    ticket.depart(n)   the rows that are paid for, as groups of n; `ticket.outcome` becomes their predictions

A group is a few rows of one ticket that enter segment 1 together. It collects their answers; how they travel is
the business of `cohort`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import Policy
from mexit.core.scores import Floats, Scorer
from mexit.runtime.backends.base import Backend
from mexit.runtime.engine import Answers, Permit, answer, last_exit
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import Call, Desk, RequestOptions, predictions
from mexit.runtime.stats import RuntimeStats

PATIENCE_S = 1.0


class Ticket(Call):
    """A call that a batcher answers. For one thread at a time; the batcher sees to that.

    Attributes:
        client: who asks.
        deadline_s: by the clock of `time.perf_counter`; infinite without one.
        due_s: how urgent it is: its deadline, or `PATIENCE_S` after its arrival where that is earlier or there is
            none. It never changes, so nobody who comes later can go first for ever.
        begun: whether segment 1 ran for any of its rows.
        outcome: of the rows that departed last; cancel it when nobody waits for them.
        scorer: of its policy; equal ones are one object.
        thresholds: of its policy, one an exit, (E,); NaN = never leave here.
        last: nobody goes further than this exit.
    """

    outcome: Future[list[Prediction]]
    _answered: list[tuple[NDArray[np.float32], Answers]]

    def __init__(self, desk: Desk, tensor: NDArray[np.float32], wishes: RequestOptions) -> None:
        super().__init__(desk, tensor, wishes)
        self.client = wishes.client
        self.deadline_s = float("inf") if wishes.deadline_s is None else self._start_s + wishes.deadline_s
        self.due_s = min(self.deadline_s, self._start_s + PATIENCE_S)
        self.begun = False
        self.policy = wishes.plan.policy
        self.scorer, self.thresholds = _reading(self.policy, len(desk.bundle.manifest.classes))
        self.exits = len(desk.backend.segments)
        self.last = last_exit(self.exits, wishes.max_exit)
        self._groups: list[Group] = []
        self._through = 0

    @property
    def queued_s(self) -> float:
        """Since the request arrived."""
        return self._wishes.queued_s + self._elapsed_s()

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the outcome any more: the client left, or was told of a failure."""
        return self.outcome.done()

    def depart(self, rows: int) -> list[Group]:
        """The rows that are paid for as groups of `rows` at most, about to enter segment 1."""
        first, after = len(self.predictions), len(self.predictions) + self._paid
        self._paid, self._through = 0, 0
        self.outcome = Future()
        parts = [(start, min(start + rows, after)) for start in range(first, after, rows)]
        self._groups = [Group(self, self._tensor[start:end]) for start, end in parts]
        return list(self._groups)

    def is_last_through(self) -> bool:
        """One more group has all its answers; whether no other one is under way."""
        self._through += 1
        return self._through == len(self._groups)

    def settle(self) -> list[Prediction]:
        """Return the predictions of whatever was computed for the rows that departed; `count` is for the books."""
        found: list[Prediction] = []
        self._answered = []
        for group in self._groups:
            if group.entered_s is None:  # it was stopped before segment 1
                continue
            answers, before_s = group.answers(), group.entered_s - self._start_s
            made = predictions(self._desk, answers, self._wishes, before_s)
            found += [_told_of_company(one, group.together) for one in made] if self._wishes.receipts else made
            self._answered.append((group.images, answers))
        self.predictions += found
        self._groups = []
        return found

    def watch(self) -> None:
        """Let the drift watch look at what was settled last, once it was counted."""
        for images, answers in self._answered:
            self._desk.watch(images, answers, self._wishes.plan, self.client)

    def resolve(self, found: list[Prediction] | BaseException) -> None:
        """Tell whoever waits; too late is not an error."""
        try:
            if isinstance(found, BaseException):
                self.outcome.set_exception(found)
            else:
                self.outcome.set_result(found)
        except InvalidStateError:
            pass


def count(stats: RuntimeStats, found: Sequence[Prediction]) -> None:
    """Enter predictions of any tickets into the books at once: that costs hardly more than one ticket's."""
    if found:
        exits, latency_ms = [one.exit for one in found], [one.latency_ms for one in found]
        rate_limited = [one.reason for one in found].count("rate-limit")
        stats.add(np.array(exits), np.array(latency_ms), sum(one.macs for one in found), rate_limited)


class Group:
    """Rows of a ticket that enter segment 1 together, and their answers.

    Attributes:
        images: all its rows as the network takes them.
        rows: how many have no answer yet.
        entered_s: when segment 1 began, by the clock of `time.perf_counter`; None before.
        together: rows that entered segment 1 with these, these included.
    """

    def __init__(self, ticket: Ticket, images: NDArray[np.float32]) -> None:
        self.ticket, self.images = ticket, images
        self.rows = len(images)
        self.entered_s: float | None = None
        self.together = 0
        self._answers: Answers | None = None
        self._segment_seconds: list[float] = []

    def travel_alone(self, backend: Backend, permit: Permit, denied: Mapping[int, str]) -> tuple[float, ...]:
        """Through all segments at once, as a call's rows. Returns the seconds of each.

        Args:
            backend: the loaded segments.
            permit: see `engine.answer`.
            denied: where `permit` let nobody into segment k for another reason than the rate limiter's: which.
        """
        ticket, began_s = self.ticket, time.perf_counter()
        answers = answer(
            backend,
            self.images,
            ticket.policy,
            ticket.scorer.classes,
            max_exit=ticket.last,
            deadline_s=None if ticket.deadline_s == float("inf") else ticket.deadline_s - began_s,
            permit=permit,
        )
        if denied:
            said = zip(answers.exits.tolist(), answers.reasons, strict=True)
            reasons = (denied.get(k + 1, reason) if reason == "rate-limit" else reason for k, reason in said)
            answers = replace(answers, reasons=tuple(reasons))
        self.entered_s, self.together, self.rows, self._answers = began_s, self.rows, 0, answers
        return answers.segment_seconds

    def ran(self, began_s: float, took_s: float, together: int) -> None:
        """A segment ran, for so many rows at once."""
        self._segment_seconds.append(took_s)
        if self.entered_s is None:
            self.entered_s, self.together = began_s, together
            count = len(self.images)
            self._exits, self._seconds = np.zeros(count, np.int64), np.zeros(count)
            self._probabilities = np.zeros((count, self.ticket.scorer.classes))
            self._reasons = [""] * count

    def land(self, rows: NDArray[np.intp], k: int, probabilities: Floats, reason: str, now_s: float) -> None:
        """Some of its rows, (R,), answer at exit `k` with probabilities (R, C)."""
        assert self.entered_s is not None
        self._exits[rows], self._probabilities[rows], self._seconds[rows] = (
            k,
            probabilities,
            now_s - self.entered_s,
        )
        for row in rows.tolist():
            self._reasons[row] = reason
        self.rows -= len(rows)

    def give_up(self) -> None:
        """Its rows will have no answer."""
        self.rows = 0

    def answers(self) -> Answers:
        """Of all rows, once none is under way."""
        if self._answers is not None:
            return self._answers
        times, asked = (
            tuple(self._segment_seconds),
            (True,) * self.ticket.exits,
        )  # any row may have to stop anywhere
        return Answers(self._exits, self._probabilities, tuple(self._reasons), self._seconds, times, asked)


@lru_cache(maxsize=256)
def _reading(policy: Policy, classes: int) -> tuple[Scorer, tuple[float, ...]]:
    """A policy's scorer, and its thresholds as they stand in a vector of many policies'."""
    thresholds = (float("nan") if value is None else value for value in policy.thresholds)
    return _one_of_equals(policy.scorer(classes)), tuple(thresholds)


@lru_cache(maxsize=256)
def _one_of_equals(scorer: Scorer) -> Scorer:
    """The same object for equal scorers: budgets differ in thresholds, and rows are scored together."""
    return scorer


def _told_of_company(prediction: Prediction, rows: int) -> Prediction:
    """With the rows of the whole batch in its receipt, not only those of its own request."""
    if prediction.receipt is None:
        return prediction
    return replace(prediction, receipt=replace(prediction.receipt, rows=rows))

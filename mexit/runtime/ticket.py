"""A request on its way through the batcher: a call whose rows travel in groups, among those of other calls.

    ticket.pay()       as in a call: takes the tokens of segment 1 for the next rows
    ticket.depart(n)   the rows that are paid for, as groups of n; `ticket.outcome` becomes their predictions

A group is a few rows of one ticket that travel together to the end. It remembers the deepest exit that they have
reached, which is their answer should they be stopped there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mexit.core.confidence import Floats, Scorer, State
from mexit.core.policy import Policy, is_sure
from mexit.runtime.backends.base import Backend, Carried
from mexit.runtime.call import Call, Desk, Wishes, predictions
from mexit.runtime.engine import Answers, Permit, answer, last_exit
from mexit.runtime.prediction import Prediction

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
    """

    def __init__(self, desk: Desk, tensor: NDArray[np.float32], wishes: Wishes) -> None:
        super().__init__(desk, tensor, wishes)
        self.client = wishes.client
        self.deadline_s = float("inf") if wishes.deadline_s is None else self._start_s + wishes.deadline_s
        self.due_s = min(self.deadline_s, self._start_s + PATIENCE_S)
        self.begun = False
        self.outcome: Future[list[Prediction]] = Future()
        self.policy = wishes.plan.policy
        self.scorer = _scorer(self.policy, len(desk.bundle.manifest.classes))
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
        self._groups = [Group(self, start, self._tensor[start:end]) for start, end in parts]
        return list(self._groups)

    def is_last_through(self) -> bool:
        """One more group has all its answers; whether no other one is under way."""
        self._through += 1
        return self._through == len(self._groups)

    def settle(self) -> list[Prediction]:
        """Count whatever was computed for the rows that departed, as a call does, and return their predictions."""
        found = []
        for group in self._groups:
            if group.entered_s is None:  # it was stopped before segment 1
                continue
            answers = group.answers
            before_s = group.entered_s - self._start_s
            made = predictions(self._desk, answers, self._wishes, before_s)
            macs = sum(prediction.macs for prediction in made)
            governed = answers.reasons.count("governor")
            self._desk.ledger.add(answers.exits, (answers.seconds + before_s) * 1e3, macs, governed)
            found += [_told_of_company(one, group.together) for one in made]
            self._desk.watch(group.images, answers, self._wishes.plan, self.client)
        self.predictions += found
        self._groups = []
        return found

    def resolve(self, found: list[Prediction] | BaseException) -> None:
        """Tell whoever waits; too late is not an error."""
        try:
            if isinstance(found, BaseException):
                self.outcome.set_exception(found)
            else:
                self.outcome.set_result(found)
        except InvalidStateError:
            pass


class Group:
    """Rows of a ticket that travel together.

    Attributes:
        first: its first row in the ticket's tensor.
        images: all its rows as the network takes them.
        rows: how many are under way.
        k: the segment that is next, from 1.
        carried: the features of the rows under way, as segment k takes them.
        state: the scorer's, of the same rows.
        entered_s: when segment 1 began, by the clock of `time.perf_counter`; None before.
        together: rows that entered segment 1 with these, these included.
        answers: of all rows, once none is under way.
    """

    carried: Carried
    state: State
    answers: Answers

    def __init__(self, ticket: Ticket, first: int, images: NDArray[np.float32]) -> None:
        self.ticket, self.first, self.images = ticket, first, images
        self.rows, self.k = len(images), 1
        self.entered_s: float | None = None
        self.together = 0

    def pack(self, backend: Backend) -> None:
        """Make ready for segments in company."""
        count = self.rows
        self.carried, self.state = backend.carry(self.images), self.ticket.scorer.start(count)
        self._rows: NDArray[np.intp] = np.arange(count)  # under way
        self._exits = np.zeros(count, np.int64)
        self._probabilities = np.zeros((count, self.ticket.scorer.classes))
        self._seconds = np.zeros(count)
        self._reasons = [""] * count
        self._segment_seconds: list[float] = []

    def travel_alone(self, backend: Backend, permit: Permit, denied: Mapping[int, str]) -> None:
        """Through all segments at once, as a call's rows.

        Args:
            backend: the loaded segments.
            permit: see `engine.answer`.
            denied: where `permit` let nobody into segment k for another reason than the governor's: which.
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
            reasons = (denied.get(k + 1, reason) if reason == "governor" else reason for k, reason in said)
            answers = replace(answers, reasons=tuple(reasons))
        self.entered_s, self.together, self.rows, self.answers = began_s, self.rows, 0, answers

    def ran(self, began_s: float, took_s: float, together: int) -> None:
        """Segment k ran, for so many rows at once."""
        self._segment_seconds.append(took_s)
        if self.entered_s is None:
            self.entered_s, self.together = began_s, together

    def decide(
        self, probabilities: Floats, score: Floats, state: State, first: int, carried: Carried, place: int
    ) -> None:
        """Let rows answer at exit k, and make the others ready for segment k + 1.

        Args:
            probabilities, score: of exit k for this group's rows, (B, C) and (B,).
            state: the scorer's next one, of all rows that were scored at once; this group's begin at `first`.
            carried: what segment k gave for the whole batch; this group's rows begin at `place`.
        """
        ticket, k, now_s = self.ticket, self.k, time.perf_counter()
        self._deepest, self.k = probabilities, k + 1
        if k == ticket.exits:
            self._answer(np.arange(self.rows), "last", now_s)
            return
        sure = is_sure(score, ticket.policy.threshold(k))
        staying = (~sure).nonzero()[0]
        if len(staying) < self.rows:
            self._answer(sure.nonzero()[0], "confident", now_s)
        if not len(staying):
            return
        if k == ticket.last or now_s >= ticket.deadline_s:
            self._answer(staying, "deadline" if now_s >= ticket.deadline_s else "max-exit", now_s)
            return
        if len(staying) < len(sure):
            self._keep(staying)
        self.carried = carried if len(staying) == carried.rows else carried.take(staying + place)
        self.state = state.take(staying + first)

    def stop(self, granted: int, reason: str) -> None:
        """All rows but the first `granted` answer with the deepest exit they have reached, if there is one."""
        if self.k == 1:
            self.rows = 0
            return
        self._answer(np.arange(granted, self.rows), reason, time.perf_counter())
        if granted:
            staying = np.arange(granted)
            self._keep(staying)
            self.carried, self.state = self.carried.take(staying), self.state.take(staying)

    def _answer(self, which: NDArray[np.intp], reason: str, now_s: float) -> None:
        assert self.entered_s is not None
        rows = self._rows[which]
        self._exits[rows], self._probabilities[rows] = self.k - 1, self._deepest[which]
        self._seconds[rows] = now_s - self.entered_s
        for row in rows.tolist():
            self._reasons[row] = reason
        self.rows -= len(rows)
        if not self.rows:
            times = tuple(self._segment_seconds)
            reasons, asked = tuple(self._reasons), (True,) * self.ticket.exits  # any row may have to stop anywhere
            self.answers = Answers(self._exits, self._probabilities, reasons, self._seconds, times, asked)

    def _keep(self, staying: NDArray[np.intp]) -> None:
        self._rows, self._deepest = self._rows[staying], self._deepest[staying]


@lru_cache(maxsize=256)
def _scorer(policy: Policy, classes: int) -> Scorer:
    return _one_of_equals(policy.scorer(classes))


@lru_cache(maxsize=256)
def _one_of_equals(scorer: Scorer) -> Scorer:
    """The same object for equal scorers: budgets differ in thresholds, and rows are scored together."""
    return scorer


def _told_of_company(prediction: Prediction, rows: int) -> Prediction:
    """With the rows of the whole batch in its receipt, not only those of its own request."""
    if prediction.receipt is None:
        return prediction
    return replace(prediction, receipt=replace(prediction.receipt, rows=rows))

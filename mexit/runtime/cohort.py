"""Rows of many requests that travel together: they run through a segment at once and are decided at once.

A cohort's rows have one scorer and wait for the same segment; each has its own threshold, the last exit that its
request allows, and its own deadline. Whatever the number of requests, a segment costs one decision, in vectors;
only answers are handed out request by request. Rows that stay unsure stay together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mexit.core.policy import should_exit
from mexit.core.scores import Floats, State
from mexit.runtime.backends.base import Backend, Carried, Segment
from mexit.runtime.ticket import Group

Rows = NDArray[np.intp]


class Cohort:
    """Rows under way, those of a group side by side and in order.

    Attributes:
        groups: whose rows they are. All rows of a group that are under way are in one cohort.
        k: the segment that is next, from 1.
        rows: how many.
        scorer: of all.
        due_s: see `Ticket.due_s`; of the most urgent group of each client, as of `reckon`.
        first_due_s: the earliest of them.
        deadline_s: likewise.
        through: groups all of whose rows have left, until whoever takes care of those takes them from here.
    """

    _owner: Rows  # place of each row's group in `groups`, (B,), ascending
    _row: Rows  # place of each row in its group, (B,)
    _carried: Carried  # features as segment k takes them
    _state: State  # the scorer's
    _deepest: Floats  # probabilities of exit k - 1, (B, C)

    def __init__(self, groups: list[Group], k: int) -> None:
        """Packed by `together`."""
        self.groups, self.k = groups, k
        self.scorer = groups[0].ticket.scorer
        self.through: list[Group] = []
        self.rows = sum([group.rows for group in groups])

    def reckon(self) -> None:
        """Find out when its rows are due, before it waits."""
        self.due_s: dict[str, float] = {}
        for group in self.groups:
            ticket = group.ticket
            if ticket.due_s < self.due_s.get(ticket.client, float("inf")):
                self.due_s[ticket.client] = ticket.due_s
        self.first_due_s = min(self.due_s.values())
        self.deadline_s = min([group.ticket.deadline_s for group in self.groups])

    @property
    def oldest(self) -> Group:
        """The group that has been under way for longest."""
        return min(self.groups, key=lambda group: group.entered_s or float("inf"))

    @staticmethod
    def together(cohorts: Sequence[Cohort], backend: Backend) -> Cohort:
        """One cohort of several with the same scorer that wait for the same segment, ready to run."""
        first, k = cohorts[0], cohorts[0].k
        if len(cohorts) == 1 and k > 1:
            return first
        merged = Cohort([group for cohort in cohorts for group in cohort.groups], k)
        merged.through = [group for cohort in cohorts for group in cohort.through]
        if k == 1:
            merged._pack(backend)
            return merged
        before = np.cumsum([0, *(len(cohort.groups) for cohort in cohorts)])
        merged._owner = np.concatenate([one._owner + past for one, past in zip(cohorts, before, strict=False)])
        merged._row = np.concatenate([one._row for one in cohorts])
        merged._deepest = np.concatenate([one._deepest for one in cohorts])
        merged._state = State.concat([one._state for one in cohorts])
        merged._carried = first._carried.concat([one._carried for one in cohorts[1:]])
        return merged

    def _pack(self, backend: Backend) -> None:
        images = [group.images for group in self.groups]
        self._carried = backend.carry(images[0] if len(images) == 1 else np.concatenate(images))
        self._state = self.scorer.start(self.rows)
        self._owner = np.repeat(np.arange(len(images)), [len(some) for some in images])
        self._row = np.concatenate([np.arange(len(some)) for some in images])

    def run(self, segment: Segment) -> float:
        """Run segment k and let the rows answer that are sure, late, or may go no further.

        Returns the seconds of the segment and its scores.
        """
        began_s = time.perf_counter()
        for group in self.groups:
            group.ticket.begun = True
        self._carried, logits = segment.run(self._carried)
        self._state, self._deepest, score = self.scorer.step(self.k, logits, self._state)
        now_s = time.perf_counter()
        for group in self.groups:
            group.ran(began_s, now_s - began_s, self.rows)
        self._decide(score, now_s)
        return now_s - began_s

    def _decide(self, score: Floats, now_s: float) -> None:
        k, self.k = self.k, self.k + 1
        if k == self.groups[0].ticket.exits:
            self._leave(np.ones(self.rows, np.bool_), "last", now_s)
            return
        thresholds = np.array([group.ticket.thresholds[k - 1] for group in self.groups])
        self._leave(should_exit(score, thresholds[self._owner]), "confident", now_s)
        self.stop([now_s >= group.ticket.deadline_s for group in self.groups], "deadline")
        self.stop([group.ticket.last == k for group in self.groups], "max-exit")

    def stop(self, which: Sequence[bool], reason: str) -> None:
        """Nothing more runs for some of the groups, (G,): their rows answer with exit k - 1, if there is one."""
        if not any(which):
            return
        if self.k > 1:
            self._leave(np.array(which)[self._owner], reason, time.perf_counter())
            return
        stopped = [group for group, stops in zip(self.groups, which, strict=True) if stops]
        for group in stopped:
            group.give_up()
        self.drop_empty()

    def admit(self, read_limits: Sequence[int], reason: str) -> None:
        """The first so many rows of each group, (G,), go on; the others answer with exit k - 1, for k > 1."""
        first = np.searchsorted(self._owner, np.arange(len(self.groups)))
        rank = np.arange(self.rows) - first[self._owner]
        self._leave(rank >= np.array(read_limits)[self._owner], reason, time.perf_counter())

    def _leave(self, leaving: NDArray[np.bool_], reason: str, now_s: float) -> None:
        """Rows (B,) answer with exit k - 1; the others stay."""
        places = leaving.nonzero()[0]
        if not len(places):
            return
        owner, row, probabilities = self._owner[places], self._row[places], self._deepest[places]
        edges = [0, *((owner[1:] != owner[:-1]).nonzero()[0] + 1).tolist(), len(places)]
        for start, end in pairwise(edges):
            group = self.groups[owner[start]]
            group.land(row[start:end], self.k - 1, probabilities[start:end], reason, now_s)
        self._keep((~leaving).nonzero()[0])

    def _keep(self, places: Rows) -> None:
        """Rows at these places stay under way."""
        place = np.cumsum([group.rows > 0 for group in self.groups]) - 1
        self.drop_empty()
        if not self.rows:
            return
        self._owner, self._row = place[self._owner[places]], self._row[places]
        self._carried, self._state = self._carried.take(places), self._state.take(places)
        self._deepest = self._deepest[places]

    def drop_empty(self) -> None:
        """Groups without rows under way are through."""
        self.through += [group for group in self.groups if not group.rows]
        self.groups = [group for group in self.groups if group.rows]
        self.rows = sum([group.rows for group in self.groups])

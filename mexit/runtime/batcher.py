"""Continuous batching: rows of different requests, with different budgets, share a run of a segment.

There is a queue in front of every segment. A worker picks the cohort of rows whose turn it is, lets others that
wait for the same segment join where that pays, runs the segment once, and decides for each row by its own policy.
Rows that stay unsure queue together for the next segment; a request is answered when its last row is.

- Clients take turns. Of what waits for one client the most urgent goes first; of equally urgent the furthest,
  which finishes work sooner.
- A cohort joins a batch if the table of measured costs (`batch_costs`) says that those who wait gain more by it
  than those in the batch lose, summed over clients. Nobody joins whom a free worker could take instead: a request
  that is alone never waits for company.
- Nothing runs for a client that has left, and nothing that would end after its deadline: such rows answer with the
  deepest exit they have reached, and are counted, since that is what they cost. A request that could not even
  reach the first exit in time is refused.
- Where more waits for a client than can be answered in time, new requests of that client are refused early, so
  that batches stay efficient and the others are in time (`outlook`).
- Tokens for a segment after the first are taken right before it runs, row by row in the order of the group.

The batcher has no threads. It asks for one when there is work, so whoever owns them decides what else they do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from mexit.errors import DeadlineExceeded, Overloaded
from mexit.runtime.batch_costs import BatchCosts, measure
from mexit.runtime.cohort import Cohort
from mexit.runtime.outlook import Outlook
from mexit.runtime.prediction import Prediction
from mexit.runtime.request import BATCH
from mexit.runtime.runtime import Runtime
from mexit.runtime.ticket import Group, Ticket, count
from mexit.runtime.waiting import Waiting

Start = Callable[[Callable[[], None]], Any]
Heard = Callable[[Sequence[Prediction]], None]
T = TypeVar("T")
_GROUP = 16  # rows of a request that are not parted: to handle more groups costs more than others wait less
_LOG = logging.getLogger("mexit.batcher")


class Batcher:
    """Answers tickets of one runtime. Safe to share between threads."""

    def __init__(
        self,
        runtime: Runtime,
        start: Start,
        workers: int,
        *,
        costs: BatchCosts | None = None,
        heard: Heard | None = None,
    ) -> None:
        """A batcher with nothing to do.

        Args:
            runtime: whose tickets they are, made by `Runtime.begin`.
            start: calls a function once, soon, in some thread that is not this one.
            workers: how many such functions run at a time.
            costs: of the runtime's segments; measured now if not given.
            heard: told all predictions that were counted, those that nobody waits for any more included.
        """
        if costs is None:
            manifest = runtime.bundle.manifest
            costs = measure(runtime.backend, runtime.policy().scorer(len(manifest.classes)), manifest.input.shape)
        self._backend, self._segments = runtime.backend, runtime.backend.segments
        self._rate_limiter, self._ledger = runtime.rate_limiter, runtime.stats
        self._start, self._workers, self._heard = start, workers, heard
        self._group_rows = max(_GROUP, costs.efficient_rows)
        self._outlook = Outlook(costs)
        self._waiting = Waiting()
        self._asked = 0  # workers that are at work here, or will be
        self._running = 0  # those that have a batch
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, ticket: Ticket) -> Future[list[Prediction]]:
        """Let the rows that are paid for go; `ticket.outcome`, which this returns, becomes their predictions.

        Or an error: `DeadlineExceeded` before segment 1, `Overloaded` of a closed batcher, what the engine raised.
        """
        groups = ticket.depart(self._group_rows)
        if not groups:
            ticket.resolve([])
        self._enqueue([Cohort([group], 1) for group in groups])
        return ticket.outcome

    def close(self) -> None:
        """Refuse what waits and what comes; batches that run are finished, and nothing after them is begun."""
        with self._lock:
            self._closed = True
            refused = self._waiting.all()
            for cohort in refused:
                self._waiting.remove(cohort)
        self._deny(refused, _stopping())
        self._send_on(refused)

    def _enqueue(self, cohorts: Sequence[Cohort], taken: int = 0) -> None:
        """Let cohorts wait for their next segment, and ask for a worker for each that waits, but for `taken`."""
        with self._lock:
            closed = self._closed
            for cohort in () if closed else cohorts:
                self._waiting.put(cohort)
            more = max(0, min(self._workers - self._asked, len(self._waiting) - taken))
            self._asked += more
        if closed and cohorts:
            self._deny(cohorts, _stopping())
            self._send_on(cohorts)
        for _ in range(more):
            self._start(self._work)

    def _work(self) -> None:
        """Run a few batches, while any wait, and leave the thread to others."""
        for _ in self._segments:
            with self._lock:
                if not len(self._waiting):
                    self._asked -= 1
                    return
            self._work_once()
        self._start(self._work)

    def _work_once(self) -> None:
        """Run one batch, if one waits, and end what is too late to run."""
        now_s = time.perf_counter()
        with self._lock:
            late = self._take_late(now_s)
            hopeless = self._take_hopeless(now_s)
            batch = self._pick(now_s)
            alone = len(batch) == 1 and len(self._waiting) <= self._free()
            self._running += bool(batch)
        try:
            for cohort in late:
                self._stop_late(cohort, now_s)
            if late or hopeless:
                self._deny(hopeless, _too_much())
                self._send_on([*late, *hopeless])
            ran = bool(batch) and self._run(batch, alone, now_s)
        finally:
            with self._lock:
                self._running -= bool(batch)
        if (late or hopeless or batch) and not ran:
            with self._lock:
                self._outlook.fade()

    def _take_late(self, now_s: float) -> list[Cohort]:
        """Those of which some rows could not end their next segment in time."""
        late = []
        for ordered in self._waiting.ending():
            for cohort in ordered:
                if now_s + self._outlook.segment_s(cohort.k, cohort.rows) <= cohort.deadline_s:
                    break
                if cohort.k > 1 or not cohort.groups[0].ticket.begun:
                    late.append(cohort)
        for cohort in late:
            self._waiting.remove(cohort)
        return late

    def _take_hopeless(self, now_s: float) -> list[Cohort]:
        turn = self._waiting.turn()
        share = self._workers / max(1, self._waiting.clients)
        hopeless = self._outlook.hopeless(turn, now_s, share) if len(turn) > 1 else []
        for cohort in hopeless:
            self._waiting.remove(cohort)
        return hopeless

    def _free(self) -> int:
        """Workers that could take a cohort besides the one that asks."""
        return max(0, self._workers - self._running - 1)

    def _pick(self, now_s: float) -> list[Cohort]:
        """The cohort whose turn it is and those that join it; all wait for the same segment."""
        if (lead := self._waiting.take()) is None:
            return []
        batch, rows, k = [lead], lead.rows, lead.k
        free = self._free()
        if len(self._waiting) <= free:
            return batch
        inside, outside = self._waiting.weight(lead), self._waiting.clients + self._waiting.to_come(lead)
        took_s, path_s = self._outlook.segment_s, self._outlook.path_s
        cost, until_s = took_s(k, rows), self._until_s(lead, now_s)
        in_time = now_s + path_s(k, rows) <= until_s  # to the end; else at least to the next exit
        for other in self._waiting.before(k)[free:]:
            if rows + other.rows > BATCH or other.scorer is not lead.scorer:
                continue
            merged, weight = took_s(k, rows + other.rows), self._waiting.weight(other)
            saved = cost + took_s(k, other.rows) - merged
            until_s_both = min(until_s, other.deadline_s if k == 1 else self._until_s(other, now_s))
            if now_s + (path_s(k, rows + other.rows) if in_time else merged) > until_s_both:
                continue
            if (merged - cost) * inside > saved * outside:
                continue
            batch.append(other)
            rows, cost, until_s = rows + other.rows, merged, until_s_both
            inside, outside = inside + weight, outside - weight
        for other in batch[1:]:
            self._waiting.remove(other)
        return batch

    def _until_s(self, cohort: Cohort, now_s: float) -> float:
        """The earliest deadline of those that can end their next segment in time."""
        end_s = now_s + self._outlook.segment_s(cohort.k, cohort.rows)
        if end_s <= cohort.deadline_s:
            return cohort.deadline_s
        deadlines_s = (group.ticket.deadline_s for group in cohort.groups)
        return min((deadline_s for deadline_s in deadlines_s if deadline_s >= end_s), default=float("inf"))

    def _run(self, batch: list[Cohort], alone: bool, now_s: float) -> bool:
        """Run the segment that the cohorts wait for, for those that are not too late by now, if any."""
        for cohort in batch:
            self._stop_late(cohort, now_s)
        travelling = [cohort for cohort in batch if cohort.rows]
        ended = [cohort for cohort in batch if not cohort.rows]
        try:
            if alone and travelling and travelling[0].k == 1:
                self._run_alone(travelling[0])
            elif travelling:
                travelling = [Cohort.together(travelling, self._backend)]
                self._step(travelling[0], now_s)
        except Exception as error:  # whoever waits must hear of it
            self._deny(travelling, error)
        ran = bool(travelling)
        self._send_on([*ended, *travelling])
        return ran

    def _run_alone(self, cohort: Cohort) -> None:
        """A group that nobody waits behind needs no stops on its way; it is only asked whether to go on."""
        (group,), rows, denied = cohort.groups, cohort.rows, dict[int, str]()
        ticket = group.ticket
        ticket.begun = True

        def permit(k: int, wishing: int) -> int:
            expected_s = self._outlook.segment_s(k, wishing)
            if ticket.gone or time.perf_counter() + expected_s > ticket.deadline_s:
                denied[k] = "deadline"
                return 0
            return wishing if self._rate_limiter is None else self._rate_limiter.acquire(ticket.client, k, wishing)

        times_s = group.travel_alone(self._backend, permit, denied)
        cohort.drop_empty()
        with self._lock:
            self._outlook.keep_pace(1, rows, times_s[0])

    def _step(self, cohort: Cohort, began_s: float) -> None:
        """Pay for the segment, run it, decide."""
        k = cohort.k
        if self._rate_limiter is not None and k > 1:
            cohort.admit(
                [self._rate_limiter.acquire(one.ticket.client, k, one.rows) for one in cohort.groups], "rate-limit"
            )
        if rows := cohort.rows:
            oldest = cohort.oldest
            took_s = cohort.run(self._segments[k - 1])
            besides_s = time.perf_counter() - began_s - took_s
            with self._lock:
                self._outlook.learn(k, rows, took_s, besides_s, cohort.rows)
                if k == len(self._segments) and oldest.entered_s is not None:
                    self._outlook.arrived(oldest.together, time.perf_counter() - oldest.entered_s)

    def _stop_late(self, cohort: Cohort, now_s: float) -> None:
        """Nothing runs any more for those who left, or for whom the next segment would end too late."""
        end_s = now_s + self._outlook.segment_s(cohort.k, cohort.rows)
        if end_s <= cohort.deadline_s and not any(group.ticket.gone for group in cohort.groups):
            return
        over = [self._is_over(group, cohort.k, end_s) for group in cohort.groups]
        if cohort.k == 1 and over[0]:
            waited_ms = cohort.groups[0].ticket.queued_s * 1e3
            late = f"{waited_ms:.3f} ms in the queue: the deadline comes before the first exit could answer"
            self._deny([cohort], DeadlineExceeded(late))
        else:
            cohort.stop(over, "deadline")

    @staticmethod
    def _is_over(group: Group, k: int, end_s: float) -> bool:
        if group.ticket.gone:
            return True
        if k == 1 and group.ticket.begun:
            return False  # of a request that has begun, every row gets the first exit
        return end_s > group.ticket.deadline_s

    @staticmethod
    def _deny(cohorts: Sequence[Cohort], error: Exception) -> None:
        """Nothing more runs for them; whoever has left already does not hear of the error."""
        for cohort in cohorts:
            for group in cohort.groups:
                group.ticket.resolve(error)
            cohort.stop([True] * len(cohort.groups), "deadline")

    def _send_on(self, cohorts: Sequence[Cohort]) -> None:
        """Those with rows wait for their next segment; who has none is told.

        That may take whoever waits for answers a while: meanwhile, other threads take care of the rows that stay.
        """
        through = [group for cohort in cohorts for group in cohort.through]
        staying = [cohort for cohort in cohorts if cohort.rows]
        for cohort in cohorts:
            cohort.through = []
        self._enqueue(staying, taken=0 if through else 1)
        if through:
            self._tell(through)

    def _tell(self, through: Sequence[Group]) -> None:
        """All rows of these groups have their answers, or will have none; their tickets may be done."""
        with self._lock:
            done = [group.ticket for group in through if group.ticket.is_last_through()]
        settled = [(ticket, self._try(ticket, ticket.settle)) for ticket in done if ticket.begun]
        count(self._ledger, [one for _, found in settled for one in found or ()])
        for ticket, found in settled:
            if found is None:
                continue
            self._try(ticket, ticket.watch)
            if self._heard is not None:
                self._try(ticket, partial(self._heard, found))
            ticket.resolve(found)

    @staticmethod
    def _try(ticket: Ticket, what: Callable[[], T]) -> T | None:
        """Whoever waits must hear of an error, and nobody else."""
        try:
            return what()
        except Exception as error:
            _LOG.debug("a ticket could not be settled", exc_info=True)
            ticket.resolve(error)
            return None


def _too_much() -> DeadlineExceeded:
    return DeadlineExceeded("more requests wait than can be answered by their deadlines: ask later, or for less")


def _stopping() -> Overloaded:
    return Overloaded("the server is stopping")

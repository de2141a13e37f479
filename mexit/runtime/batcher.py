"""Continuous batching: rows of different requests, with different budgets, share a run of a segment.

There is a queue in front of every segment. A worker picks the group of rows whose turn it is, lets others that
wait for the same segment join where that pays, runs the segment once, and decides for each row by its own policy.
Rows that stay unsure queue for the next segment; a request is answered when its last row is.

- Clients take turns. Of one client's groups the most urgent goes first; of equally urgent ones the furthest, which
  finishes work sooner.
- A group joins a batch if the table of measured costs (`batch_costs`) says that those who wait gain more by it
  than those in the batch lose, summed over clients. Nobody joins whom a free worker could take instead: a request
  that is alone never waits for company.
- Nothing runs for a client that has left, and nothing that would end after its deadline: such rows answer with the
  deepest exit they have reached, and are counted, since that is what they cost. A request that could not even
  reach the first exit in time is refused.
- Tokens for a segment after the first are taken right before it runs, row by row in the order of the group.

The batcher has no threads. It asks for one when there is work, so whoever owns them decides what else they do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from mexit.core.confidence import Scorer, State
from mexit.errors import DeadlineExceeded, Overloaded
from mexit.runtime.batch_costs import BatchCosts, measure
from mexit.runtime.call import BATCH
from mexit.runtime.prediction import Prediction
from mexit.runtime.runtime import Runtime
from mexit.runtime.ticket import Group, Ticket

Start = Callable[[Callable[[], None]], Any]
Heard = Callable[[Sequence[Prediction]], None]
_LOG = logging.getLogger("mexit.batcher")
_MEMORY = 0.9  # of the pace: the last ten batches count most
_SLOWEST = 4.0  # one batch that the system held up for long says little of the next one


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
        self._governor = runtime.governor
        self._costs, self._start, self._workers, self._heard = costs, start, workers, heard
        self._queue = _Queue()
        self._running = 0
        self._pace = 1.0  # measured time over the table's, of late
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, ticket: Ticket) -> Future[list[Prediction]]:
        """Let the rows that are paid for go; `ticket.outcome`, which this returns, becomes their predictions.

        Or an error: `DeadlineExceeded` before segment 1, `Overloaded` of a closed batcher, what the engine raised.
        """
        groups = ticket.depart(self._costs.efficient_rows)
        if not groups:
            ticket.resolve([])
        for _ in range(self._enqueue(groups)):
            self._start(self._work)
        return ticket.outcome

    def close(self) -> None:
        """Refuse what waits and what comes; batches that run are finished, and nothing after them is begun."""
        with self._lock:
            self._closed = True
            waiting = self._queue.remove(lambda _: True)
        for group in waiting:
            self._refuse(group, _stopping())

    def _enqueue(self, groups: Sequence[Group]) -> int:
        """Let groups wait for their next segment. Returns how many do: none once the batcher is closed."""
        with self._lock:
            closed = self._closed
            for group in () if closed else groups:
                self._queue.put(group)
        for group in groups if closed else ():
            self._refuse(group, _stopping())
        return 0 if closed else len(groups)

    def _work(self) -> None:
        """Run a few batches, if any wait, and leave the thread to others.

        Every group that waits has a call of this to come or under way; to those that joined a batch it is one too
        many, which finds nothing.
        """
        for _ in self._segments:
            waiting = self._work_once()
            for _ in range(waiting - 1):
                self._start(self._work)
            if not waiting:
                return
        self._start(self._work)

    def _work_once(self) -> int:
        """Run one batch, if one waits; returns how many of its groups now wait for the next segment."""
        now_s = time.perf_counter()
        with self._lock:
            over = self._queue.remove(lambda group: self._is_over(group, now_s))
            batch = self._pick(now_s)
            alone = len(batch) == 1 and len(self._queue) <= self._free()
            self._running += bool(batch)
        try:
            for group in over:
                self._end(group)
            return self._go_on(batch, alone) if batch else 0
        finally:
            with self._lock:
                self._running -= bool(batch)

    def _is_over(self, group: Group, now_s: float) -> bool:
        """Whether nothing should run for it any more: nobody waits, or it could not end in time."""
        ticket = group.ticket
        if ticket.gone:
            return True
        if group.k == 1 and ticket.begun:
            return False  # of a request that has begun, every row gets the first exit
        return now_s + self._pace * self._costs.of(group.k, group.rows) > ticket.deadline_s

    def _free(self) -> int:
        """Workers that could take a group besides the one that asks."""
        return max(0, self._workers - self._running - 1)

    def _pick(self, now_s: float) -> list[Group]:
        """The group whose turn it is and those that join it; all wait for the same segment."""
        if (lead := self._queue.take()) is None:
            return []
        batch, rows, k = [lead], lead.rows, lead.k
        free = self._free()
        if len(self._queue) <= free:
            return batch
        waiting = self._queue.by_urgency()
        inside, outside = self._queue.weight(lead), sum(self._queue.weight(group) for group in waiting)
        cost, until_s = self._costs.of(k, rows), lead.ticket.deadline_s
        for group in waiting[free:]:
            if group.k != k or rows + group.rows > BATCH:
                continue
            merged, weight = self._costs.of(k, rows + group.rows), self._queue.weight(group)
            saved = cost + self._costs.of(k, group.rows) - merged
            too_late = now_s + self._pace * merged > min(until_s, group.ticket.deadline_s)
            if too_late or (merged - cost) * inside > saved * outside:
                continue
            batch.append(group)
            rows, cost = rows + group.rows, merged
            inside, outside = inside + weight, outside - weight
            until_s = min(until_s, group.ticket.deadline_s)
        for group in batch[1:]:
            self._queue.leave(group)
        return batch

    def _go_on(self, batch: list[Group], alone: bool) -> int:
        """Run the segment that the groups wait for; returns how many wait for the next one, and for this thread.

        Answers may take whoever waits for them a while: meanwhile, other threads take care of the groups.
        """
        try:
            if alone and batch[0].k == 1:
                self._run_alone(batch[0])
            else:
                self._admit(batch)
                if running := [group for group in batch if group.rows]:
                    self._step(running)
        except Exception as error:  # whoever waits must hear of it
            for group in batch:
                self._refuse(group, error)
            return 0
        through = [group for group in batch if not group.rows]
        waiting = self._enqueue([group for group in batch if group.rows])  # from here on they are other threads'
        if not through:
            return waiting
        for _ in range(waiting):
            self._start(self._work)
        for group in through:
            self._through(group)
        return 0

    def _run_alone(self, group: Group) -> None:
        """A group that nobody waits behind needs no stops on its way; it is only asked whether to go on."""
        ticket, rows, denied = group.ticket, group.rows, dict[int, str]()
        ticket.begun = True

        def permit(k: int, wishing: int) -> int:
            expected_s = self._pace * self._costs.of(k, wishing)
            if ticket.gone or time.perf_counter() + expected_s > ticket.deadline_s:
                denied[k] = "deadline"
                return 0
            return wishing if self._governor is None else self._governor.enter(ticket.client, k, wishing)

        group.travel_alone(self._backend, permit, denied)
        self._keep_pace(1, rows, group.answers.segment_seconds[0])

    def _admit(self, batch: Sequence[Group]) -> None:
        """Pay for the next segment; rows that the governor has no tokens for answer now."""
        if self._governor is None or batch[0].k == 1:
            return
        for group in batch:
            granted = self._governor.enter(group.ticket.client, group.k, group.rows)
            if granted < group.rows:
                group.stop(granted, "governor")

    def _step(self, batch: list[Group]) -> None:
        k, rows, began_s = batch[0].k, sum(group.rows for group in batch), time.perf_counter()
        batch.sort(key=lambda group: id(group.ticket.scorer))  # equal ones are one object: side by side
        for group in batch:
            group.ticket.begun = True
            if k == 1:
                group.pack(self._backend)
        carried = batch[0].carried
        if len(batch) > 1:
            carried = carried.concat([group.carried for group in batch[1:]])
        carried, logits = self._segments[k - 1].run(carried)
        scored, place = [], 0
        for scorer, alike in _alike(batch):
            count = sum(group.rows for group in alike)
            state = alike[0].state if len(alike) == 1 else State.concat([group.state for group in alike])
            scored.append((alike, scorer.step(k, logits[place : place + count], state)))
            place += count
        took_s, place = time.perf_counter() - began_s, 0
        self._keep_pace(k, rows, took_s)
        for alike, (state, probabilities, score) in scored:
            first = 0
            for group in alike:
                count = group.rows
                own = slice(first, first + count)
                group.ran(began_s, took_s, rows)
                group.decide(probabilities[own], score[own], state, first, carried, place)
                first, place = first + count, place + count

    def _keep_pace(self, k: int, rows: int, took_s: float) -> None:
        ratio = took_s / max(1e-9, self._costs.of(k, rows))
        self._pace = _MEMORY * self._pace + (1 - _MEMORY) * min(_SLOWEST, ratio)

    def _end(self, group: Group) -> None:
        """Nothing runs for it any more."""
        ticket = group.ticket
        if group.k == 1 and not ticket.gone:
            waited_ms = ticket.queued_s * 1e3
            late = f"{waited_ms:.3f} ms in the queue: the deadline comes before the first exit could answer"
            self._refuse(group, DeadlineExceeded(late))
            return
        group.stop(0, "deadline")
        self._through(group)

    def _refuse(self, group: Group, error: Exception) -> None:
        group.ticket.resolve(error)
        group.stop(0, "deadline")
        self._through(group)

    def _through(self, group: Group) -> None:
        """All its rows have their answers, or will have none; the ticket may be done."""
        with self._lock:
            if not group.ticket.is_last_through():
                return
        try:
            found = group.ticket.settle()
            if self._heard is not None:
                self._heard(found)
        except Exception as error:
            _LOG.debug("a ticket could not be settled", exc_info=True)
            group.ticket.resolve(error)
            return
        group.ticket.resolve(found)


class _Queue:
    """Groups that wait for a segment, by client, in turns. For one thread at a time."""

    def __init__(self) -> None:
        self._of: dict[str, list[Group]] = {}  # the client whose turn it is comes first

    def __len__(self) -> int:
        return sum(len(groups) for groups in self._of.values())

    def put(self, group: Group) -> None:
        self._of.setdefault(group.ticket.client, []).append(group)

    def take(self) -> Group | None:
        """The most urgent group of the client whose turn it is; that client is then behind all others."""
        if not self._of:
            return None
        client = next(iter(self._of))
        groups = self._of.pop(client)
        lead = min(groups, key=_urgency)
        groups.remove(lead)
        if groups:
            self._of[client] = groups
        return lead

    def leave(self, group: Group) -> None:
        groups = self._of[group.ticket.client]
        groups.remove(group)
        if not groups:
            del self._of[group.ticket.client]

    def remove(self, which: Callable[[Group], bool]) -> list[Group]:
        """All that a condition holds for."""
        removed = [group for groups in self._of.values() for group in groups if which(group)]
        for group in removed:
            self.leave(group)
        return removed

    def by_urgency(self) -> list[Group]:
        return sorted((group for groups in self._of.values() for group in groups), key=_urgency)

    def weight(self, group: Group) -> float:
        """Clients count alike, however many groups of theirs wait."""
        return 1 / max(1, len(self._of.get(group.ticket.client, ())))


def _urgency(group: Group) -> tuple[float, int, int]:
    return group.ticket.due_s, -group.k, group.first


def _alike(batch: Sequence[Group]) -> list[tuple[Scorer, list[Group]]]:
    """Neighbours with the same scorer."""
    found: list[tuple[Scorer, list[Group]]] = []
    for group in batch:
        if found and found[-1][0] is group.ticket.scorer:
            found[-1][1].append(group)
        else:
            found.append((group.ticket.scorer, [group]))
    return found


def _stopping() -> Overloaded:
    return Overloaded("the server is stopping")

"""What is to be expected of rows that set out now: how long they take, and who of a crowd should not set out.

The table of measured costs (`batch_costs`) says what a segment takes on a machine that does nothing else. The
pace, what a batch takes besides its segment, and the share of rows that go on after each exit are learnt as
batches run.

Where more waits than can be answered in time, somebody will be late, and to serve the earliest deadline first
would make it everybody: each batch would be as small as its most hopeless row allows, so that all that is
efficient about batches is lost, and the queue never recovers. So the batch is chosen for efficiency, and those
that would be late in it are refused before anything was computed for them (the early drop of Nexus, Shen et al.,
SOSP 2019).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from mexit.runtime.batch_costs import BatchCosts
from mexit.runtime.cohort import Cohort
from mexit.runtime.request import BATCH

_NEWS = 0.1  # the last ten batches count most
_SLOWEST = 4.0  # one batch that the system held up for long says little of the next one
_MARGIN = 1.5  # times as long as it should take: batches are not all alike
_NEAR = 0.9  # of the best rate is good enough where it saves somebody


class Outlook:
    """Learns from batches. For one thread at a time, but `segment_s`."""

    def __init__(self, costs: BatchCosts) -> None:
        self._costs = costs
        self._table = np.array(costs.seconds)  # (E, BATCH + 1)
        self._pace = 1.0  # measured time over the table's, of late
        self._besides_s = 0.0  # of a batch: to pick it, to put it together, to hand out answers
        self._detours = 1.0  # time to the last exit over that of all batches on the way
        self._going_on = [1.0] * (len(costs.seconds) - 1)  # share of the rows after each exit
        self._busy_s: dict[int, list[float]] = {}  # as it was learnt last

    def learn(self, k: int, rows: int, took_s: float, besides_s: float, staying: int) -> None:
        """Segment `k` and its scores took so long, and the batch so much more; so many of its rows go on."""
        self.keep_pace(k, rows, took_s)
        slowest_s = _SLOWEST * max(self._besides_s, self._costs.of(k, rows))
        self._besides_s += _NEWS * (min(slowest_s, besides_s) - self._besides_s)
        if k <= len(self._going_on):
            self._going_on[k - 1] += _NEWS * (staying / rows - self._going_on[k - 1])

    def keep_pace(self, k: int, rows: int, took_s: float) -> None:
        """Segment `k` took so long."""
        ratio = min(_SLOWEST, took_s / max(1e-9, self._costs.of(k, rows)))
        self._pace += _NEWS * (ratio - self._pace)
        self._busy_s.clear()

    def fade(self) -> None:
        """Somebody was refused and nothing ran: what was learnt counts less, or nothing might ever run again."""
        self._pace += _NEWS * (min(1.0, self._pace) - self._pace)
        self._detours += _NEWS * (1.0 - self._detours)
        self._besides_s *= 1 - _NEWS
        self._busy_s.clear()

    def arrived(self, rows: int, took_s: float) -> None:
        """Rows that set out together came to the last exit after so long, waits on the way included."""
        ratio = min(_SLOWEST, took_s / max(1e-9, self._all_busy_s(1)[rows]))
        self._detours += _NEWS * (max(1.0, ratio) - self._detours)

    def segment_s(self, k: int, rows: int) -> float:
        """Seconds of a batch in segment `k`."""
        return self._besides_s + self._pace * self._costs.of(k, rows)

    def path_s(self, k: int, rows: int) -> float:
        """Seconds from segment `k` to the end, with a margin, for rows of which as many leave as of late."""
        return _MARGIN * self._detours * self._all_busy_s(k)[rows]

    def hopeless(self, waiting: Sequence[Cohort], now_s: float, workers: float) -> list[Cohort]:
        """Those to refuse, so that of the others as many as possible are in time.

        Args:
            waiting: in order.
            now_s: by the clock of deadlines.
            workers: that are there for them.
        """
        if waiting[0].k > 1:
            return []
        most = min(BATCH, sum(cohort.rows for cohort in waiting))
        if waiting[0].deadline_s - now_s >= self.path_s(1, most):
            return []
        busy_s = self._all_busy_s(1)
        paths_s = [_MARGIN * self._detours * busy for busy in busy_s]
        new = [cohort for cohort in waiting if cohort.k == 1 and not cohort.groups[0].ticket.begun]
        if not _is_somebody_late(new, now_s, paths_s, [busy / workers for busy in busy_s]):
            return []
        rates, behind = [0.0], 0
        for cohort in reversed(new):
            behind = min(most, behind + cohort.rows)
            rows = _rows_in_time(paths_s, cohort, behind, cohort.deadline_s - now_s)
            rates.append(rows / busy_s[rows] if rows else 0.0)
        rates.reverse()
        enough = _NEAR * max(rates)
        return new[: next(place for place, rate in enumerate(rates) if rate >= enough)]

    def _all_busy_s(self, k: int) -> list[float]:
        """A worker's seconds from segment `k` to the end, for every number of rows, (BATCH + 1,)."""
        if k not in self._busy_s:
            under_way, table_s = np.arange(BATCH + 1.0), self._table[k - 1].copy()
            for share, times_s in zip(self._going_on[k - 1 :], self._table[k:], strict=True):
                under_way *= share
                table_s += times_s[np.ceil(under_way).astype(np.intp)]
            besides_s = (len(self._table) - k + 1) * self._besides_s
            self._busy_s[k] = (besides_s + self._pace * table_s).tolist()
        return self._busy_s[k]


def _is_somebody_late(
    new: Sequence[Cohort], now_s: float, paths_s: Sequence[float], shares_s: Sequence[float]
) -> bool:
    """Whether somebody who could be in time is late if each batch is as large as its most urgent row allows.

    A batch of n rows takes its own rows `paths_s[n]` to the end, and the workers' time `shares_s[n]`.
    """
    place, left, end_s = 0, sum(cohort.rows for cohort in new), now_s
    while place < len(new):
        lead = new[place]
        rows = _rows_in_time(paths_s, lead, min(BATCH, left), lead.deadline_s - end_s)
        if not rows and _rows_in_time(paths_s, lead, lead.rows, lead.deadline_s - now_s):
            return True
        rows = rows or lead.rows  # the crowd is not why it is late: it goes as far as it can
        end_s += shares_s[rows]
        while place < len(new) and rows >= new[place].rows:
            rows, left, place = rows - new[place].rows, left - new[place].rows, place + 1
    return False


def _rows_in_time(paths_s: Sequence[float], cohort: Cohort, rows: int, left_s: float) -> int:
    """Of the largest batch, up to `rows`, in which a cohort is in time; 0 if it is in none."""
    rows = min(rows, bisect_right(paths_s, left_s) - 1)
    return rows if rows >= cohort.rows else 0

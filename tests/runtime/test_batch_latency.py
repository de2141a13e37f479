"""The table of times by batch size."""

from __future__ import annotations

import numpy as np

from mexit.core.exit_policy import Policy
from mexit.runtime.backends.fake import FakeBackend
from mexit.runtime.batch_latency import BatchLatencyTable
from mexit.runtime.request import MAX_BATCH

SAMPLES, CLASSES, SHAPE = 50, 10, (1, 8, 8)


def test_the_table_interpolates_and_never_falls() -> None:
    table = BatchLatencyTable.from_times((1, 4, 8), [[1.0, 3.0], [4.0, 2.0], [6.0, 4.0]])
    assert [table.segment_s(1, rows) for rows in (0, 1, 2, 4, 6, 8, 16)] == [0, 1, 2, 4, 5, 6, 12]
    assert [table.segment_s(2, rows) for rows in (1, 4, 8)] == [3, 3, 4]
    assert table.remaining_s(1, 4) == 7
    assert table.remaining_s(2, 4) == 3
    assert BatchLatencyTable.from_times((1,), [[1.0]]).efficient_rows == 1
    assert BatchLatencyTable.from_times((1, 4, 8), [[4.0], [4.0], [8.0]]).efficient_rows == 4


def test_a_measured_table_covers_every_batch_size() -> None:
    backend = FakeBackend(np.zeros((3, SAMPLES, CLASSES), np.float32))
    for segment in backend.segments:
        segment.run = lambda carried: (carried, np.zeros((carried.rows, CLASSES), np.float32))  # type: ignore
    scorer = Policy("margin", False, (1.0,) * 3, (None,) * 2).scorer(CLASSES)
    table = BatchLatencyTable.measure(backend, scorer, SHAPE)
    assert [len(seconds) for seconds in table.seconds] == [MAX_BATCH + 1] * 3
    assert all(0 < table.segment_s(k, 1) <= table.segment_s(k, MAX_BATCH) for k in (1, 2, 3))

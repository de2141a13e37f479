"""The table of what batches cost, measured and between what was measured."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from batcher_house import CHEAP, CLASSES, GROUPS_OF_4, LINEAR, POLICIES, SHAPE, House

from mexit import Runtime
from mexit.runtime.backends.fake import images_for
from mexit.runtime.batch_costs import measure, table
from mexit.runtime.request import BATCH


def test_the_table_is_measured_in_well_under_a_second(mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle)
    began = time.perf_counter()
    costs = measure(runtime.backend, runtime.policy().scorer(10), (1, 8, 8))
    assert time.perf_counter() - began < 1.5
    for k in (1, 2, 3):
        assert [costs.of(k, rows) for rows in range(BATCH + 1)] == sorted(costs.of(k, n) for n in range(BATCH + 1))
        assert costs.of(k, 0) == 0.0
    assert runtime.stats.snapshot().predictions == 0


def test_a_table_between_and_beyond_what_was_measured() -> None:
    costs = table((1, 2, 4), [[1.0, 2.0], [0.5, 4.0], [3.0, 8.0]])
    assert [costs.of(1, rows) for rows in (0, 1, 2, 3, 4, 8)] == [0.0, 1.0, 1.0, 2.0, 3.0, 6.0]
    assert costs.of(2, BATCH) == 8.0 / 4 * BATCH
    assert LINEAR.efficient_rows == 1
    assert GROUPS_OF_4.efficient_rows == 4
    assert CHEAP.efficient_rows > 50


def test_measuring_stops_in_time() -> None:
    """A slow engine is timed at one size, or few."""
    house = House()
    for segment in house.backend.segments:
        segment.run = lambda carried, run=segment.run: (time.sleep(0.03 * carried.rows), run(carried))[1]
    began = time.perf_counter()
    house.backend.segments[0].logits[:] = 0
    rows = POLICIES[0].scorer(CLASSES)
    backend: Any = SimpleNamespace(
        segments=house.backend.segments,
        carry=lambda images: house.backend.carry(images_for(np.zeros(len(images), np.int64), SHAPE)),
    )
    costs = measure(backend, rows, SHAPE, limit_s=0.2)
    assert time.perf_counter() - began < 1.5
    assert costs.of(1, 10) == pytest.approx(10 * costs.of(1, 1), rel=0.2)

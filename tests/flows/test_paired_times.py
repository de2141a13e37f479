"""Times of several ways in turns, and the ratio of two of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit.errors import UsageError
from mexit.flows.paired_times import TURN, Ratio, time_in_turns, time_ratio

IMAGES = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)


def test_every_way_gets_the_same_batches_in_turns() -> None:
    seen: dict[str, list[tuple[float, ...]]] = {"a": [], "b": []}
    order: list[str] = []

    def way(name: str, batch: NDArray[np.float32]) -> None:
        seen[name].append(tuple(batch.ravel().tolist()))
        order.append(name)

    ways = {name: lambda batch, name=name: way(name, batch) for name in seen}
    done: list[int] = []
    times = time_in_turns(ways, IMAGES, batch=3, calls=TURN + 5, rounds=4, on_turn=done.append)
    assert {name: values.shape for name, values in times.items()} == {"a": (4, TURN + 5), "b": (4, TURN + 5)}
    assert all((values > 0).all() for values in times.values())
    timed = {name: batches[TURN:] for name, batches in seen.items()}
    assert timed["a"] == timed["b"]
    assert set(timed["a"]) == {(0, 1, 2), (3, 4, 5)}
    assert sum(done) == 2 * 4 * (TURN + 5)
    turns = "".join(order[2 * TURN :])
    assert {"a" * TURN, "b" * TURN} == {turns[:TURN], turns[TURN : 2 * TURN]}
    firsts = [turns[2 * (TURN + 5) * row] for row in range(4)]
    assert len(set(firsts)) == 2, "the order changes"


def test_few_images_fill_a_batch() -> None:
    sizes: list[int] = []
    time_in_turns({"one": lambda batch: sizes.append(len(batch))}, IMAGES, batch=10, calls=1, rounds=2)
    assert set(sizes) == {10}


@pytest.mark.parametrize(("batch", "calls", "rounds"), [(0, 1, 2), (1, 0, 2), (1, 1, 1)])
def test_too_small_numbers_are_refused(batch: int, calls: int, rounds: int) -> None:
    with pytest.raises(UsageError, match="2 rounds"):
        time_in_turns({}, IMAGES, batch, calls, rounds)


def test_the_ratio_is_paired_by_round() -> None:
    """A round that is slow for both changes nothing."""
    reference = np.array([[10.0, 10.0], [50.0, 50.0], [10.0, 10.0]])
    assert time_ratio(0.5 * reference, reference) == Ratio(0.5, 0.5, 0.5)
    noisy = reference * np.array([[0.4], [0.5], [0.625]])
    found = time_ratio(noisy, reference)
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.4 < 0.625 < found.high
    assert found.low * found.high == pytest.approx(0.25)


def test_the_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        load = rng.uniform(1, 3, (10, 1))
        times, reference = (load * rng.lognormal(mean, 0.2, (10, 20)) for mean in (np.log(0.9), 0.0))
        ratio = time_ratio(times, reference)
        covered += ratio.low <= 0.9 <= ratio.high
    assert 370 <= covered <= 391

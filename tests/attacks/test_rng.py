"""Counter-based random numbers: reproducible, independent of the batch, uniform and uncorrelated."""

from __future__ import annotations

import torch

from mexit.attacks.rng import CounterRNG


def test_a_sample_has_the_same_numbers_in_any_batch() -> None:
    rng = CounterRNG(3, 5)
    whole = rng.uniform("start", torch.arange(1000), (4, 4))
    assert torch.equal(rng.uniform("start", torch.tensor([999, 7]), (4, 4)), whole[[999, 7]])


def test_seed_epoch_stream_and_sample_all_matter() -> None:
    index = torch.arange(64)
    first = CounterRNG(0, 0).uniform("start", index, (16,))
    for other in (CounterRNG(1, 0).uniform("start", index, (16,)), CounterRNG(0, 1).uniform("start", index, (16,)),
                  CounterRNG(0, 0).uniform("eokd", index, (16,)), first.flip(0)):  # fmt: skip
        assert (first == other).float().mean() < 0.01


def test_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = CounterRNG(0, 0).uniform("start", torch.arange(4096), (64,)).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.002
    assert abs(numbers.var() - 1 / 12) < 0.001
    counts = torch.histc(numbers, 32, 0, 1)
    expected = numbers.numel() / 32
    assert ((counts - expected) ** 2 / expected).sum() < 62, "chi-squared of 31 degrees, p < 0.001"
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01


def test_every_epoch_visits_every_sample_in_another_order() -> None:
    orders = [CounterRNG(0, epoch).permutation(100).tolist() for epoch in range(2)]
    assert sorted(orders[0]) == list(range(100))
    assert orders[0] != orders[1]

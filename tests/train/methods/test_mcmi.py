"""MCMI: cross-entropy first, then outputs are pushed from centroids that a pass over the data gave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.train.methods import Outputs, build
from mexit.train.methods.base import Setup
from mexit.train.methods.cmi import ClassStatistics
from mexit.train.methods.mcmi import MCMI

E, B, C = 3, 20, 5


def logits(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(E, B, C)


LABELS = torch.arange(B) % C


def sweep(seed: int, asked: list[bool] | None = None):
    """A pass over a data set of B images, in two batches."""

    def once(attacked: bool) -> Iterator[tuple[Tensor, Tensor]]:
        if asked is not None:
            asked.append(attacked)
        yield logits(seed)[:, :9], LABELS[:9]
        yield logits(seed)[:, 9:], LABELS[9:]

    return once


def outputs(attack: bool = False) -> Outputs:
    attacked = logits(2).requires_grad_() if attack else None
    return Outputs(LABELS, torch.arange(B), logits(1).requires_grad_(), attacked, CounterRNG(0, 0))


def method(epoch: int = 9, epochs: int = 10, **options: object) -> MCMI:
    """After `begin_epoch` of the epochs up to this one, each of which would find other centroids."""
    mcmi = build("mcmi", E, options)
    assert isinstance(mcmi, MCMI)
    mcmi.setup(Setup(E, C))
    for number in range(epoch + 1):
        mcmi.begin_epoch(number, epochs, sweep(number))
    return mcmi


def centroids(seed: int) -> Tensor:
    return torch.stack([logits(seed).softmax(-1)[:, y == LABELS].mean(dim=1) for y in range(C)], dim=1)


def test_tuning_lasts_its_epochs_and_at_most_half_the_run() -> None:
    def tuned(epochs: int, **options: object) -> list[int]:
        return [epoch for epoch in range(epochs) if "cmi" in method(epoch, epochs, **options).terms(outputs())]

    assert tuned(10, tune_epochs=3) == [7, 8, 9]
    assert tuned(6) == [3, 4, 5]
    assert tuned(5) == [3, 4]
    assert not tuned(4, tune_epochs=0)
    assert not tuned(1)


def test_its_term_by_hand() -> None:
    found = method(weight=0.2, tune_epochs=3).terms(outputs())
    q, p = centroids(7), logits(1).softmax(-1)
    total = torch.zeros(())
    for k in range(E):
        for row in range(B):
            total = total + sum(p[k, row, c] * (p[k, row, c] / q[k, LABELS[row], c]).log() for c in range(C)) / B
    torch.testing.assert_close(found["cmi"], -0.2 * total)
    assert torch.equal(found["clean"], build("clean", E, {}).terms(outputs())["clean"])


def test_centroids_stay_those_of_the_first_tuned_epoch_unless_refreshed() -> None:
    for epoch in (7, 8, 9):
        torch.testing.assert_close(method(epoch, tune_epochs=3).state()["centroids"], centroids(7))
        refreshed = method(epoch, tune_epochs=3, refresh=True).state()["centroids"]
        torch.testing.assert_close(refreshed, centroids(epoch))
    assert not method(6, tune_epochs=3).state()


def test_where_outputs_are_those_of_the_sweep_the_term_is_their_cmi() -> None:
    same = Outputs(LABELS, torch.arange(B), logits(9), None, CounterRNG(0, 0))
    statistics = ClassStatistics(E, C)
    statistics.add(logits(9), LABELS)
    found = method(refresh=True, weight=1.0).terms(same)["cmi"]
    torch.testing.assert_close(-found.double(), statistics.cmi().sum(), atol=1e-5, rtol=0)


def test_one_step_downhill_raises_cmi() -> None:
    batch = outputs()
    method().terms(batch)["cmi"].backward()
    assert batch.clean.grad is not None

    def cmi(values: Tensor) -> Tensor:
        statistics = ClassStatistics(E, C)
        statistics.add(values, LABELS)
        return statistics.cmi()

    assert (cmi(batch.clean.detach() - batch.clean.grad) > cmi(batch.clean.detach())).all()


def test_the_divergence_of_a_sample_counts_up_to_the_cap() -> None:
    """Beyond it a sample has no gradient either."""
    batch = Outputs(LABELS, torch.arange(B), (2 * logits(1)).requires_grad_(), None, CounterRNG(0, 0))
    term = method(cap=0.5, weight=1.0).terms(batch)["cmi"]
    assert -0.5 * E <= float(term.detach()) < 0
    term.backward()
    assert batch.clean.grad is not None
    p, q = batch.clean.detach().softmax(-1), centroids(5)[:, LABELS]
    beyond = (torch.xlogy(p, p) - p * q.log()).sum(-1) > 0.5
    assert beyond.any()
    assert not batch.clean.grad[beyond].any()
    assert batch.clean.grad[~beyond].any()


def test_the_last_exit_alone_and_the_control_of_entropy() -> None:
    batch = outputs()
    method(exits="last").terms(batch)["cmi"].backward()
    assert batch.clean.grad is not None
    assert not batch.clean.grad[:-1].any()
    assert batch.clean.grad[-1].any()
    entropy = torch.stack(
        [torch.distributions.Categorical(logits=one).entropy().mean() for one in logits(1)]
    ).sum()
    found = method(spread="entropy", weight=0.5).terms(outputs())
    torch.testing.assert_close(found["entropy"], -0.5 * entropy)
    assert "cmi" not in found


def test_with_an_attack_centroids_and_divergence_are_of_the_attacked_images() -> None:
    batch, asked = outputs(attack=True), []
    mcmi = build("mcmi", E, {})
    mcmi.setup(Setup(E, C))
    mcmi.begin_epoch(5, 10, sweep(0, asked))
    terms = mcmi.terms(batch)
    assert asked == [True], "of a run without an attack the sweep is clean all the same"
    terms["cmi"].backward()
    assert batch.clean.grad is None
    assert batch.attacked is not None
    assert batch.attacked.grad is not None
    baseline = build("adversarial", E, {}).terms(batch)
    assert all(torch.equal(terms[name], baseline[name]) for name in baseline)


def test_state_before_and_while_tuning() -> None:
    tuned, resumed = method(), method(epoch=0)
    resumed.load(tuned.state())
    assert torch.equal(resumed.terms(outputs())["cmi"], tuned.terms(outputs())["cmi"])


@pytest.mark.parametrize(
    "options", [{"weight": -1.0}, {"cap": 0.0}, {"exits": "first"}, {"spread": "kl"}], ids=str
)
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build("mcmi", E, options)

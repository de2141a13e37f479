"""MCMI: cross-entropy first, then outputs move away from the centroids of one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from method_outputs import make_outputs
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Setup
from mexit.train.methods.cmi import ClassStatistics
from mexit.train.methods.mcmi import MCMI

E, B, C = 3, 20, 5


def logits(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(E, B, C)


LABELS = torch.arange(B) % C


def train_logits(seed: int, passes: list[bool] | None = None):
    """A pass over a data set of B images, in two batches; `passes` collects whether each was attacked."""

    def once(attacked: bool) -> Iterator[tuple[Tensor, Tensor]]:
        if passes is not None:
            passes.append(attacked)
        yield logits(seed)[:, :9], LABELS[:9]
        yield logits(seed)[:, 9:], LABELS[9:]

    return once


def outputs(attack: bool = False) -> Outputs:
    attacked = logits(2)[None].requires_grad_() if attack else None
    return make_outputs(logits(1).requires_grad_(), attacked)


def method(epoch: int = 9, epochs: int = 10, **options: object) -> MCMI:
    """The method after `begin_epoch` of the epochs up to this one; the centroids of every epoch differ."""
    mcmi = build_method("mcmi", options)
    assert isinstance(mcmi, MCMI)
    mcmi.setup(Setup(E, C))
    for number in range(epoch + 1):
        mcmi.begin_epoch(number, epochs, train_logits(number))
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
    terms = method(weight=0.2, tune_epochs=3).terms(outputs())
    q, p = centroids(7), logits(1).softmax(-1)
    total = torch.zeros(())
    for k in range(E):
        for row in range(B):
            total = total + sum(p[k, row, c] * (p[k, row, c] / q[k, LABELS[row], c]).log() for c in range(C)) / B
    torch.testing.assert_close(terms["cmi"], -0.2 * total)
    assert torch.equal(terms["clean"], build_method("clean", {}).terms(outputs())["clean"])


def test_centroids_stay_those_of_the_first_tuned_epoch_unless_refreshed() -> None:
    for epoch in (7, 8, 9):
        torch.testing.assert_close(method(epoch, tune_epochs=3).state_dict()["centroids"], centroids(7))
        refreshed = method(epoch, tune_epochs=3, refresh=True).state_dict()["centroids"]
        torch.testing.assert_close(refreshed, centroids(epoch))
    assert not method(6, tune_epochs=3).state_dict()


def test_on_the_outputs_of_the_pass_the_term_is_their_cmi() -> None:
    same = make_outputs(logits(9))
    statistics = ClassStatistics(E, C)
    statistics.add(logits(9), LABELS)
    term = method(refresh=True, weight=1.0).terms(same)["cmi"]
    torch.testing.assert_close(-term.double(), statistics.cmi().sum(), atol=1e-5, rtol=0)


def test_one_step_downhill_raises_cmi() -> None:
    batch = outputs()
    method().terms(batch)["cmi"].backward()
    assert batch.clean.grad is not None

    def cmi(values: Tensor) -> Tensor:
        statistics = ClassStatistics(E, C)
        statistics.add(values, LABELS)
        return statistics.cmi()

    assert (cmi(batch.clean.detach() - batch.clean.grad) > cmi(batch.clean.detach())).all()


def test_the_kl_of_a_sample_is_capped() -> None:
    """A sample above the cap has no gradient."""
    batch = make_outputs((2 * logits(1)).requires_grad_())
    term = method(cap=0.5, weight=1.0).terms(batch)["cmi"]
    assert -0.5 * E <= float(term.detach()) < 0
    term.backward()
    assert batch.clean.grad is not None
    p, q = batch.clean.detach().softmax(-1), centroids(5)[:, LABELS]
    beyond = (torch.xlogy(p, p) - p * q.log()).sum(-1) > 0.5
    assert beyond.any()
    assert not batch.clean.grad[beyond].any()
    assert batch.clean.grad[~beyond].any()


def test_the_last_exit_alone_and_the_entropy_control() -> None:
    batch = outputs()
    method(exits="last").terms(batch)["cmi"].backward()
    assert batch.clean.grad is not None
    assert not batch.clean.grad[:-1].any()
    assert batch.clean.grad[-1].any()
    entropy = torch.stack([torch.distributions.Categorical(logits=one).entropy().mean() for one in logits(1)]).sum()
    terms = method(spread="entropy", weight=0.5).terms(outputs())
    torch.testing.assert_close(terms["entropy"], -0.5 * entropy)
    assert "cmi" not in terms


def test_with_an_attack_centroids_and_kl_are_of_the_attacked_images() -> None:
    batch, passes = outputs(attack=True), []
    mcmi = build_method("mcmi", {})
    mcmi.setup(Setup(E, C))
    mcmi.begin_epoch(5, 10, train_logits(0, passes))
    terms = mcmi.terms(batch)
    assert passes == [True]
    terms["cmi"].backward()
    assert batch.clean.grad is None
    assert batch.variants is not None
    assert batch.variants.grad is not None
    baseline = build_method("adversarial", {}).terms(batch)
    assert all(torch.equal(terms[name], baseline[name]) for name in baseline)


def test_a_resumed_method_has_the_centroids() -> None:
    tuned, resumed = method(), method(epoch=0)
    resumed.load_state_dict(tuned.state_dict())
    assert torch.equal(resumed.terms(outputs())["cmi"], tuned.terms(outputs())["cmi"])


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"cap": 0.0}, {"exits": "first"}, {"spread": "kl"}], ids=str)
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build_method("mcmi", options)

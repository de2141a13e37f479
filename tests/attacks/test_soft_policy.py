"""The torch twin of scores and decision: equal to core on any logits, with the gradients that core hides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy, decide, score_exits
from mexit.core.policy import Policy, first_exit
from mexit.core.scores import MEASURES
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import build_model, model_spec

torch.set_num_threads(1)
EXITS, CLASSES = 3, 5
TEMPERATURES = (1.0, 0.5, 2.5)
each_measure = pytest.mark.parametrize("measure", MEASURES)
alone_or_together = pytest.mark.parametrize("ensemble", [False, True], ids=["each exit alone", "ensemble"])


# At which some of the random rows leave at every exit.
THRESHOLDS = {"max-probability": 4.0, "margin": 4.0, "entropy": -0.1, "agreement": 1.96}


def policy(measure: str = "max-probability", ensemble: bool = False, *, closed: tuple[int, ...] = ()) -> Policy:
    """With the same threshold at every gate but those of the exits in `closed`."""
    thresholds = tuple(None if k in closed else THRESHOLDS[measure] for k in range(1, EXITS))
    return Policy(measure, ensemble, TEMPERATURES, thresholds)


def logits(kind: str) -> np.ndarray:
    """(E, 200, C) of one kind."""
    rng = np.random.default_rng(0)
    found = rng.normal(0, 4, (EXITS, 200, CLASSES)).astype(np.float32)
    if kind == "extreme":
        found *= 10.0 ** rng.integers(-30, 30, (1, 200, 1))
        found[:, ::7] = 0
        found[:, ::11, 2] = -np.inf
    if kind == "NaN":
        found[0, ::3, 1] = np.nan
        found[1, ::4] = np.nan
        found[2, ::5, 0] = np.inf
    return found


@each_measure
@alone_or_together
@pytest.mark.parametrize("kind", ["random", "extreme", "NaN"])
def test_scores_answers_and_decisions_equal_those_of_core(measure, ensemble, kind) -> None:
    values, gates = logits(kind), policy(measure, ensemble)
    judged = score_exits(gates, torch.from_numpy(values))
    scorer, state = gates.scorer(CLASSES), gates.scorer(CLASSES).start(200)
    for k in range(1, EXITS + 1):
        state, probabilities, scores = scorer.step(k, values[k - 1], state)
        np.testing.assert_allclose(judged.scores[k - 1].numpy(), scores, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(judged.log_answers[k - 1].exp().numpy(), probabilities, rtol=1e-9, atol=1e-300)
    found, taken = decide(gates, values), first_exit(scorer.score(values), gates.thresholds)
    np.testing.assert_array_equal(found.exits, taken)
    if kind != "random":
        return
    assert set(taken) == {1, 2, 3}, "not every exit is taken: the decision is not tested"
    answers = judged.log_answers[torch.from_numpy(taken) - 1, torch.arange(200)].argmax(dim=1)
    np.testing.assert_array_equal(found.classes, answers.numpy())


def test_an_answer_that_is_nan_is_no_class() -> None:
    values = logits("random")[:, :2].copy()
    values[:, 0] = np.nan
    found = decide(policy(), values)
    assert found.exits[0] == 3
    assert found.classes[0] == -1
    assert found.classes[1] >= 0


@each_measure
@pytest.mark.parametrize("closed", [(), (1,), (2,), (1, 2)])
def test_shares_are_a_distribution_that_becomes_the_decision_as_it_cools(measure, closed) -> None:
    values = torch.from_numpy(logits("random"))
    gates = SoftPolicy.fit(policy(measure, closed=closed), values)
    scores = score_exits(gates.policy, values).scores
    for temperature in (1.0, 1e-6):
        shares = gates.log_shares(scores, temperature).exp()
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(200, dtype=torch.float64))
    assert all(shares[k - 1].max() == 0 for k in closed), "leaves where it never may"
    taken = torch.from_numpy(decide(gates.policy, values.numpy()).exits) - 1
    assert (shares.argmax(dim=0) == taken).all()
    assert shares.max(dim=0).values.min() > 0.999


def test_spread_measures_leads_in_standard_deviations() -> None:
    values = torch.from_numpy(logits("random"))
    gates = SoftPolicy.fit(policy(), values)
    scores = score_exits(gates.policy, values).scores
    leads = gates.leads(scores)
    torch.testing.assert_close(leads.std(dim=1), torch.ones(2, dtype=torch.float64))
    assert ((leads > 0) == (scores[:2] > 4.0)).all()


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "agreement"])
@alone_or_together
def test_gradient_of_the_mixture_is_that_of_finite_differences(measure, ensemble) -> None:
    values = torch.from_numpy(logits("random")[:, :4]).double().requires_grad_()
    gates = SoftPolicy(policy(measure, ensemble), (0.8, 1.3))
    assert torch.autograd.gradcheck(lambda moving: gates.mixture(score_exits(gates.policy, moving), 0.7), values)


def test_agreement_counts_forward_and_still_has_a_gradient() -> None:
    values = torch.zeros(EXITS, 1, CLASSES)
    values[:, 0, 1] = 2.0
    values.requires_grad_()
    scores = score_exits(policy("agreement"), values).scores
    assert [int(score) for score in scores[:, 0]] == [1, 2, 3]
    (gradient,) = torch.autograd.grad(scores[2].sum(), values)
    assert gradient[1, 0, 1] > 0, "the class that the exits agree on does not raise the count"
    assert gradient[1, 0, 0] < 0


@pytest.fixture(scope="module")
def network() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    data = digits.load()
    index = splits.split(data).part("selection")[:64]
    return build_model("digits-cnn", 10).eval(), torch.from_numpy(
        data.batch(index, model_spec("digits-cnn").input)
    )


def on_images(model, images, share: float) -> SoftPolicy:
    """A policy under which about that share leaves at the first gate, and of the rest at the second."""
    with torch.no_grad():
        values = model(images)
    scores = score_exits(policy(), values).scores
    thresholds = tuple(float(row.quantile(1 - share)) - 1e-6 for row in scores[:2])
    return SoftPolicy.fit(replace(policy(), thresholds=thresholds), values)


def test_the_deployed_policy_answers_as_core_decides(network) -> None:
    model, images = network
    gates = on_images(model, images, 0.4)
    with torch.no_grad():
        found = decide(gates.policy, model(images).numpy())
    assert set(found.exits) == {1, 2, 3}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            answers = DeployedPolicy(model, gates)(images)
        assert answers.dtype == torch.float32
        np.testing.assert_array_equal(answers.detach().argmax(dim=1).numpy(), found.classes)
        torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(len(images)))


def test_gradients_of_exits_behind_a_closed_door_are_not_hidden(network) -> None:
    model, images = network
    gates = on_images(model, images, 1.0)  # everybody leaves at exit 1
    assert set(decide(gates.policy, model(images).detach().numpy()).exits) == {1}
    weight = next(model.stages[2].parameters())
    (gradient,) = torch.autograd.grad(DeployedPolicy(model, gates)(images).amax(dim=1).sum(), weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_impossible_temperatures_are_refused(network, temperature) -> None:
    model, images = network
    with pytest.raises(UsageError, match="temperature"):
        DeployedPolicy(model, on_images(model, images, 0.5), temperature)

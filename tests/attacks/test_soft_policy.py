"""The softened policy: decisions equal those of core, and the gradient of every exit is visible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from exit_logits import CLASSES, example_logits, example_policy
from torch import Tensor

from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy, decide
from mexit.core.exit_policy import first_exit
from mexit.core.scores import MEASURES
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import build_model, model_spec
from mexit.models.scores_torch import score_exits

torch.set_num_threads(1)
each_measure = pytest.mark.parametrize("measure", MEASURES)
alone_or_ensemble = pytest.mark.parametrize("ensemble", [False, True], ids=["each exit alone", "ensemble"])


@each_measure
@alone_or_ensemble
@pytest.mark.parametrize("kind", ["random", "extreme", "NaN"])
def test_decisions_equal_those_of_core(measure, ensemble, kind) -> None:
    logits, policy = example_logits(kind), example_policy(measure, ensemble)
    decision, exits = decide(policy, logits), first_exit(policy.scorer(CLASSES).score(logits), policy.thresholds)
    np.testing.assert_array_equal(decision.exits, exits)
    if kind != "random":
        return
    assert set(exits) == {1, 2, 3}, "not every exit is taken: the decision is not tested"
    log_probabilities = score_exits(policy, torch.from_numpy(logits)).log_probabilities
    classes = log_probabilities[torch.from_numpy(exits) - 1, torch.arange(200)].argmax(dim=1)
    np.testing.assert_array_equal(decision.classes, classes.numpy())


def test_nan_logits_give_no_class() -> None:
    logits = example_logits("random")[:, :2].copy()
    logits[:, 0] = np.nan
    decision = decide(example_policy(), logits)
    assert decision.exits[0] == 3
    assert decision.classes[0] == -1
    assert decision.classes[1] >= 0


@each_measure
@pytest.mark.parametrize("closed", [(), (1,), (2,), (1, 2)])
def test_weights_are_a_distribution_and_become_the_decision_as_the_temperature_falls(measure, closed) -> None:
    logits = torch.from_numpy(example_logits("random"))
    policy = SoftPolicy.fit(example_policy(measure, closed=closed), logits)
    scores = score_exits(policy.policy, logits).scores
    for temperature in (1.0, 1e-6):
        weights = policy.log_weights(scores, temperature).exp()
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(200, dtype=torch.float64))
    assert all(weights[k - 1].max() == 0 for k in closed), "an exit without a threshold has weight"
    exits = torch.from_numpy(decide(policy.policy, logits.numpy()).exits) - 1
    assert (weights.argmax(dim=0) == exits).all()
    assert weights.max(dim=0).values.min() > 0.999


def test_margins_to_thresholds_are_in_standard_deviations() -> None:
    logits = torch.from_numpy(example_logits("random"))
    policy = SoftPolicy.fit(example_policy(), logits)
    scores = score_exits(policy.policy, logits).scores
    margins = policy.margins_to_threshold(scores)
    torch.testing.assert_close(margins.std(dim=1), torch.ones(2, dtype=torch.float64))
    assert ((margins > 0) == (scores[:2] > 4.0)).all()


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "agreement"])
@alone_or_ensemble
def test_the_gradient_of_the_mixture_is_that_of_finite_differences(measure, ensemble) -> None:
    logits = torch.from_numpy(example_logits("random")[:, :4]).double().requires_grad_()
    policy = SoftPolicy(example_policy(measure, ensemble), (0.8, 1.3))

    def mixture(values: Tensor) -> Tensor:
        return policy.mixture(score_exits(policy.policy, values), 0.7)

    assert torch.autograd.gradcheck(mixture, logits)


@pytest.fixture(scope="module")
def network() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    data = digits.load()
    index = splits.split(data).part("selection")[:64]
    images = data.batch(index, model_spec("digits-cnn").input)
    return build_model("digits-cnn", 10).eval(), torch.from_numpy(images)


def fitted_policy(model, images, share: float) -> SoftPolicy:
    """A policy under which about this share leaves at exit 1, and the same share of the rest at exit 2."""
    with torch.no_grad():
        logits = model(images)
    scores = score_exits(example_policy(), logits).scores
    thresholds = tuple(float(row.quantile(1 - share)) - 1e-6 for row in scores[:2])
    return SoftPolicy.fit(replace(example_policy(), thresholds=thresholds), logits)


def test_the_deployed_policy_answers_as_core_decides(network) -> None:
    model, images = network
    policy = fitted_policy(model, images, 0.4)
    with torch.no_grad():
        decision = decide(policy.policy, model(images).numpy())
    assert set(decision.exits) == {1, 2, 3}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            log_probabilities = DeployedPolicy(model, policy)(images)
        assert log_probabilities.dtype == torch.float32
        np.testing.assert_array_equal(log_probabilities.detach().argmax(dim=1).numpy(), decision.classes)
        torch.testing.assert_close(log_probabilities.exp().sum(dim=1), torch.ones(len(images)))


def test_exits_that_are_never_reached_still_have_gradients(network) -> None:
    model, images = network
    policy = fitted_policy(model, images, 1.0)
    assert set(decide(policy.policy, model(images).detach().numpy()).exits) == {1}
    weight = next(model.stages[2].parameters())
    (gradient,) = torch.autograd.grad(DeployedPolicy(model, policy)(images).amax(dim=1).sum(), weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_impossible_temperatures_are_refused(network, temperature) -> None:
    model, images = network
    with pytest.raises(UsageError, match="temperature"):
        DeployedPolicy(model, fitted_policy(model, images, 0.5), temperature)

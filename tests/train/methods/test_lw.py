"""LW: the penalty is the squared norm of the exit classifiers, and of no other layer."""

from __future__ import annotations

import pytest
import torch
from method_outputs import make_outputs
from torch import Tensor, nn

from mexit.errors import MexitError, UsageError
from mexit.models import MODELS, MultiExit, Stage, build_model
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Setup, TrainingMethod
from mexit.train.methods.lw import classifiers

E, B, C = 3, 6, 10


@pytest.fixture
def model() -> MultiExit:
    torch.manual_seed(0)
    return build_model("digits-cnn", C)


@pytest.fixture
def outputs() -> Outputs:
    torch.manual_seed(1)
    clean, attacked = torch.randn(2, E, B, C)
    return make_outputs(clean, attacked)


def method(model: MultiExit, **options: float) -> TrainingMethod:
    lw = build_method("lw", options)
    lw.setup(Setup(E, C, model=model))
    return lw


def by_hand(model: MultiExit) -> Tensor:
    """Squared entries of heads.*.4, the layer behind the hidden one, summed one by one."""
    total = torch.zeros(())
    for k in range(E):
        for entry in model.get_parameter(f"stages.{k}.head.4.weight").detach().flatten():
            total = total + entry * entry
    return total


def test_the_penalty_by_hand(model, outputs) -> None:
    terms = method(model, weight=0.3).terms(outputs)
    torch.testing.assert_close(terms["classifiers"], 0.3 * by_hand(model))
    baseline = build_method("adversarial", {}).terms(outputs)
    assert terms.keys() == baseline.keys() | {"classifiers"}
    assert all(torch.equal(terms[name], baseline[name]) for name in baseline)


def test_its_gradient_reaches_the_classifiers_alone(model, outputs) -> None:
    method(model, weight=0.3).terms(outputs)["classifiers"].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {f"stages.{k}.head.4.weight" for k in range(E)}
    weight = model.get_parameter("stages.2.head.4.weight")
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * 0.3 * weight.detach())


def test_the_log_shows_the_current_norm_of_every_classifier(model) -> None:
    lw = method(model)
    with torch.no_grad():
        for k in range(E):
            model.get_parameter(f"stages.{k}.head.4.weight").fill_((k + 1) / 10)
    assert lw.report() == {"classifier norm": pytest.approx([(k + 1) / 10 * 640**0.5 for k in range(E)], abs=1e-5)}


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_one_classifier_per_exit(name) -> None:
    model = build_model(name, 7)
    assert [layer.out_features for layer in classifiers(model)] == [7] * model.exits


def test_a_head_without_a_linear_layer_is_named() -> None:
    linear, convolution = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
        nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()),
    )
    model = MultiExit([Stage(nn.Identity(), linear), Stage(nn.Identity(), convolution)], (1, 8, 8), 2)
    with pytest.raises(UsageError, match="exit 2 has none"):
        method(model)


def test_without_a_network_or_with_a_negative_weight_it_is_refused() -> None:
    with pytest.raises(MexitError, match="needs the trained network"):
        build_method("lw", {}).setup(Setup(E, C))
    with pytest.raises(UsageError, match="at least 0"):
        build_method("lw", {"weight": -1.0})

"""The squared error is a proper score with the known gradient, and its share grows after the warm-up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from method_outputs import make_outputs
from torch import Tensor

from mexit.errors import UsageError
from mexit.train.config import resolve
from mexit.train.methods import Outputs, TrainingMethod, build_method
from mexit.train.methods.base import StepInfo
from mexit.train.methods.mse import squared_error

E, B, C = 3, 8, 10


@pytest.fixture
def outputs() -> Outputs:
    torch.manual_seed(0)
    clean, attacked = torch.randn(2, E, B, C)
    return make_outputs(clean, attacked, step=StepInfo(progress=0.9))


def method(**options: object) -> TrainingMethod:
    """The method with a share of the squared error that is final at half of the run."""
    return build_method("mse", {"ramp": 0.4} | options)


def ce(outputs: Outputs, logits: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(exit_logits, outputs.labels) for exit_logits in logits]).sum()


def brier(outputs: Outputs, logits: Tensor) -> Tensor:
    """C/2 times the sum over classes of squared differences, mean over samples, sum over exits, one by one."""
    total = torch.zeros(())
    for exit_logits in logits:
        for row, label in enumerate(outputs.labels.tolist()):
            for c, p in enumerate(exit_logits[row].softmax(-1)):
                total = total + C / 2 * (p - float(c == label)) ** 2 / B
    return total


def test_by_hand(outputs) -> None:
    clean = dataclasses.replace(outputs, variants=None)
    terms = method(mu=0.3).terms(clean)
    assert terms.keys() == {"clean", "clean mse"}
    torch.testing.assert_close(terms["clean"], 0.7 * ce(outputs, outputs.clean))
    torch.testing.assert_close(terms["clean mse"], 0.3 * brier(outputs, outputs.clean))


def test_attacked_images_have_their_own_share(outputs) -> None:
    terms = method(attacked_mu=0.25, attacked_weight=2.0, clean_weight=0.5).terms(outputs)
    torch.testing.assert_close(terms["clean mse"], 0.5 * brier(outputs, outputs.clean))
    assert not terms["clean"].any()
    torch.testing.assert_close(terms["attacked"], 2.0 * 0.75 * ce(outputs, outputs.attacked))
    torch.testing.assert_close(terms["attacked mse"], 2.0 * 0.25 * brier(outputs, outputs.attacked))


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.0), (0.19, 0.0), (0.2, 0.0), (0.3, 0.25), (0.4, 0.5), (0.6, 1.0), (0.99, 1.0)]
)
def test_the_share_of_the_squared_error_grows_linearly_after_the_warm_up(outputs, progress, share) -> None:
    terms = method(warm_up=0.2, ramp=0.5).terms(dataclasses.replace(outputs, step=StepInfo(progress=progress)))
    torch.testing.assert_close(terms["clean"], (1 - share) * ce(outputs, outputs.clean))
    torch.testing.assert_close(terms["clean mse"], share * brier(outputs, outputs.clean))
    torch.testing.assert_close(terms["attacked mse"], 0.5 * share * brier(outputs, outputs.attacked))


def test_by_default_the_share_grows_until_the_end_of_the_run(outputs) -> None:
    last = build_method("mse", {}).terms(dataclasses.replace(outputs, step=StepInfo(progress=0.99)))
    torch.testing.assert_close(last["clean"], (1 - 0.89 / 0.9) * ce(outputs, outputs.clean))


def test_without_a_ramp_the_squared_error_replaces_cross_entropy_at_once(outputs) -> None:
    before, after = (
        method(warm_up=0.2, ramp=0.0).terms(dataclasses.replace(outputs, step=StepInfo(progress=progress)))
        for progress in (0.19, 0.2)
    )
    assert not before["clean mse"].any()
    assert not after["clean"].any()


def test_its_expectation_is_smallest_at_the_class_probabilities() -> None:
    """E_y || q - e_y ||^2 = || q - p ||^2 + 1 - || p ||^2 for labels y drawn from p."""
    torch.manual_seed(1)
    logits, truth = torch.randn(1, 1, C, dtype=torch.float64), torch.randn(C, dtype=torch.float64).softmax(-1)
    every_label = torch.cat([squared_error(logits, torch.tensor([y])) for y in range(C)])
    q = logits.softmax(-1)[0, 0]
    expected = (q - truth).square().sum() + 1 - truth.square().sum()
    torch.testing.assert_close((truth * every_label).sum() * 2 / C, expected)


def test_its_gradient_is_the_known_one() -> None:
    """C/2 times 2 p_k [ (p_k - e_k) - sum_j p_j (p_j - e_j) ]."""
    torch.manual_seed(2)
    logits = torch.randn(1, 1, C, dtype=torch.float64, requires_grad=True)
    squared_error(logits, torch.tensor([3])).sum().backward()
    p = logits.detach().softmax(-1)[0, 0]
    gap = p - F.one_hot(torch.tensor(3), C)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], C * p * (gap - (p * gap).sum()))


@pytest.mark.parametrize("classes", [10, 100])
def test_at_a_uniform_output_its_gradient_is_that_of_cross_entropy(classes) -> None:
    labels = torch.tensor([2])

    def gradient(on: str | None) -> Tensor:
        logits = torch.zeros(1, 1, classes, requires_grad=True)
        loss = F.cross_entropy(logits[0], labels) if on is None else squared_error(logits, labels, on).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        return gradient[0, 0]

    torch.testing.assert_close(gradient("probs"), gradient(None))
    torch.testing.assert_close(gradient("logits"), -F.one_hot(labels[0], classes).float())


def test_smoothed_labels_move_its_minimum(outputs) -> None:
    """At the smoothed label itself the error is zero."""
    target = 0.9 * F.one_hot(outputs.labels, C).float() + 0.1 / C
    smooth = make_outputs(target.log().expand(E, B, C), step=StepInfo(progress=0.9, label_smoothing=0.1))
    assert method().terms(smooth)["clean mse"] < 1e-10
    assert method().terms(dataclasses.replace(smooth, step=outputs.step))["clean mse"] > 0.01


def test_clean_unless_an_attack_is_named() -> None:
    assert resolve("digits", None, {"method": "mse"}).attack == "none"
    assert resolve("digits", None, {"method": "mse", "attack": "average"}).attack == "average"


@pytest.mark.parametrize("options", [{"mu": 1.5}, {"on": "features"}, {"warm_up": 1.0}, {"ramp": -0.1}], ids=str)
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build_method("mse", options)

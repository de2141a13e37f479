"""TRADES, adversarial weight perturbation, weight averaging and label smoothing."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_outputs import make_outputs
from safetensors.torch import load_file
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.rng import CounterRNG
from mexit.data import digits
from mexit.data.splits import split
from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint
from mexit.train.checkpoint import read_log
from mexit.train.config import TrainSettings, resolve
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Adaptation, Batch, Setup, StepInfo
from mexit.train.regularizers import EMA, perturbed_weights, trades_term
from mexit.train.train_step import TrainStep

E, B, C = 3, 24, 10
TINY = {"epochs": 2, "fraction": 0.1, "batch": 16, "steps": 2, "step": 0.05, "precision": "fp32"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and no plots."""
    torch.set_num_threads(1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def model() -> MultiExit:
    torch.manual_seed(0)
    return build_model("digits-cnn", C)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, positions."""
    data = digits.load()
    index = split(data).part("selection")[:B]
    pictures = torch.from_numpy(data.batch(index, model_spec("digits-cnn").input))
    return pictures, torch.from_numpy(data.labels[index]), torch.from_numpy(index)


def outputs(seed: int = 0) -> Outputs:
    torch.manual_seed(seed)
    clean, attacked = torch.randn(2, E, B, C)
    return make_outputs(clean.requires_grad_(), attacked[None].requires_grad_())


def take_step(model: MultiExit, images: tuple[Tensor, Tensor, Tensor], settings: TrainSettings) -> dict[str, float]:
    """Run one step of plain gradient descent with the regularizers of the settings; its metrics."""
    method = build_method(settings.method, settings.options)
    method.setup(Setup(model.exits, C, model=model))
    optimiser = torch.optim.SGD(model.parameters(), lr=settings.lr)
    batch = Batch(model, *images, settings.training_attack(), CounterRNG(0, 0))
    adaptation = Adaptation(model, settings.lr, lambda: images[:2], nullcontext)
    step = StepInfo(label_smoothing=settings.label_smoothing)
    return TrainStep(model, method, optimiser, settings).run(batch, adaptation, step).read()


def test_trades_by_hand() -> None:
    batch = outputs()
    total = torch.zeros(())
    assert batch.attacked is not None
    for k in range(E):
        for row in range(B):
            p, q = batch.clean[k, row].softmax(-1), batch.attacked[k, row].softmax(-1)
            total = total + (p * (p / q).log()).sum() / B
    torch.testing.assert_close(trades_term(batch), total)


def test_trades_is_zero_without_a_change_of_logits() -> None:
    batch = outputs()
    same = make_outputs(batch.clean, batch.clean)
    assert abs(float(trades_term(same).detach())) < 1e-6


def test_trades_has_gradients_on_both_sides() -> None:
    batch = outputs()
    trades_term(batch).backward()
    for logits in (batch.clean, batch.variants):
        assert logits is not None
        assert logits.grad is not None
        assert logits.grad.reshape(E, -1).abs().sum(dim=1).all()


def test_the_trades_term_is_added_with_its_weight(images) -> None:
    def metrics(weight: float) -> dict[str, float]:
        torch.manual_seed(0)
        given = {"method": "adversarial", "steps": 2, "step": 0.05, "trades": weight}
        return take_step(build_model("digits-cnn", C), images, resolve("digits", None, given))

    heavy, light = metrics(6.0), metrics(2.0)
    assert heavy["loss"] == pytest.approx(sum(heavy[f"loss {name}"] for name in ("clean", "attacked", "trades")))
    assert heavy["loss trades"] == pytest.approx(3 * light["loss trades"])
    assert light["loss trades"] > 0


def test_trades_without_an_attack_is_refused() -> None:
    with pytest.raises(UsageError, match="--attack average"):
        resolve("digits", None, {"method": "clean", "trades": 6.0})


def loss_of(model: MultiExit, images: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return exit_cross_entropy(model(images[0]), images[1]).mean()


def test_perturbed_weights_raise_the_loss_and_are_restored_to_the_bit(model, images) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)  # a bias of 0 would not change in any case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = float(loss_of(model, images).detach())
    with perturbed_weights(model, 0.01, lambda: loss_of(model, images)):
        assert float(loss_of(model, images).detach()) > plain + 0.01
        for name, parameter in model.named_parameters():
            moved = (parameter.detach() - before[name]).norm() / before[name].norm().clamp_min(1e-12)
            assert float(moved) == pytest.approx(0.01 if parameter.ndim > 1 else 0, abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_perturbed_weights_are_restored_after_an_error(model, images) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), perturbed_weights(model, 0.01, lambda: loss_of(model, images)):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_awp_applies_the_gradient_at_the_perturbed_weights_to_the_original_ones(model, images) -> None:
    settings = TrainSettings(method="clean", attack="none", awp=0.01, lr=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def loss() -> Tensor:
        return build_method("clean", {}).terms(make_outputs(model(images[0]), labels=images[1]))["clean"]

    with perturbed_weights(model, 0.01, loss):
        perturbed = torch.autograd.grad(loss(), list(model.parameters()))
    original = torch.autograd.grad(loss(), list(model.parameters()))
    take_step(model, images, settings)
    assert not all(torch.allclose(a, b) for a, b in zip(perturbed, original, strict=True))
    for (name, parameter), gradient in zip(model.named_parameters(), perturbed, strict=True):
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * gradient)


def test_an_average_is_its_closed_form() -> None:
    """sum_t (1 - d_t) w_t prod_{s>t} d_s, d_t = min(decay, (1 + t) / (10 + t)), with all of the first weights."""
    values = [torch.tensor([float(t), -2.0 * t]) for t in range(1, 9)]
    average = EMA(0.45)
    for step, value in enumerate(values):
        average.update({"w": value, "count": torch.tensor(step)}, step)
    keeps = [min(0.45, (1 + step) / (10 + step)) for step in range(len(values))]
    assert 0.45 in keeps
    expected = values[0] * np.prod(keeps[1:])
    for t in range(1, len(values)):
        expected = expected + (1 - keeps[t]) * values[t] * np.prod(keeps[t + 1 :])
    torch.testing.assert_close(average.weights["w"], expected.float())
    assert int(average.weights["count"]) == len(values) - 1, "counts are copied, not averaged"


def test_an_average_is_a_copy_of_its_weights() -> None:
    weights, average = {"w": torch.ones(3)}, EMA(0.9)
    average.update(weights, 0)
    weights["w"].zero_()
    assert torch.equal(average.weights["w"], torch.ones(3))


def test_with_ema_the_averaged_weights_are_the_result(tmp_path) -> None:
    run = train_model(
        settings=TINY | {"method": "clean", "ema": 0.9}, out=tmp_path / "x", options=TrainOptions(threads=1)
    ).run
    kept = load_file(run / checkpoint.WEIGHTS)
    everything = load_file(run / checkpoint.CHECKPOINT)
    assert all(torch.equal(value, everything[f"average.{name}"]) for name, value in kept.items())
    assert not all(torch.equal(value, everything[f"model.{name}"]) for name, value in kept.items())


def test_smoothed_labels_by_hand() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(E, B, C), torch.arange(B) % C
    target = 0.8 * F.one_hot(labels, C) + 0.2 / C
    expected = -(target * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(exit_cross_entropy(logits, labels, 0.2), expected)
    batch = make_outputs(logits, labels=labels, step=StepInfo(label_smoothing=0.2))
    torch.testing.assert_close(batch.cross_entropy(logits), expected.mean(dim=1))


def test_label_smoothing_applies_to_the_loss_and_not_to_the_attack(model, images) -> None:
    def metrics(smoothing: float) -> dict[str, float]:
        torch.manual_seed(0)
        given = {"method": "adversarial", "steps": 2, "step": 0.05, "label_smoothing": smoothing}
        return take_step(build_model("digits-cnn", C), images, resolve("digits", None, given))

    with torch.no_grad():
        logits = model(images[0])
    smooth = exit_cross_entropy(logits, images[1], 0.3).mean(dim=1).sum()
    assert metrics(0.3)["loss clean"] == pytest.approx(float(smooth), rel=1e-5)
    assert metrics(0.3)["loss clean"] != pytest.approx(metrics(0.0)["loss clean"], rel=1e-3)
    assert metrics(0.3)["attacked accuracy"] == metrics(0.0)["attacked accuracy"]


@pytest.mark.parametrize("stop", [7, 12, 17])
def test_a_run_with_all_regularizers_is_resumed_to_the_bit(stop, together, tmp_path) -> None:
    """An epoch has 12 steps: stop within it, at its last step, and within the next epoch."""
    asked = iter(range(1, 1_000))
    given = TINY | EVERYTHING
    assert not train_model(
        settings=given,
        out=tmp_path / "x",
        options=TrainOptions(threads=1, should_stop=lambda: next(asked) == stop),
    ).finished
    assert train_model(out=tmp_path / "x", resume=True, options=TrainOptions(threads=1)).finished
    whole, resumed = load_file(together / checkpoint.WEIGHTS), load_file(tmp_path / "x" / checkpoint.WEIGHTS)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert read_log(tmp_path / "x") == read_log(together)


EVERYTHING = {
    "method": "skd",
    "options": {"max_confidence": 0.12},  # so that T grows while the network is uncertain
    "trades": 2.0,
    "awp": 0.005,
    "ema": 0.9,
    "label_smoothing": 0.1,
    "fraction": 0.2,
    "lr": 0.01,
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with SKD, TRADES, AWP, averaged weights and label smoothing."""
    run = tmp_path_factory.mktemp("together") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        patch.setitem(sys.modules, "matplotlib", None)
        train_model(settings=TINY | EVERYTHING, out=run, options=TrainOptions(threads=1))
    assert read_log(run)[-1]["temperature"][0] > 1, "the method has state to resume"
    return run

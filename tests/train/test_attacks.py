"""Properties of the gradient loop and its objectives, on a small network with real images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.train.attacks.gradient import Steps, ascend
from mexit.train.attacks.objective import OBJECTIVES, Attack, craft, craft_each_exit, exit_losses, keep_worst
from mexit.train.models import MultiExit, build, preset
from mexit.train.randomness import Draw

EPS = 0.1


@pytest.fixture(scope="module")
def model() -> MultiExit:
    torch.manual_seed(0)
    return build("digits-cnn", 10)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, places."""
    data = digits.load()
    index = splits.split(data).part("selection")[:48]
    images = data.batch(index, preset("digits-cnn").input)
    return torch.from_numpy(images), torch.from_numpy(data.labels[index]), torch.from_numpy(index)


def _craft(model: MultiExit, batch: tuple[Tensor, Tensor, Tensor], attack: Attack, seed: int = 0) -> Tensor:
    images, labels, index = batch
    return craft(model, images, labels, attack, draw=Draw(seed, 0), index=index)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("random_start", [True, False])
def test_attack_stays_in_the_ball_and_in_the_pixel_range(model, batch, objective, random_start) -> None:
    attacked = _craft(model, batch, Attack(objective, Steps(EPS, EPS / 2, 5, random_start)))
    assert (attacked - batch[0]).abs().max() <= EPS + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - batch[0]).abs().max() > EPS / 2


@pytest.mark.parametrize("objective", ["single", "average"])
def test_attack_raises_the_loss_it_climbs_and_more_steps_raise_it_more(model, batch, objective) -> None:
    def loss(images: Tensor) -> float:
        with torch.no_grad():
            losses = exit_losses(model(images), batch[1])
        return float(losses[-1].mean() if objective == "single" else losses.mean())

    one = _craft(model, batch, Attack(objective, Steps(EPS, EPS / 4, 1)))
    ten = _craft(model, batch, Attack(objective, Steps(EPS, EPS / 4, 10)))
    assert loss(batch[0]) < loss(one) < loss(ten)


def test_attack_beats_random_noise(model, batch) -> None:
    images, labels, index = batch
    noise = (images + (2 * Draw(0, 0).uniform("noise", index, images.shape[1:]) - 1) * EPS).clamp(0, 1)
    attacked = _craft(model, batch, Attack("average", Steps(EPS, EPS / 4, 10)))
    with torch.no_grad():
        assert exit_losses(model(attacked), labels).mean() > exit_losses(model(noise), labels).mean() + 0.1


def test_fgsm_is_one_full_step_without_a_random_start(model, batch) -> None:
    images, labels, _ = batch
    attacked = _craft(model, batch, Attack("average", Steps(EPS, EPS, 1, random_start=False)))
    moving = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exit_losses(model.eval()(moving), labels).mean(dim=0).sum(), moving)
    torch.testing.assert_close(attacked, (images + EPS * gradient.sign()).clamp(0, 1))


def test_max_average_keeps_for_each_sample_the_worst_of_the_single_attacks(model, batch) -> None:
    images, labels, index = batch
    steps = Steps(EPS, EPS / 4, 4)
    chosen = _craft(model, batch, Attack("max-average", steps))
    candidates = craft_each_exit(model, images, labels, Attack("single", steps), draw=Draw(0, 0), index=index)
    with torch.no_grad():
        losses = torch.stack([exit_losses(model(one), labels).mean(dim=0) for one in candidates])
        best = exit_losses(model(chosen), labels).mean(dim=0)
    torch.testing.assert_close(best, losses.max(dim=0).values)
    torch.testing.assert_close(chosen, keep_worst(model, candidates, labels))
    assert len(losses.argmax(dim=0).unique()) > 1, "one exit is always the worst: the choice is not tested"


def test_single_attack_on_an_early_exit_runs_no_later_layer(model, batch) -> None:
    ran = []
    hook = model.stages[1].register_forward_hook(lambda *_: ran.append(2))
    _craft(model, batch, Attack("single", Steps(EPS, EPS, 2), exit=1))
    hook.remove()
    assert not ran


def test_attack_leaves_the_network_as_it_was(model, batch) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _craft(model, batch, Attack("max-average", Steps(EPS, EPS / 2, 2)))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_start_depends_on_the_sample_and_not_on_its_batch(model, batch) -> None:
    attack = Attack("average", Steps(EPS, EPS / 4, 3))
    whole = _craft(model, batch, attack)
    half = _craft(model, tuple(part[10:20] for part in batch), attack)
    torch.testing.assert_close(whole[10:20], half, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, _craft(model, batch, attack, seed=1))


@pytest.mark.parametrize(
    ("eps", "size", "count"),
    [(8, 0.1, 5), (0, 0.1, 5), (0.1, 0, 5), (0.1, 0.1, 0)],
    ids=["eps 8", "eps 0", "step 0", "none"],
)
def test_impossible_steps_are_refused(eps, size, count) -> None:
    with pytest.raises(UsageError, match="8/255"):
        Steps(eps, size, count)


def test_gradient_loop_finds_the_corner_of_a_linear_function() -> None:
    images = torch.full((2, 1, 2, 2), 0.5)
    slope = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    attacked = ascend(
        images, Steps(0.25, 0.1, 5), lambda moving: (moving * slope).sum(), torch.full_like(images, 0.5)
    )
    torch.testing.assert_close(attacked, images + 0.25 * slope.sign())

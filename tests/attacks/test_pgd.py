"""PGD and the attacks on several exits, on a small network with real images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy, sample_loss
from mexit.attacks.pgd import (
    NORMS,
    RULES,
    TARGET_EXITS,
    Attack,
    PGDConfig,
    craft,
    craft_each_exit,
    keep_worst,
    pgd,
    random_noise,
    random_start,
    start_noise,
)
from mexit.attacks.rng import CounterRNG
from mexit.errors import UsageError
from mexit.models import MultiExit

EPS = 0.1
FGSM = PGDConfig(EPS, EPS, 1, random_start=False)
FGSM_L2 = PGDConfig(0.5, 0.5, 1, random_start=False, norm="l2")
THUNDER = PGDConfig(EPS, EPS, 1, random_start=False, rule="inverse-clip")


def wrm(eps: float, steps: int) -> PGDConfig:
    return PGDConfig(eps, 1.0, steps, random_start=False, rule="penalty")


def _craft(model: MultiExit, batch: tuple[Tensor, Tensor, Tensor], attack: Attack, seed: int = 0) -> Tensor:
    images, labels, index = batch
    return craft(model, images, labels, attack, rng=CounterRNG(seed, 0), index=index)


@pytest.mark.parametrize("target_exits", TARGET_EXITS)
@pytest.mark.parametrize("random_start", [True, False])
def test_attack_stays_in_the_ball_and_in_the_pixel_range(model, batch, target_exits, random_start) -> None:
    attacked = _craft(model, batch, Attack(target_exits, PGDConfig(EPS, EPS / 2, 5, random_start)))
    assert (attacked - batch[0]).abs().max() <= EPS + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - batch[0]).abs().max() > EPS / 2


@pytest.mark.parametrize("target_exits", ["single", "average"])
def test_an_attack_raises_its_loss_and_more_steps_raise_it_more(model, batch, target_exits) -> None:
    def loss(images: Tensor) -> float:
        with torch.no_grad():
            losses = exit_cross_entropy(model(images), batch[1])
        return float(losses[-1].mean() if target_exits == "single" else losses.mean())

    one = _craft(model, batch, Attack(target_exits, PGDConfig(EPS, EPS / 4, 1)))
    ten = _craft(model, batch, Attack(target_exits, PGDConfig(EPS, EPS / 4, 10)))
    assert loss(batch[0]) < loss(one) < loss(ten)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "penalty"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_every_rule_stays_in_the_ball_of_every_norm(model, batch, norm, rule, restarts) -> None:
    eps = EPS if norm == "linf" else 0.7
    attacked = _craft(model, batch, Attack("average", PGDConfig(eps, eps / 2, 3, True, norm, rule, restarts)))
    change = (attacked - batch[0]).flatten(1)
    length = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
    assert (length <= eps * (1 + 1e-5)).all()
    assert (length > eps / 20).all(), "an image did not move"
    assert attacked.min() >= 0
    assert attacked.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_attack_beats_random_noise_and_more_restarts_beat_fewer(model, batch, norm) -> None:
    eps = EPS if norm == "linf" else 0.7

    def loss(images: Tensor) -> Tensor:
        with torch.no_grad():
            return exit_cross_entropy(model(images), batch[1]).mean(dim=0)

    def loss_under(config: PGDConfig) -> Tensor:
        return loss(_craft(model, batch, Attack("average", config)))

    one_step = PGDConfig(eps, eps, 1, random_start=False, norm=norm)
    by_noise, by_fgsm = (
        loss(random_noise(batch[0], batch[2], one_step, rng=CounterRNG(0, 0))),
        loss_under(one_step),
    )
    by_pgd = [loss_under(PGDConfig(eps, eps / 2, 4, norm=norm, restarts=restarts)) for restarts in (1, 2, 4)]
    assert by_noise.mean() < by_fgsm.mean() - 0.05
    assert by_fgsm.mean() < by_pgd[0].mean()
    assert (by_pgd[1] >= by_pgd[0] - 1e-6).all(), "a better restart was lost"
    assert (by_pgd[2] >= by_pgd[1] - 1e-6).all()
    assert by_pgd[2].mean() > by_pgd[0].mean()


def test_one_start_runs_the_network_once_per_step_and_each_restart_once_more(model, batch) -> None:
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        _craft(model, batch, Attack("average", PGDConfig(EPS, EPS / 4, 5)))
        assert len(calls) == 5
        calls.clear()
        _craft(model, batch, Attack("average", PGDConfig(EPS, EPS / 4, 5, restarts=3)))
        assert len(calls) == 3 * 5 + 3
    finally:
        hook.remove()


def test_fgsm_is_one_full_step_without_a_random_start(model, batch) -> None:
    attacked = _craft(model, batch, Attack("average", FGSM))
    torch.testing.assert_close(attacked, (batch[0] + EPS * _gradient(model, batch).sign()).clamp(0, 1))


def test_a_step_in_the_l2_ball_follows_the_gradient(model, batch) -> None:
    gradient = _gradient(model, batch)
    length = gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    attacked = _craft(model, batch, Attack("average", FGSM_L2))
    torch.testing.assert_close(attacked, (batch[0] + 0.5 * gradient / length).clamp(0, 1))


def test_inverse_clip_equals_fgsm_except_where_the_gradient_is_zero_or_steep(model, batch) -> None:
    gradient = _gradient(model, batch, "logit")
    attacked = _craft(model, batch, Attack("average", THUNDER, loss="logit"))
    by_fgsm = _craft(model, batch, Attack("average", FGSM, loss="logit"))
    ordinary = (gradient != 0) & (gradient.abs() < 1 / EPS)
    assert ordinary.float().mean() > 0.5
    torch.testing.assert_close(attacked[ordinary], by_fgsm[ordinary])


def test_inverse_clip_by_hand() -> None:
    slope = torch.tensor([[[[4.0, -4.0, 20.0, -50.0, 0.0]]]])
    images = torch.full_like(slope, 0.5)
    attacked = pgd(images, THUNDER, lambda x: (x * slope).sum(dim=(1, 2, 3)), None)
    torch.testing.assert_close(attacked - 0.5, torch.tensor([[[[0.1, -0.1, 1 / 20, -1 / 50, 0.1]]]]))


def test_penalty_finds_the_maximum_of_its_lagrangian_and_has_no_ball() -> None:
    """For the loss s * x the maximum of eps * s * x - |x - x0|^2 / 2 lies at x0 + eps * s."""
    slope = torch.tensor([[[[1.0, -2.0]]]])
    images = torch.full_like(slope, 0.5)
    attacked = pgd(images, wrm(0.1, 40), lambda x: (x * slope).sum(dim=(1, 2, 3)), None)
    torch.testing.assert_close(attacked - 0.5, 0.1 * slope, atol=1e-4, rtol=0)
    first = pgd(images, wrm(0.1, 1), lambda x: (x * slope).sum(dim=(1, 2, 3)), None)
    torch.testing.assert_close(first - 0.5, 0.1 * slope / 2**0.5)
    assert (attacked - images).abs().max() > 0.1
    far = pgd(images, wrm(9.0, 40), lambda x: (x * slope).sum(dim=(1, 2, 3)), None)
    torch.testing.assert_close(far, torch.tensor([[[[1.0, 0.0]]]]))


def test_penalty_raises_the_loss(model, batch) -> None:
    with torch.no_grad():
        before = exit_cross_entropy(model.eval()(batch[0]), batch[1]).mean(dim=0)
        attacked = _craft(model, batch, Attack("average", wrm(1.3, 10)))
        after = exit_cross_entropy(model(attacked), batch[1]).mean(dim=0)
    assert (after > before).all()


def _gradient(model: MultiExit, batch: tuple[Tensor, Tensor, Tensor], loss: str = "ce") -> Tensor:
    images, labels, _ = batch
    attacked = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sample_loss(loss, model.eval()(attacked), labels).sum(), attacked)
    return gradient


def test_max_average_keeps_for_each_sample_the_worst_of_the_single_attacks(model, batch) -> None:
    images, labels, index = batch
    steps = PGDConfig(EPS, EPS / 4, 4)
    chosen = _craft(model, batch, Attack("max-average", steps))
    candidates = craft_each_exit(model, images, labels, Attack("single", steps), rng=CounterRNG(0, 0), index=index)
    with torch.no_grad():
        losses = torch.stack([exit_cross_entropy(model(one), labels).mean(dim=0) for one in candidates])
        best = exit_cross_entropy(model(chosen), labels).mean(dim=0)
    torch.testing.assert_close(best, losses.max(dim=0).values)
    torch.testing.assert_close(chosen, keep_worst(model, candidates, labels))
    assert len(losses.argmax(dim=0).unique()) > 1, "one exit is always the worst: the selection is not tested"


def test_single_attack_on_an_early_exit_runs_no_later_layer(model, batch) -> None:
    ran = []
    hook = model.stages[1].register_forward_hook(lambda *_: ran.append(2))
    _craft(model, batch, Attack("single", PGDConfig(EPS, EPS, 2), exit=1))
    hook.remove()
    assert not ran


def test_attack_leaves_the_network_as_it_was(model, batch) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _craft(model, batch, Attack("max-average", PGDConfig(EPS, EPS / 2, 2)))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_start_depends_on_the_sample_and_not_on_its_batch(model, batch) -> None:
    attack = Attack("average", PGDConfig(EPS, EPS / 4, 3))
    whole = _craft(model, batch, attack)
    half = _craft(model, tuple(part[10:20] for part in batch), attack)
    torch.testing.assert_close(whole[10:20], half, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, _craft(model, batch, attack, seed=1))


@pytest.mark.parametrize(
    ("eps", "step_size", "steps"),
    [(8, 0.1, 5), (0, 0.1, 5), (0.1, 0, 5), (0.1, 0.1, 0), (float("nan"), 0.1, 5)],
    ids=["eps 8", "eps 0", "step 0", "none", "not a number"],
)
def test_impossible_parameters_are_refused(eps, step_size, steps) -> None:
    with pytest.raises(UsageError, match="8/255"):
        PGDConfig(eps, step_size, steps)


@pytest.mark.parametrize(
    ("values", "message"),
    {
        "norm": ({"norm": "l1"}, "linf, l2"),
        "rule": ({"rule": "signed"}, "inverse-clip"),
        "restarts without a start": ({"restarts": 2, "random_start": False}, "random start"),
        "no restarts": ({"restarts": 0}, "at least 1"),
        "penalty with a start": ({"rule": "penalty"}, "no ball to start in"),
    }.values(),
)
def test_parameters_that_contradict_each_other_are_refused(values, message) -> None:
    with pytest.raises(UsageError, match=message):
        PGDConfig(**{"eps": EPS, "step_size": EPS, "steps": 1, **values})


def test_restarts_need_a_loss_a_sample_and_noise_for_each(batch) -> None:
    images, starts = batch[0], torch.rand(2, *batch[0].shape)
    config = PGDConfig(EPS, EPS, 1, restarts=2)
    with pytest.raises(UsageError, match="one loss a sample"):
        pgd(images, config, lambda attacked: attacked.sum(), starts)
    for wrong in (None, starts[0], starts[:1]):
        with pytest.raises(UsageError, match="2 restarts need noise"):
            pgd(images, config, lambda attacked: attacked.flatten(1).sum(dim=1), wrong)


def test_each_restart_has_another_start_and_the_first_is_that_of_a_single_run(batch) -> None:
    images, index = batch[0], batch[2]
    one = start_noise(CounterRNG(0, 0), "start", index, images, PGDConfig(EPS, EPS, 1))
    two = start_noise(CounterRNG(0, 0), "start", index, images, PGDConfig(EPS, EPS, 1, restarts=2))
    assert torch.equal(one, two[0])
    assert not torch.allclose(two[0], two[1], atol=0.1)
    assert start_noise(CounterRNG(0, 0), "start", index, images, FGSM) is None


def test_random_starts_fill_the_linf_ball_and_lie_on_the_l2_sphere() -> None:
    """Images of two pixels, for which a normal vector is often short."""
    grey = torch.full((50, 1, 1, 2), 0.5)
    noise = torch.rand(50, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    change = random_start(grey, PGDConfig(0.3, 0.3, 1), noise) - grey
    torch.testing.assert_close(change, 0.3 * (2 * noise - 1), atol=1e-6, rtol=0)
    change = random_start(grey, PGDConfig(0.3, 0.3, 1, norm="l2"), noise) - grey
    torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((50,), 0.3))
    assert torch.equal(change > 0, noise > 0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_random_noise_has_the_radius_of_the_attack_and_stays_in_the_pixel_range(batch, norm) -> None:
    images, _, index = batch
    eps = EPS if norm == "linf" else 0.7
    noisy = random_noise(images, index, PGDConfig(eps, eps, 1, norm=norm), rng=CounterRNG(0, 0))
    change = (noisy - images).flatten(1)
    length = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
    assert (length <= eps * (1 + 1e-5)).all()
    assert (length > eps / 3).all()
    assert noisy.min() >= 0
    assert noisy.max() <= 1


def test_reports_tell_attacks_apart() -> None:
    configs = (
        PGDConfig(EPS, EPS, 1), FGSM, FGSM_L2, THUNDER, wrm(EPS, 1),
        PGDConfig(EPS, EPS, 1, restarts=3), PGDConfig(EPS, EPS, 1, rule="raw"),
    )  # fmt: skip
    descriptions = {Attack("average", config).describe() for config in configs}
    assert len(descriptions) == len(configs)
    assert "PGD-1 average, L2 penalty, eps 0.1" in descriptions


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1, 2, 3)], ids=["a scalar", "one per sample"])
def test_pgd_finds_the_corner_of_the_ball_for_a_linear_loss(dims) -> None:
    images = torch.full((2, 1, 2, 2), 0.5)
    slope = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    attacked = pgd(
        images,
        PGDConfig(0.25, 0.1, 5),
        lambda x: (x * slope).sum(dim=dims),
        torch.full_like(images, 0.5),
    )
    torch.testing.assert_close(attacked, images + 0.25 * slope.sign())

"""CAP: the regulariser satisfies the identities of its formula, and the particles are its corners."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from method_outputs import make_outputs
from torch import Tensor

from mexit.attacks.pgd import Attack, PGDConfig
from mexit.attacks.rng import CounterRNG
from mexit.attacks.svgd import ParticleConfig, craft_particles
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model, model_spec
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Batch, StepInfo
from mexit.train.methods.cap import CAP, centre_distance

N, E, B, C = 4, 3, 6, 10
EPS = 0.1


@pytest.fixture
def corners() -> Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(N, E, B, C)).requires_grad_()


def outputs_of(corners: Tensor, progress: float = 1.0) -> Outputs:
    torch.manual_seed(1)
    clean = torch.randn(corners.shape[1:], requires_grad=True)
    return make_outputs(clean, corners, step=StepInfo(progress=progress))


@pytest.fixture(scope="module")
def model() -> MultiExit:
    torch.manual_seed(0)
    return build_model("digits-cnn", 10)


@pytest.fixture(scope="module")
def batch(model: MultiExit) -> Batch:
    data = digits.load()
    index = splits.split(data).part("selection")[:32]
    images = torch.from_numpy(data.batch(index, model_spec("digits-cnn").input))
    labels = torch.from_numpy(data.labels[index])
    return Batch(
        model,
        images,
        labels,
        torch.from_numpy(index),
        Attack("average", PGDConfig(EPS, EPS / 4, 7)),
        CounterRNG(0, 0),
    )


def test_distance_from_the_mean_is_the_mean_distance_of_pairs(corners) -> None:
    pairs = [(corners[k] - corners[j]).square().sum(dim=-1).mean(dim=-1) for k, j in product(range(N), range(N))]
    torch.testing.assert_close(centre_distance(corners), torch.stack(pairs).sum(dim=0) / (2 * N**2))


def test_the_identity_holds_for_gradients_too(corners) -> None:
    (ours,) = torch.autograd.grad(centre_distance(corners).sum(), corners)
    pairs = (corners[:, None] - corners[None]).square().sum(dim=-1).mean(dim=-1).sum() / (2 * N**2)
    (expected,) = torch.autograd.grad(pairs, corners)
    torch.testing.assert_close(ours, expected)


def test_distance_from_a_given_centre_by_hand() -> None:
    corners = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 3.0]]]])
    assert centre_distance(corners, torch.zeros(1, 1, 2)).item() == pytest.approx((1 + 9) / 2)
    assert centre_distance(corners).item() == pytest.approx((1 + 9) / 4)


def test_equal_corners_have_no_penalty(corners) -> None:
    same = corners[:1].expand(N, -1, -1, -1)
    assert not centre_distance(same).any()
    assert build_method("cap", {}).terms(outputs_of(same))["cap"] == 0


@pytest.mark.parametrize("on", ["probs", "logits"])
@pytest.mark.parametrize("centre", ["mean", "clean"])
def test_terms_by_hand(corners, on, centre) -> None:
    outputs = outputs_of(corners)
    terms = build_method("cap", {"on": on, "centre": centre, "weight": 2.0, "clean_weight": 0.5}).terms(outputs)
    entropy = -corners.log_softmax(dim=-1)[..., torch.arange(B), outputs.labels]
    torch.testing.assert_close(terms["attacked"], entropy.mean(dim=(0, 2)).sum())
    points, clean = (corners, outputs.clean) if on == "logits" else (corners.softmax(-1), outputs.clean.softmax(-1))
    middle = clean if centre == "clean" else points.mean(dim=0)
    torch.testing.assert_close(terms["cap"], 2 * (points - middle).square().sum(dim=-1).mean(dim=(0, 2)).sum())
    torch.testing.assert_close(terms["clean"], 0.5 * outputs.cross_entropy(outputs.clean).sum())


def test_gradients_reach_the_corners_and_with_a_clean_centre_the_clean_images(corners) -> None:
    for centre in ("mean", "clean"):
        outputs = outputs_of(corners)
        terms = build_method("cap", {"centre": centre, "clean_weight": 0.0}).terms(outputs)
        assert "clean" not in terms
        of_corners, of_clean = torch.autograd.grad(terms["cap"], [corners, outputs.clean], allow_unused=True)
        assert all(of_corners[k].any() for k in range(N))
        assert (of_clean is not None) == (centre == "clean")


def test_the_penalty_grows_with_the_scale_of_logits_and_is_at_most_2_on_probabilities(corners) -> None:
    """Probabilities are the default because shrinking the logits lowers a penalty on logits without robustness."""
    corners = corners.detach()
    torch.testing.assert_close(centre_distance(2 * corners), 4 * centre_distance(corners))
    assert (centre_distance((100 * corners).softmax(dim=-1)) <= 2).all()


def test_the_weight_grows_from_0_over_the_warm_up(corners) -> None:
    def penalty(progress: float, warm_up: float) -> float:
        terms = build_method("cap", {"warm_up": warm_up}).terms(outputs_of(corners, progress))
        return float(terms["cap"].detach())

    full = penalty(1.0, 0.2)
    assert full > 0
    assert penalty(0.0, 0.2) == 0
    assert penalty(0.05, 0.2) == pytest.approx(full / 4)
    assert penalty(0.2, 0.2) == penalty(0.9, 0.2) == penalty(0.0, 0.0) == full
    assert "cap" not in build_method("cap", {"weight": 0.0}).terms(outputs_of(corners))


def test_corners_are_particles_in_the_ball_of_the_attack_with_their_own_number_of_steps(batch) -> None:
    corners = CAP().craft(batch)
    assert corners.shape == (4, *batch.images.shape)
    assert (corners - batch.images).abs().max() <= EPS + 1e-6
    fewer = CAP().craft(replace(batch, attack=Attack("average", PGDConfig(EPS, EPS / 4, 2))))
    assert torch.equal(corners, fewer), "the attack's number of steps changed the particles"
    assert not torch.equal(corners, CAP(steps=2).craft(batch))
    assert len(CAP(particles=2).craft(batch)) == 2


def test_particle_k_attacks_exit_k_or_all_attack_the_mean(batch, model) -> None:
    ran = {1: 0, 2: 0, 3: 0}
    hooks = [
        stage.trunk.register_forward_pre_hook(lambda *_, k=k: ran.update({k: ran[k] + 1}))
        for k, stage in enumerate(model.stages, start=1)
    ]
    CAP(steps=1).craft(batch)
    each = dict(ran)
    CAP(steps=1, climbs="mean").craft(batch)
    for hook in hooks:
        hook.remove()
    assert each == {1: 4, 2: 2, 3: 1}, "four particles attack exits 1, 2, 3, 1"
    assert {k: ran[k] - each[k] for k in ran} == {1: 1, 2: 1, 3: 1}


def test_by_default_it_trains_on_clean_images_and_particles_share_their_gradients(batch, model) -> None:
    """The particles are those of SVGD with the kernel average of all gradients."""
    assert build_method("cap", {}).terms(outputs_of(torch.randn(N, E, B, C))).keys() == {
        "attacked",
        "cap",
        "clean",
    }
    config = ParticleConfig(4, PGDConfig(EPS, EPS / 4, 5), exits=(1, 2, 3), mix_gradients=True)
    expected = craft_particles(model, batch.images, batch.labels, config, rng=batch.rng, index=batch.index)
    assert torch.equal(CAP().craft(batch), expected)
    assert not torch.equal(CAP(mix=False).craft(batch), expected)


def test_it_needs_an_attack(batch) -> None:
    assert CAP().craft(replace(batch, attack=None)) is None
    with pytest.raises(UsageError, match="choose --attack average"):
        CAP().terms(make_outputs(torch.randn(E, 32, C)))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("on", "probabilities", "probs, logits"),
        ("centre", "median", "mean, clean"),
        ("climbs", "all", "each, mean"),
        ("weight", -1.0, "at least 0"),
        ("warm_up", 10.0, "fraction of the run"),
    ],
)
def test_impossible_options_are_refused(option, value, message) -> None:
    with pytest.raises(UsageError, match=message):
        build_method("cap", {option: value})

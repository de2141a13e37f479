"""Particles keep to the ball, climb, and stay apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mexit.attacks.multi_exit_attack import Attack, craft, exit_losses
from mexit.attacks.pgd import PGDConfig, fgsm, pgd
from mexit.attacks.rng import CounterRNG
from mexit.attacks.svgd import MOVES, ParticleConfig, craft_particles, median_bandwidth, stein_direction
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model, model_spec

EPS = 0.1
STEPS = PGDConfig(EPS, EPS / 4, 6)
Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Images, labels, places."""
    data = digits.load()
    index = splits.split(data).part("selection")[:40]
    images = data.batch(index, model_spec("digits-cnn").input)
    return torch.from_numpy(images), torch.from_numpy(data.labels[index]), torch.from_numpy(index)


@pytest.fixture(scope="module")
def model(batch: Batch) -> MultiExit:
    """A network that knows the images."""
    torch.manual_seed(0)
    model = build_model("digits-cnn", 10)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimiser.zero_grad()
        exit_losses(model(batch[0]), batch[1]).mean().backward()
        optimiser.step()
    return model.eval()


def particles(model: MultiExit, batch: Batch, swarm: ParticleConfig, seed: int = 0) -> Tensor:
    images, labels, index = batch
    return craft_particles(model, images, labels, swarm, draw=CounterRNG(seed, 0), index=index)


def distance(found: Tensor) -> float:
    """Mean distance between particles of one image."""
    n = len(found)
    pairs = [(found[i] - found[j]).flatten(1).norm(dim=1).mean() for i in range(n) for j in range(i)]
    return float(torch.stack(pairs).mean())


def loss(model: MultiExit, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(exit_losses(model(images), labels).mean())


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("climbs", [(), (1, 2, 3), (2, 3)], ids=["mean", "each", "last two"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_particles_stay_in_the_ball_and_each_climbs(model, batch, move, climbs, norm) -> None:
    images, labels, _ = batch
    eps = EPS if norm == "linf" else 0.7
    swarm = ParticleConfig(4, PGDConfig(eps, eps / 4, 5, norm=norm), move, climbs, mix=not climbs)
    found = particles(model, batch, swarm)
    assert found.shape == (4, *images.shape)
    assert not found.requires_grad
    change = (found - images).flatten(2)
    length = change.abs().amax(dim=-1) if norm == "linf" else change.norm(dim=-1)
    assert length.max() <= eps * (1 + 1e-5)
    assert found.min() >= 0
    assert found.max() <= 1
    assert all(loss(model, one, labels) > 1.2 * loss(model, images, labels) for one in found)


def test_two_particles_of_one_loss_move_apart(model, batch) -> None:
    """Two copies of one tilted plane: only the repulsion can part them."""
    apart = ParticleConfig(2, PGDConfig(EPS, EPS / 10, 5), repulsion_weight=1.0)
    close = 0.5 + 0.01 * torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(0))
    slope = torch.ones_like(close)
    direction = stein_direction(close, slope, apart)
    between = close[0] - close[1]
    assert ((direction[0] - direction[1]) * between).sum(dim=-1).min() > 0
    plain = stein_direction(close, slope, replace(apart, repulsion_weight=0.0))
    torch.testing.assert_close(plain[0], plain[1])
    torch.testing.assert_close(plain[0].norm(dim=-1), torch.ones(3))
    assert distance(particles(model, batch, replace(apart, steps=STEPS))) > 1.5 * distance(
        particles(model, batch, replace(apart, steps=STEPS, repulsion_weight=0.0))
    )


def test_stein_direction_by_hand() -> None:
    """The formula of the module, one pair at a time, in float64."""
    torch.manual_seed(0)
    x, g = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    n, images, _ = x.shape
    found = stein_direction(x, g, ParticleConfig(n, STEPS, repulsion_weight=0.5))
    alone = stein_direction(x, g, ParticleConfig(n, STEPS, repulsion_weight=0.5, mix=False))
    for b in range(images):
        squares = [float(((x[i, b] - x[j, b]) ** 2).sum()) for i in range(n) for j in range(i)]
        h = sorted(squares)[1] / math.log(n + 1)
        for i in range(n):
            k = [math.exp(-float(((x[i, b] - x[j, b]) ** 2).sum()) / h) for j in range(n)]
            pull = sum(k[j] * g[j, b] for j in range(n))
            push = sum(2 / h * k[j] * (x[i, b] - x[j, b]) for j in range(n))
            torch.testing.assert_close(found[i, b], pull / pull.norm() + 0.5 * push / push.norm())
            torch.testing.assert_close(alone[i, b], g[i, b] / g[i, b].norm() + 0.5 * push / push.norm())


def test_bandwidth_is_the_median_of_each_image_on_its_own() -> None:
    squares = torch.zeros(3, 3, 2)
    for (i, j), value in {(0, 1): 1.0, (0, 2): 4.0, (1, 2): 9.0}.items():
        squares[i, j] = squares[j, i] = torch.tensor([value, 10 * value])
    torch.testing.assert_close(median_bandwidth(squares), torch.tensor([4.0, 40.0]) / math.log(4))


def test_what_an_image_gets_does_not_depend_on_its_batch_but_on_the_seed(model, batch) -> None:
    swarm = ParticleConfig(3, STEPS)
    whole = particles(model, batch, swarm)
    half = particles(model, tuple(part[10:20] for part in batch), swarm)
    torch.testing.assert_close(whole[:, 10:20], half, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, particles(model, batch, swarm, seed=1), atol=1e-2)


@pytest.mark.parametrize("climbs", [(), (3,), (1, 2, 3)], ids=["mean", "last", "each"])
def test_without_repulsion_particles_are_independent_attacks(model, batch, climbs) -> None:
    images, labels, index = batch
    swarm = ParticleConfig(3, STEPS, climbs=climbs, mix=False, repulsion_weight=0.0)
    for m, found in enumerate(particles(model, batch, swarm)):
        k = climbs[m % len(climbs)] if climbs else 0

        def climbed(attacked: Tensor, k: int = k) -> Tensor:
            losses = exit_losses(model(attacked), labels)
            return losses[k - 1] if k else losses.mean(dim=0)

        start = CounterRNG(0, 0).uniform(f"particle {m}", index, images.shape[1:])
        alone = pgd(images, STEPS, climbed, start)
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)


def test_by_default_particles_are_nearly_as_strong_as_a_lone_attack_and_far_apart(model, batch) -> None:
    images, labels, index = batch
    alone = craft(model, images, labels, Attack("average", STEPS), draw=CounterRNG(0, 0), index=index)
    by_fgsm = craft(model, images, labels, Attack("average", fgsm(EPS)), draw=CounterRNG(0, 0), index=index)
    ours = particles(model, batch, ParticleConfig(2, STEPS))
    assert loss(model, ours[0], labels) > 0.9 * loss(model, alone, labels)
    assert distance(ours) > 1.5 * distance(particles(model, batch, ParticleConfig(2, STEPS, repulsion_weight=0.0)))
    torn = particles(model, batch, ParticleConfig(2, STEPS, repulsion_weight=1.0))
    assert loss(model, torn[0], labels) < loss(model, by_fgsm, labels), "the docstring says so"


@pytest.mark.parametrize("move", ["svgd", "spread"])
def test_each_particle_is_worst_for_the_exit_that_it_climbs(model, batch, move) -> None:
    swarm = ParticleConfig(3, STEPS, move, climbs=(1, 2, 3), mix=False, spread_weight=1e-3)
    found = particles(model, batch, swarm)
    with torch.no_grad():
        losses = torch.stack([exit_losses(model(one), batch[1]).mean(dim=1) for one in found])
    assert losses.argmax(dim=0).tolist() == [0, 1, 2]


def test_facets_lead_to_different_wrong_classes(model, batch) -> None:
    images, labels, _ = batch
    found = particles(model, batch, ParticleConfig(3, PGDConfig(0.3, 0.05, 10), "facet", mix=False))
    with torch.no_grad():
        clean = model(images).mean(dim=0)
        clean[torch.arange(len(labels)), labels] = -math.inf
        rivals = clean.argsort(dim=-1, descending=True)[:, :3].T
        logits = torch.stack([model(one).mean(dim=0) for one in found])
    for m in range(3):
        own = logits.gather(-1, rivals[m].expand(3, -1)[..., None]).squeeze(-1)
        assert own.mean(dim=1).argmax() == m, f"facet {m + 1} is best reached by another particle"


def test_spread_widens_the_outputs(model, batch) -> None:
    def width(spread_weight: float) -> float:
        found = particles(model, batch, ParticleConfig(3, STEPS, "spread", spread_weight=spread_weight))
        with torch.no_grad():
            logits = torch.stack([model(one) for one in found])
        return float((logits - logits.mean(dim=0)).square().sum(dim=-1).mean())

    assert width(0.0) < width(0.01) < width(0.1)


def test_particles_that_climb_one_exit_run_no_later_layer(model, batch) -> None:
    ran = []
    hook = model.stages[1].register_forward_hook(lambda *_: ran.append(2))
    particles(model, batch, ParticleConfig(2, STEPS, climbs=(1,), mix=False))
    hook.remove()
    assert not ran


def test_the_network_is_left_as_it_was(model, batch) -> None:
    particles(model, batch, ParticleConfig(2, STEPS))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"move": "swarm"}, "svgd, spread, facet"),
        ({"count": 0}, "at least one particle"),
        ({"repulsion_weight": -1.0}, "at least 0"),
        ({"steps": fgsm(EPS)}, "never part"),
        ({"steps": replace(STEPS, restarts=2)}, "one random start each"),
    ],
)
def test_impossible_swarms_are_refused(change, said) -> None:
    with pytest.raises(UsageError, match=said):
        ParticleConfig(**{"count": 2, "steps": STEPS, **change})


def test_exits_that_do_not_exist_are_refused(model, batch) -> None:
    with pytest.raises(UsageError, match=r"exits 1 to 3, found \(3, 4\)"):
        particles(model, batch, ParticleConfig(2, STEPS, climbs=(3, 4)))

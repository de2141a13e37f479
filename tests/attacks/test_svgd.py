"""Particle attacks stay in the ball, raise the loss, and keep the particles apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mexit.attacks.losses import exit_cross_entropy
from mexit.attacks.pgd import Attack, PGDConfig, craft, pgd
from mexit.attacks.rng import CounterRNG
from mexit.attacks.svgd import DIVERSITIES, ParticleConfig, craft_particles, median_bandwidth, stein_direction
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model, model_spec

EPS = 0.1
PGD = PGDConfig(EPS, EPS / 4, 6)
FGSM = PGDConfig(EPS, EPS, 1, random_start=False)
Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Images, labels, positions in the data set."""
    data = digits.load()
    index = splits.split(data).part("selection")[:40]
    images = data.batch(index, model_spec("digits-cnn").input)
    return torch.from_numpy(images), torch.from_numpy(data.labels[index]), torch.from_numpy(index)


@pytest.fixture(scope="module")
def model(batch: Batch) -> MultiExit:
    """A network that is trained on the images."""
    torch.manual_seed(0)
    model = build_model("digits-cnn", 10)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimiser.zero_grad()
        exit_cross_entropy(model(batch[0]), batch[1]).mean().backward()
        optimiser.step()
    return model.eval()


def particles(model: MultiExit, batch: Batch, config: ParticleConfig, seed: int = 0) -> Tensor:
    images, labels, index = batch
    return craft_particles(model, images, labels, config, rng=CounterRNG(seed, 0), index=index)


def distance(attacked: Tensor) -> float:
    """Mean distance between particles of one image."""
    n = len(attacked)
    pairs = [(attacked[i] - attacked[j]).flatten(1).norm(dim=1).mean() for i in range(n) for j in range(i)]
    return float(torch.stack(pairs).mean())


def loss(model: MultiExit, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(exit_cross_entropy(model(images), labels).mean())


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("exits", [(), (1, 2, 3), (2, 3)], ids=["mean", "each", "last two"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_particles_stay_in_the_ball_and_each_climbs(model, batch, diversity, exits, norm) -> None:
    images, labels, _ = batch
    eps = EPS if norm == "linf" else 0.7
    config = ParticleConfig(4, PGDConfig(eps, eps / 4, 5, norm=norm), diversity, exits, mix_gradients=not exits)
    attacked = particles(model, batch, config)
    assert attacked.shape == (4, *images.shape)
    assert not attacked.requires_grad
    change = (attacked - images).flatten(2)
    length = change.abs().amax(dim=-1) if norm == "linf" else change.norm(dim=-1)
    assert length.max() <= eps * (1 + 1e-5)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert all(loss(model, one, labels) > 1.2 * loss(model, images, labels) for one in attacked)


def test_two_particles_with_the_same_loss_move_apart(model, batch) -> None:
    """The gradients are equal, so only the repulsion separates the particles."""
    apart = ParticleConfig(2, PGDConfig(EPS, EPS / 10, 5), repulsion_weight=1.0)
    close = 0.5 + 0.01 * torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(0))
    slope = torch.ones_like(close)
    direction = stein_direction(close, slope, apart)
    between = close[0] - close[1]
    assert ((direction[0] - direction[1]) * between).sum(dim=-1).min() > 0
    plain = stein_direction(close, slope, replace(apart, repulsion_weight=0.0))
    torch.testing.assert_close(plain[0], plain[1])
    torch.testing.assert_close(plain[0].norm(dim=-1), torch.ones(3))
    assert distance(particles(model, batch, replace(apart, pgd=PGD))) > 1.5 * distance(
        particles(model, batch, replace(apart, pgd=PGD, repulsion_weight=0.0))
    )


def test_stein_direction_by_hand() -> None:
    """The formula of the module, one pair at a time, in float64."""
    torch.manual_seed(0)
    x, g = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    n, images, _ = x.shape
    direction = stein_direction(x, g, ParticleConfig(n, PGD, repulsion_weight=0.5))
    alone = stein_direction(x, g, ParticleConfig(n, PGD, repulsion_weight=0.5, mix_gradients=False))
    for b in range(images):
        squares = [float(((x[i, b] - x[j, b]) ** 2).sum()) for i in range(n) for j in range(i)]
        h = sorted(squares)[1] / math.log(n + 1)
        for i in range(n):
            k = [math.exp(-float(((x[i, b] - x[j, b]) ** 2).sum()) / h) for j in range(n)]
            attraction = sum(k[j] * g[j, b] for j in range(n))
            repulsion = sum(2 / h * k[j] * (x[i, b] - x[j, b]) for j in range(n))
            torch.testing.assert_close(
                direction[i, b], attraction / attraction.norm() + 0.5 * repulsion / repulsion.norm()
            )
            torch.testing.assert_close(alone[i, b], g[i, b] / g[i, b].norm() + 0.5 * repulsion / repulsion.norm())


def test_bandwidth_is_the_median_of_each_image_on_its_own() -> None:
    squares = torch.zeros(3, 3, 2)
    for (i, j), value in {(0, 1): 1.0, (0, 2): 4.0, (1, 2): 9.0}.items():
        squares[i, j] = squares[j, i] = torch.tensor([value, 10 * value])
    torch.testing.assert_close(median_bandwidth(squares), torch.tensor([4.0, 40.0]) / math.log(4))


def test_particles_depend_on_the_seed_and_not_on_the_batch(model, batch) -> None:
    config = ParticleConfig(3, PGD)
    whole = particles(model, batch, config)
    half = particles(model, tuple(part[10:20] for part in batch), config)
    torch.testing.assert_close(whole[:, 10:20], half, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, particles(model, batch, config, seed=1), atol=1e-2)


@pytest.mark.parametrize("exits", [(), (3,), (1, 2, 3)], ids=["mean", "last", "each"])
def test_without_repulsion_particles_are_independent_attacks(model, batch, exits) -> None:
    images, labels, index = batch
    config = ParticleConfig(3, PGD, exits=exits, mix_gradients=False, repulsion_weight=0.0)
    for m, particle in enumerate(particles(model, batch, config)):
        k = exits[m % len(exits)] if exits else 0

        def loss_fn(attacked: Tensor, k: int = k) -> Tensor:
            losses = exit_cross_entropy(model(attacked), labels)
            return losses[k - 1] if k else losses.mean(dim=0)

        start = CounterRNG(0, 0).uniform(f"particle {m}", index, images.shape[1:])
        alone = pgd(images, PGD, loss_fn, start)
        torch.testing.assert_close(particle, alone, atol=1e-6, rtol=0)


def test_by_default_particles_are_nearly_as_strong_as_a_single_attack_and_far_apart(model, batch) -> None:
    images, labels, index = batch
    alone = craft(model, images, labels, Attack("average", PGD), rng=CounterRNG(0, 0), index=index)
    by_fgsm = craft(model, images, labels, Attack("average", FGSM), rng=CounterRNG(0, 0), index=index)
    default = particles(model, batch, ParticleConfig(2, PGD))
    assert loss(model, default[0], labels) > 0.9 * loss(model, alone, labels)
    assert distance(default) > 1.5 * distance(particles(model, batch, ParticleConfig(2, PGD, repulsion_weight=0.0)))
    repelled = particles(model, batch, ParticleConfig(2, PGD, repulsion_weight=1.0))
    assert loss(model, repelled[0], labels) < loss(model, by_fgsm, labels), "the docstring of ParticleConfig says so"


@pytest.mark.parametrize("diversity", ["svgd", "spread"])
def test_each_particle_is_worst_for_the_exit_that_it_climbs(model, batch, diversity) -> None:
    config = ParticleConfig(3, PGD, diversity, exits=(1, 2, 3), mix_gradients=False, spread_weight=1e-3)
    attacked = particles(model, batch, config)
    with torch.no_grad():
        losses = torch.stack([exit_cross_entropy(model(one), batch[1]).mean(dim=1) for one in attacked])
    assert losses.argmax(dim=0).tolist() == [0, 1, 2]


def test_facets_lead_to_different_wrong_classes(model, batch) -> None:
    images, labels, _ = batch
    attacked = particles(model, batch, ParticleConfig(3, PGDConfig(0.3, 0.05, 10), "facet", mix_gradients=False))
    with torch.no_grad():
        clean = model(images).mean(dim=0)
        clean[torch.arange(len(labels)), labels] = -math.inf
        rivals = clean.argsort(dim=-1, descending=True)[:, :3].T
        logits = torch.stack([model(one).mean(dim=0) for one in attacked])
    for m in range(3):
        own = logits.gather(-1, rivals[m].expand(3, -1)[..., None]).squeeze(-1)
        assert own.mean(dim=1).argmax() == m, f"facet {m + 1} is best reached by another particle"


def test_spread_widens_the_outputs(model, batch) -> None:
    def width(spread_weight: float) -> float:
        attacked = particles(model, batch, ParticleConfig(3, PGD, "spread", spread_weight=spread_weight))
        with torch.no_grad():
            logits = torch.stack([model(one) for one in attacked])
        return float((logits - logits.mean(dim=0)).square().sum(dim=-1).mean())

    assert width(0.0) < width(0.01) < width(0.1)


def test_particles_for_one_exit_run_no_later_layer(model, batch) -> None:
    ran = []
    hook = model.stages[1].register_forward_hook(lambda *_: ran.append(2))
    particles(model, batch, ParticleConfig(2, PGD, exits=(1,), mix_gradients=False))
    hook.remove()
    assert not ran


def test_the_network_is_unchanged_afterwards(model, batch) -> None:
    particles(model, batch, ParticleConfig(2, PGD))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diversity": "config"}, "svgd, spread, facet"),
        ({"count": 0}, "at least one particle"),
        ({"repulsion_weight": -1.0}, "at least 0"),
        ({"pgd": FGSM}, "stay together"),
        ({"pgd": replace(PGD, restarts=2)}, "one random start each"),
    ],
)
def test_impossible_particles_are_refused(change, message) -> None:
    with pytest.raises(UsageError, match=message):
        ParticleConfig(**{"count": 2, "pgd": PGD, **change})


def test_exits_that_do_not_exist_are_refused(model, batch) -> None:
    with pytest.raises(UsageError, match=r"exits 1 to 3, found \(3, 4\)"):
        particles(model, batch, ParticleConfig(2, PGD, exits=(3, 4)))

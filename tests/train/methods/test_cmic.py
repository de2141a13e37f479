"""CMIC: concentration of classes and separation between them, by the formulas of the paper and its code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from method_outputs import make_outputs
from safetensors.numpy import load_file
from torch import Tensor, nn

from mexit.attacks.pgd import Attack, PGDConfig
from mexit.attacks.rng import CounterRNG
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.models import MultiExit, Stage, build_model, model_spec
from mexit.train import checkpoint
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Batch, Setup
from mexit.train.methods.cmi import ClassStatistics, cross_entropy_to_other_classes, kl_to_centroids
from mexit.train.methods.cmic import CMIC, fixed_running_statistics

E, B, C = 3, 40, 10
SHORT = {"method": "cmic", "attack": "average", "steps": 2, "step": 0.07, "batch": 64, "precision": "fp32"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(B) % 7  # classes 7, 8, 9 are not in the batch


def _method(exits: int = E, **options: object) -> CMIC:
    method = build_method("cmic", options)
    assert isinstance(method, CMIC)
    method.setup(Setup(exits, C))
    return method


def _outputs(labels: Tensor, seed: int = 1, attacked: bool = True) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    clean, other = (3 * torch.randn(2, E, len(labels), C, generator=generator)).unbind()
    return make_outputs(clean.requires_grad_(), other[None].requires_grad_() if attacked else None, labels=labels)


def _train_logits(outputs: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
    yield outputs.variants[-1].detach(), outputs.labels


def test_gamma_of_a_batch_is_the_mean_over_pairs_of_different_classes(labels) -> None:
    logits = _outputs(labels).clean.detach().double()
    outputs = logits.softmax(-1)
    pairs = [(i, j) for i in range(B) for j in range(B) if labels[i] != labels[j]]
    by_hand = [sum(-(p[i] * p[j].log()).sum() for i, j in pairs) / len(pairs) for p in outputs]
    gamma = cross_entropy_to_other_classes(logits, labels).mean(dim=1)
    torch.testing.assert_close(gamma, torch.stack(by_hand).float(), rtol=1e-5, atol=1e-5)


def test_gamma_of_a_batch_is_the_definition_up_to_pairs_of_one_class(labels) -> None:
    logits = _outputs(labels).clean
    statistics = ClassStatistics(E, C)
    statistics.add(logits, labels)
    different = 1 - statistics.class_shares().square().sum()
    gamma = cross_entropy_to_other_classes(logits, labels).mean(dim=1)
    torch.testing.assert_close(gamma.double() * different, statistics.gamma(), rtol=1e-5, atol=1e-5)


def test_gamma_has_no_gradient_through_its_second_argument(labels) -> None:
    logits = _outputs(labels).clean
    (gradient,) = torch.autograd.grad(cross_entropy_to_other_classes(logits, labels).sum(), logits)
    moving = logits.detach().clone().requires_grad_()
    fixed = logits.detach().log_softmax(-1)
    other = (labels[:, None] != labels).float()
    crossed = -(moving.softmax(-1) @ fixed.mT) * other
    (expected,) = torch.autograd.grad(crossed.sum() * B / other.sum(), moving)
    torch.testing.assert_close(gradient, expected)


def test_gamma_is_bounded_by_the_floor_and_0_in_a_batch_of_one_class() -> None:
    certain = torch.zeros(1, 2, C).scatter(2, torch.tensor([[[0], [1]]]), 1e4)
    gamma = cross_entropy_to_other_classes(certain, torch.tensor([0, 1]))
    torch.testing.assert_close(gamma, torch.full((1, 2), -np.log(1e-8)).float())
    assert not cross_entropy_to_other_classes(certain, torch.tensor([1, 1])).any()


def test_gradient_of_the_concentration_term_is_the_known_one(labels) -> None:
    """d KL(P || Q) / dz = P (ln P/Q - KL), with Q constant."""
    outputs, method = _outputs(labels), _method(weight=0.5)
    method.begin_epoch(0, 1, lambda _: _train_logits(_outputs(labels, seed=2)))
    (gradient,) = torch.autograd.grad(method.terms(outputs)["cmi"], outputs.variants)
    p = outputs.variants[0].detach().softmax(-1)
    ratio = (p / method.centroids.float()[:, labels]).log()
    kl = (p * ratio).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient[0], 0.5 * p * (ratio - kl) / B, rtol=1e-4, atol=1e-7)


def test_terms_are_weighted_and_summed_over_exits(labels) -> None:
    outputs = _outputs(labels)
    method = _method(weight=0.7, beta=0.2, exit_weights=(1.0, 2.0, 3.0), clean_weight=0.5)
    terms = method.terms(outputs)
    logits, w = outputs.attacked, torch.tensor([1.0, 2.0, 3.0])
    kl = kl_to_centroids(logits, torch.full((E, C, C), 1 / C), labels).mean(1)
    torch.testing.assert_close(terms["clean"], 0.5 * (w * outputs.cross_entropy(outputs.clean)).sum())
    torch.testing.assert_close(terms["attacked"], (w * outputs.cross_entropy(logits)).sum())
    torch.testing.assert_close(terms["cmi"], 0.7 * (w * kl).sum())
    gamma = cross_entropy_to_other_classes(logits, labels).mean(1)
    torch.testing.assert_close(terms["gamma"], -0.2 * (w * gamma).sum())


def test_without_an_attack_all_terms_are_those_of_the_clean_images(labels) -> None:
    outputs = _outputs(labels, attacked=False)
    terms = _method(clean_weight=0.5).terms(outputs)
    assert terms.keys() == {"clean", "cmi", "gamma"}
    torch.testing.assert_close(terms["clean"], outputs.cross_entropy(outputs.clean).sum())
    assert all(torch.autograd.grad(term, outputs.clean, retain_graph=True)[0].any() for term in terms.values())


def test_tied_exits_have_the_centroids_of_the_last_exit(labels) -> None:
    outputs = _outputs(labels)
    own, tied = _method(weight=1.0), _method(weight=1.0, tie="last")
    for method in (own, tied):
        method.begin_epoch(0, 1, lambda _: _train_logits(outputs))
    shared = own.centroids[-1:].expand(E, -1, -1)
    expected = kl_to_centroids(outputs.attacked, shared, labels).mean(1).sum()
    torch.testing.assert_close(tied.terms(outputs)["cmi"], expected)
    assert tied.terms(outputs)["cmi"] > own.terms(outputs)["cmi"]


def test_the_first_pass_sets_the_centroids_to_the_class_means(labels) -> None:
    method, outputs = _method(), _outputs(labels)
    method.begin_epoch(0, 5, lambda _: _train_logits(outputs))
    means = torch.stack([outputs.attacked.detach().softmax(-1)[:, labels == y].mean(1) for y in range(7)], dim=1)
    torch.testing.assert_close(method.centroids[:, :7].float(), means)
    kept = method.centroids.clone()
    method.begin_epoch(1, 5, lambda _: pytest.fail("only the first epoch takes a pass"))
    assert torch.equal(method.centroids, kept)


def test_moving_the_centroids_lowers_the_term_down_to_its_minimum_at_the_class_means(labels) -> None:
    """The alternating algorithm: both half-steps lower the same function."""
    outputs = _outputs(labels)
    method = _method(weight=1.0)
    method.begin_epoch(0, 1, lambda _: _train_logits(_outputs(labels, seed=5)))

    def value() -> float:
        return float(kl_to_centroids(outputs.attacked.detach(), method.centroids, labels).mean(1).sum())

    values = [value()]
    for _ in range(30):
        method.after_step(outputs)
        values.append(value())
    assert all(later < earlier for earlier, later in pairwise(values[:6]))
    statistics = ClassStatistics(E, C)
    statistics.add(outputs.attacked, labels)
    assert values[-1] == pytest.approx(float(statistics.cmi().sum()), rel=1e-3)
    assert min(values) >= float(statistics.cmi().sum()) - 1e-6


def test_moving_average_by_hand(labels) -> None:
    method = _method(omega=0.15)
    first, second = _outputs(labels), _outputs((labels + 2) % 7, seed=2)
    for outputs in (first, second):
        method.after_step(outputs)
    by_hand = torch.full((E, C, C), 1 / C)
    for outputs, keep in ((first, 1 / 10), (second, 0.15)):
        for y in range(7):
            mean = outputs.attacked.detach().softmax(-1)[:, outputs.labels == y].mean(1)
            by_hand[:, y] = keep * by_hand[:, y] + (1 - keep) * mean
    torch.testing.assert_close(method.centroids.float(), by_hand)
    assert (method.centroids[:, 7:] == 0.1).all()


def test_the_report_is_computed_from_the_logits_of_the_epoch(labels) -> None:
    method = _method()
    method.begin_epoch(0, 2, lambda _: _train_logits(_outputs(labels)))
    method.after_step(_outputs(labels, seed=9))
    method.begin_epoch(1, 2, lambda _: _train_logits(_outputs(labels)))
    batches = [_outputs(labels, seed=3), _outputs(labels[:13], seed=4)]
    for outputs in batches:
        method.after_step(outputs)
    p = torch.cat([outputs.attacked.detach() for outputs in batches], dim=1).double().softmax(-1)
    y = torch.cat([outputs.labels for outputs in batches])
    means = torch.stack([p[:, y == label].mean(1) for label in range(7)], dim=1)
    cmi = (p * (p / means[:, y]).log()).sum(-1).mean(1)
    crossed = -(p @ p.log().mT) * (y[:, None] != y)
    gamma = crossed.mean(dim=(1, 2))
    report = method.report()
    assert report["cmi"] == pytest.approx(cmi.tolist(), abs=2e-6)
    assert report["gamma"] == pytest.approx(gamma.tolist(), abs=2e-6)
    assert report["ncmi"] == pytest.approx((cmi / gamma).tolist(), abs=2e-6)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Real images and an untrained network."""
    torch.manual_seed(0)
    data = digits.load()
    index = splits.split(data).part("train")[:256]
    images = torch.from_numpy(data.batch(index, model_spec("digits-cnn").input))
    labels, places = torch.from_numpy(data.labels[index]), torch.from_numpy(index)
    return Batch(
        build_model("digits-cnn", C),
        images,
        labels,
        places,
        Attack("average", PGDConfig(0.1, 0.03, 5)),
        CounterRNG(0, 0),
    )


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_second_attack_maximises_the_terms_that_training_minimises(batch, beta) -> None:
    method = _method(attacks=2, weight=0.5, beta=beta)
    before = method.craft(batch)
    assert before is not None
    assert len(before) == 1, "without centroids there is no second attack"
    with torch.no_grad():
        logits = batch.model(batch.images)
    method.begin_epoch(0, 1, lambda _: iter([(logits, batch.labels)]))
    attacked = method.craft(batch)
    assert attacked is not None
    assert attacked.shape == (2, *batch.images.shape)
    assert (attacked - batch.images).abs().max() <= 0.1 + 1e-6
    assert torch.equal(attacked[0], before[0])

    def objective(images: Tensor) -> float:
        with torch.no_grad():
            logits = batch.model(images)
        kl = kl_to_centroids(logits, method.centroids, batch.labels).mean()
        return float(0.5 * kl - beta * cross_entropy_to_other_classes(logits, batch.labels).mean())

    assert objective(attacked[1]) > objective(attacked[0]) > objective(batch.images)


def test_the_second_attack_runs_in_train_mode_and_leaves_running_statistics_unchanged(batch) -> None:
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network = MultiExit([Stage(trunk, nn.Linear(144, C))], (1, 8, 8), C)
    method = build_method("cmic", {"attacks": 2})
    method.setup(Setup(network.exits, C, model=network))
    method.begin_epoch(0, 1, lambda _: iter([(network(batch.images).detach(), batch.labels)]))
    before = {name: value.clone() for name, value in network.named_buffers()}
    modes = []
    hook = trunk[1].register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    network.eval()
    method.craft(replace(batch, model=network))
    hook.remove()
    assert modes[-1], "the second attack ran in eval mode"
    assert not modes[0], "the first attack follows `craft_train_mode`"
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_fixed_running_statistics_normalise_by_the_batch() -> None:
    norm = nn.BatchNorm1d(2)
    images = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    with fixed_running_statistics(norm):
        outputs = norm(images)
    torch.testing.assert_close(outputs.detach(), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4, rtol=0)
    assert norm.track_running_stats
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0


def test_with_two_attacks_concentration_and_separation_are_those_of_the_second(labels) -> None:
    first, second = _outputs(labels), _outputs(labels, seed=2)
    variants = torch.cat([first.variants.detach(), second.variants.detach()]).requires_grad_()
    outputs = make_outputs(first.clean, variants, labels=labels)
    terms = _method(attacks=2).terms(outputs)
    for name, used in (("attacked", 0), ("cmi", 1), ("gamma", 1)):
        (gradient,) = torch.autograd.grad(terms[name], variants, retain_graph=True)
        assert gradient[used].any(), name
        assert not gradient[1 - used].any(), name


def test_state_is_complete(labels) -> None:
    straight, first, second = (_method() for _ in range(3))
    for step in range(4):
        for method in (straight, first if step < 2 else second):
            method.after_step(_outputs(labels, seed=step))
        if step == 1:
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in straight.state_dict().items())
    assert straight.report() == second.report()


def test_a_run_killed_in_an_epoch_logs_and_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures and long attacks would take most of the time
    given = SHORT | {"epochs": 2, "fraction": 0.15, "selection_steps": 1, "options": {"attacks": 2}}
    train_model(settings=given, out=tmp_path / "straight", options=TrainOptions(threads=1))
    steps = iter(range(100))
    stopped = train_model(
        settings=given,
        out=tmp_path / "stopped",
        options=TrainOptions(threads=1, should_stop=lambda: next(steps) == 2),
    )
    assert not stopped.finished
    assert train_model(out=tmp_path / "stopped", resume=True, options=TrainOptions(threads=1)).finished
    logs = [(tmp_path / name / checkpoint.LOG).read_bytes() for name in ("straight", "stopped")]
    assert logs[0] == logs[1]
    weights = [load_file(tmp_path / name / checkpoint.WEIGHTS) for name in ("straight", "stopped")]
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())


def _trained(batch: Batch, weight: float, beta: float) -> ClassStatistics:
    """Statistics of the outputs of a small network after 150 steps on all of `batch`."""
    torch.manual_seed(0)
    trunks = [nn.Sequential(nn.Flatten(), nn.Linear(width, 32), nn.ReLU()) for width in (64, 32)]
    network = MultiExit([Stage(trunk, nn.Linear(32, C)) for trunk in trunks], (1, 8, 8), C)
    method = _method(2, weight=weight, beta=beta)
    method.begin_epoch(0, 1, lambda _: iter([(network(batch.images).detach(), batch.labels)]))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(150):
        outputs = make_outputs(network(batch.images), labels=batch.labels)
        optimiser.zero_grad()
        torch.stack(list(method.terms(outputs).values())).sum().backward()
        optimiser.step()
        method.after_step(outputs)
    statistics = ClassStatistics(2, C)
    statistics.add(network(batch.images), batch.labels)
    return statistics


def test_training_concentrates_and_separates_the_classes(batch) -> None:
    plain, concentrated, separated = (_trained(batch, weight, beta) for weight, beta in ((0, 0), (1, 0), (1, 0.1)))
    assert (concentrated.cmi() < 0.8 * plain.cmi()).all()
    assert (concentrated.ncmi() < 0.8 * plain.ncmi()).all()
    assert (separated.gamma() > concentrated.gamma()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": 3}, "one of 1, 2"),
        ({"tie": "first"}, "own, last"),
        ({"omega": 1.0}, "omega"),
        ({"beta": -1.0}, "at least 0"),
        ({"exit_weights": (1.0,)}, "3 exits"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        _method(**options)

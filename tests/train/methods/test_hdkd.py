"""HDKD: the weights follow the finite differences of the validation loss; the terms are those of the paper."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from method_outputs import make_outputs
from torch import Tensor, nn

from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, Stage, build_model, model_spec
from mexit.train.config import resolve
from mexit.train.methods import Outputs, build_method
from mexit.train.methods.base import Adaptation, Setup
from mexit.train.methods.hdkd import HDKD, balanced_loss, hypergradient, teacher_pairs
from mexit.train.precision import Precision

E, B, LR = 3, 24, 0.5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, selection images and labels; float64."""
    found = digits.load()
    cut = splits.split(found)
    parts = []
    for name in ("train", "selection"):
        index = cut.part(name)[:B]
        images = torch.from_numpy(found.batch(index, model_spec("digits-cnn").input))
        parts += [images.double(), torch.from_numpy(found.labels[index])]
    return tuple(parts)


@pytest.fixture
def model() -> MultiExit:
    """A small network with BatchNorm, whose double backward pass and statistics are the difficult part."""
    torch.manual_seed(0)
    trunks = [nn.Sequential(nn.Conv2d(i, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for i in (1, 4, 4)]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)) for _ in range(E)]
    stages = [Stage(trunk, head) for trunk, head in zip(trunks, heads, strict=True)]
    return MultiExit(stages, (1, 8, 8), 10).double().train()


def _method(**options: object) -> HDKD:
    method = build_method("hdkd", options)
    assert isinstance(method, HDKD)
    method.setup(Setup(E, 10))
    return method


def _outputs(model: MultiExit, images: Tensor, labels: Tensor, attacked: Tensor | None = None) -> Outputs:
    return make_outputs(model(images), attacked, labels=labels, images=images)


def _one_step_ahead(
    model: MultiExit, loss: Callable[[MultiExit], Tensor], validation_loss: Callable[[MultiExit], Tensor]
) -> float:
    """L_val after one step of gradient descent on `loss`, computed with a plain copy of the network."""
    ahead = copy.deepcopy(model)
    gradients = torch.autograd.grad(loss(ahead), list(ahead.parameters()))
    with torch.no_grad():
        for parameter, step in zip(ahead.parameters(), gradients, strict=True):
            parameter -= LR * step
        return float(validation_loss(ahead))


def _differences(function: Callable[[Tensor], float], gamma: Tensor, width: float) -> Tensor:
    """Central finite differences."""
    moves = width * torch.eye(len(gamma), dtype=gamma.dtype)
    slopes = [(function(gamma + move) - function(gamma - move)) / (2 * width) for move in moves]
    return torch.tensor(slopes, dtype=torch.float64)


def test_hypergradient_equals_finite_differences_in_float64(model, data) -> None:
    images, labels, held_images, held_labels = data

    def losses(logits: Tensor) -> Tensor:
        plain = [F.cross_entropy(exit_logits, labels) for exit_logits in logits]
        soft = [F.cross_entropy(logits[i], logits[j].detach().softmax(-1)) for i, j in teacher_pairs(E)]
        return torch.stack(plain + soft)

    def validation_loss(logits: Tensor) -> Tensor:
        held = torch.stack([F.cross_entropy(exit_logits, held_labels) for exit_logits in logits])
        return balanced_loss(held, torch.full_like(held, 2.0), 0.5)

    gamma = torch.linspace(0.2, 1.4, 6, dtype=torch.float64).requires_grad_()
    gradient = hypergradient(
        model, (gamma * losses(model(images))).sum(), gamma, LR, held_images, validation_loss, nullcontext
    )

    def after(weights: Tensor) -> float:
        return _one_step_ahead(
            model, lambda net: (weights * losses(net(images))).sum(), lambda net: validation_loss(net(held_images))
        )

    expected = _differences(after, gamma.detach(), 1e-5)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("positive", ["clamp", "softplus"])
@pytest.mark.parametrize("variant", ["hdkd", "hmsdnet", "hdbt"])
def test_gamma_moves_against_the_finite_differences(model, data, variant, positive) -> None:
    images, labels, *held = data
    method = _method(variant=variant, positive=positive, start="uniform", gamma_lr=0.5, temperature=2.0)
    before = method.gamma()
    # The first batch initialises the moving average that each exit is compared with.
    first = torch.stack([F.cross_entropy(logits, held[1]) for logits in _ahead_logits(model, method, data)])

    def after(raw: Tensor) -> float:
        weights = F.softplus(raw) if positive == "softplus" else raw
        return _one_step_ahead(
            model,
            lambda net: (weights * method.losses(_outputs(net, images, labels))).sum(),
            lambda net: balanced_loss(
                torch.stack([F.cross_entropy(logits, held[1]) for logits in net(held[0])]), first, 0.5
            ),
        )

    raw = method.raw.clone()
    slope = _differences(after, raw.double(), 1e-2).float()
    method.adapt(_outputs(model, images, labels), Adaptation(model, LR, lambda: tuple(held), nullcontext))
    torch.testing.assert_close(method.raw - raw, -0.5 * slope, rtol=0.02, atol=1e-4)
    assert (method.gamma() - before).abs().max() > 1e-3


def _ahead_logits(model: MultiExit, method: HDKD, data: tuple[Tensor, ...]) -> Tensor:
    images, labels, held_images, _ = data
    kept = []

    def validation_loss(net: MultiExit) -> Tensor:
        kept.append(net(held_images))
        return kept[0].sum()

    _one_step_ahead(
        model, lambda net: (method.gamma() * method.losses(_outputs(net, images, labels))).sum(), validation_loss
    )
    return kept[0]


def test_adapt_leaves_the_network_unchanged_and_its_graph_usable(model, data) -> None:
    images, labels, *held = data
    outputs = _outputs(model, images, labels)
    before = copy.deepcopy(model.state_dict())
    method = _method()
    method.adapt(outputs, Adaptation(model, LR, lambda: tuple(held), nullcontext))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    torch.stack(list(method.terms(outputs).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bf16_gives_nearly_the_same_gradient(data) -> None:
    torch.manual_seed(0)
    network = build_model("digits-cnn", 10).train()
    images, labels, *held = [part.float() if part.is_floating_point() else part for part in data]
    moved = []
    for recipe in (Precision("cpu", False, False), Precision("cpu", True, True)):
        recipe.prepare(network)
        method = _method(start="uniform", gamma_lr=1e-3)
        with recipe.autocast():
            logits = network(recipe.to_device(images)).float()
        outputs = make_outputs(logits, labels=labels)
        method.adapt(outputs, Adaptation(network, 1e-3, lambda: tuple(held), recipe.autocast))
        moved.append(method.gamma() - 1)
    assert F.cosine_similarity(*moved, dim=0) > 0.98


@pytest.mark.parametrize("positive", ["clamp", "softplus"])
def test_gamma_stays_at_least_0(model, data, positive) -> None:
    images, labels, *held = data
    method = _method(positive=positive, start="uniform", gamma_lr=1e5)
    adaptation = Adaptation(model, 1e-2, lambda: tuple(held), nullcontext)
    for _ in range(4):
        method.adapt(_outputs(model, images, labels), adaptation)
        assert (method.gamma() >= 0).all()
    assert method.gamma().min() < 1e-2, "no weight came near the bound"


def test_weights_move_only_at_every_nth_step(model, data) -> None:
    images, labels, *held = data
    method = _method(every=3)
    adaptation = Adaptation(model, LR, lambda: tuple(held), nullcontext)
    seen = []
    for _ in range(7):
        before = method.gamma()
        method.adapt(_outputs(model, images, labels), adaptation)
        seen.append(not torch.equal(before, method.gamma()))
    assert seen == [True, False, False, True, False, False, True]


def test_state_has_weights_average_and_step(model, data) -> None:
    images, labels, *held = data
    adaptation = Adaptation(model, LR, lambda: tuple(held), nullcontext)
    straight, first, second = (_method(every=2) for _ in range(3))
    for step in range(5):
        for method in (straight, first if step < 3 else second):
            method.adapt(_outputs(model, images, labels), adaptation)
        if step == 2:
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert straight.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in straight.state_dict().items())
    assert not torch.equal(first.gamma(), second.gamma())


def test_one_exit_is_plain_cross_entropy(data) -> None:
    images, labels, *held = data
    network = build_model("digits-cnn-single", 10).double()
    method = _method()
    method.setup(Setup(1, 10))
    outputs = _outputs(network, images, labels)
    method.adapt(outputs, Adaptation(network, LR, lambda: tuple(held), nullcontext))
    assert method.terms(outputs).keys() == {"ce"}
    torch.testing.assert_close(method.terms(outputs)["ce"], F.cross_entropy(outputs.clean[0].float(), labels))


def test_loss_by_hand_and_no_gradient_reaches_the_teacher(model, data) -> None:
    images, labels, *_ = data
    outputs = _outputs(model, images, labels)
    outputs.clean.retain_grad()
    clean = outputs.clean.detach()
    method = _method(start="uniform", temperature=3.0)
    terms = method.terms(outputs)
    expected = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for row in range(B):
            p = (clean[j, row] / 3).softmax(-1)
            expected += 9 * float(-(p * (clean[i, row] / 3).log_softmax(-1)).sum()) / B
    assert float(terms["kd"].detach()) == pytest.approx(expected, rel=1e-5)
    plain = [float(F.cross_entropy(logits, labels)) for logits in clean]
    assert float(terms["ce"].detach()) == pytest.approx(sum(plain), rel=1e-5)
    terms["kd"].backward()
    assert outputs.clean.grad is not None
    assert not outputs.clean.grad[-1].any()
    assert outputs.clean.grad[:-1].any(dim=(1, 2)).all()


def test_attacked_images_add_their_own_losses(model, data) -> None:
    images, labels, *_ = data
    attacked = model((images + 0.1).clamp(0, 1))
    method = _method()
    both = method.losses(_outputs(model, images, labels, attacked))
    alone = method.losses(_outputs(model, images, labels))
    other = method.losses(make_outputs(attacked, labels=labels))
    torch.testing.assert_close(both, alone + other)


def test_balanced_loss() -> None:
    losses, expected = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 2.0])
    torch.testing.assert_close(balanced_loss(losses, expected, 1.0), losses.sum())
    by_hand = math.log(2) + math.log1p(math.exp(-0.5))
    torch.testing.assert_close(balanced_loss(losses, expected, 0.0), torch.tensor(by_hand))


def test_the_expected_loss_is_a_moving_average(model, data) -> None:
    """With a step size of 0 the network stays, so only the selection batches differ."""
    images, labels, held_images, held_labels = data
    method = _method(ema=0.75)
    losses = []
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        with torch.no_grad():
            logits = model(held_images[rows])
        losses.append(torch.stack([F.cross_entropy(exit_logits, held_labels[rows]) for exit_logits in logits]))
        held = held_images[rows], held_labels[rows]
        outputs = _outputs(model, images, labels)
        method.adapt(outputs, Adaptation(model, 0.0, lambda held=held: held, nullcontext))
    expected = 0.75 * (0.75 * losses[0] + 0.25 * losses[1]) + 0.25 * losses[2]
    torch.testing.assert_close(method.expected.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "gamma"),
    [
        ({}, [1, 1, 1, 0, 1, 1]),
        ({"start": "ce"}, [1, 1, 1, 0, 0, 0]),
        ({"variant": "naive"}, [1, 1, 1, 1, 1, 1]),
        ({"variant": "hmsdnet"}, [1, 1, 1]),
        ({"variant": "hdbt"}, [1, 1, 1, 1, 1]),
        ({"frozen": (1, 2, 3, 0, 4, 5), "positive": "softplus"}, [1, 2, 3, 0, 4, 5]),
    ],
    ids=str,
)
def test_first_weights_of_the_variants(options, gamma) -> None:
    assert _method(**options).gamma().tolist() == gamma


@pytest.mark.parametrize("options", [{"variant": "naive"}, {"frozen": (1, 2, 3, 0, 4, 5)}], ids=str)
def test_constant_weights_stay(model, data, options) -> None:
    images, labels, *held = data
    method = _method(**options)
    before = method.gamma()
    method.adapt(_outputs(model, images, labels), Adaptation(model, LR, lambda: tuple(held), nullcontext))
    assert torch.equal(method.gamma(), before)


def test_softplus_starts_at_the_first_weights() -> None:
    gamma = _method(positive="softplus").gamma()
    torch.testing.assert_close(gamma, torch.tensor([1, 1, 1, 1e-3, 1, 1]))


def test_the_log_line_has_both_kinds_of_weights() -> None:
    assert _method().report() == {"gamma ce": [1, 1, 1], "gamma kd": [0, 1, 1]}
    assert _method(variant="hmsdnet").report() == {"gamma ce": [1, 1, 1]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "hdk"}, "naive"),
        ({"start": "random"}, "uniform"),
        ({"frozen": (1.0, 2.0)}, "6 weights"),
        ({"frozen": (1, 1, 1, 1, 1, -1)}, "at least 0"),
        ({"alpha": 1.5}, r"\[0, 1\]"),
        ({"every": 0}, "every"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        _method(**options)


@pytest.mark.parametrize("data_set", ["cifar10", "cifar100"])
def test_published_schedule(data_set) -> None:
    found = resolve(data_set, "hdkd", {})
    assert (found.method, found.attack, found.model) == ("hdkd", "none", f"msdnet-{data_set}")
    assert (found.epochs, found.batch, found.lr, found.weight_decay) == (300, 128, 0.1, 1e-4)
    rates = [found.lr_at(epoch / 300) for epoch in (149, 150, 224, 225)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert resolve(data_set, "hdkd", {"method": "clean"}).method == "clean"

"""AutoAttack and Square by their authors' package: what the wrapper promises around it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mexit.attacks.autoattack import Effort, OneExit, auto_attack, square
from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy
from mexit.core.bundle import Bundle
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint

torch.set_num_threads(1)
EPS = 0.1
LITTLE = Effort(steps=5, queries=20, targets=2)


@pytest.fixture(scope="module")
def model(workspace: Path) -> MultiExit:
    return checkpoint.load_model(workspace / "runs/digits")[0]


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    data = digits.load()
    index = splits.split(data).part("test")[:12]
    images = data.batch(index, model_spec("digits-cnn").input)
    return torch.from_numpy(images), torch.from_numpy(data.labels[index])


@pytest.fixture(scope="module")
def deployed(model: MultiExit, digits_bundle: Path, batch: tuple[Tensor, Tensor]) -> DeployedPolicy:
    entry = Bundle.open(digits_bundle).policies().entries[0]
    policy = entry.policy(entry.frontier[entry.named["low"]])
    with torch.no_grad():
        return DeployedPolicy(model, SoftPolicy.fit(policy, model(batch[0])))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("target", ["exit 1", "exit 3", "policy"])
def test_attacked_images_are_allowed_and_do_what_is_claimed(model, deployed, batch, target, norm) -> None:
    images, labels = batch
    eps = EPS if norm == "linf" else 1.0
    network = deployed if target == "policy" else OneExit(model, int(target[-1]))
    lines: list[str] = []
    found = auto_attack(network, images, labels, eps, norm=norm, effort=LITTLE, note=lines.append)
    change = (found.images - images).flatten(1)
    assert change.norm(dim=1, p=2 if norm == "l2" else torch.inf).max() <= eps + 1e-5
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    with torch.no_grad():
        before, after = network(images).argmax(dim=1) == labels, network(found.images).argmax(dim=1) == labels
    assert torch.equal(found.standing, after)
    assert after.sum() < before.sum(), "nothing was broken"
    assert torch.equal(found.images[after], images[after]), "what still stands was changed for nothing"
    assert len(lines) == 4 or not found.standing.any(), "parts were left out though somebody stood"
    assert not found.flags


def test_the_same_seed_gives_the_same_images_and_nobody_elses_randomness_moves(model, batch) -> None:
    network, state = OneExit(model, 1), torch.get_rng_state()
    first, again = (auto_attack(network, *batch, EPS, effort=LITTLE).images for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_network_log_and_tracing_are_left_as_they_were(model, batch) -> None:
    log, trace = logging.getLogger("auto-attack"), sys.gettrace()
    before = log.level, log.propagate, list(log.handlers)

    def mine(*_: object) -> None:
        return None

    model.train()
    sys.settrace(mine)
    try:
        auto_attack(OneExit(model, 2), *batch, EPS, effort=Effort(1, 1, 1))
        kept = sys.gettrace()
    finally:
        sys.settrace(trace)
    assert kept is mine, "a debugger or coverage would have gone blind"
    assert model.training
    model.eval()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert (log.level, log.propagate, log.handlers) == before


class Levels(nn.Module):
    """Rounds pixels: almost everywhere without a gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return (images * 4).round() / 4


def test_masked_gradients_are_flagged(batch) -> None:
    torch.manual_seed(0)
    model = build_model("digits-cnn", 10).eval()
    model.normalise = Levels()
    images = batch[0]
    with torch.no_grad():
        labels = model(images)[0].argmax(dim=1)
    found = auto_attack(OneExit(model, 1), images, labels, EPS, effort=LITTLE)
    assert any("zero gradient" in flag for flag in found.flags)


def test_square_needs_answers_alone(model, batch) -> None:
    images, labels = batch
    asked = []

    def answers(pixels: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(len(pixels))
        return logits[0] if len(pixels) == 0 else model.forward_exit(pixels, 1)

    logits = torch.zeros(1, 0, 10)
    attacked = square(answers, images, labels, 0.3, queries=60)
    assert (attacked - images).abs().max() <= 0.3 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    with torch.no_grad():
        before, after = (model.forward_exit(one, 1).argmax(dim=1) == labels for one in (images, attacked))
    assert after.sum() < before.sum()
    assert sum(asked) <= len(images) * (60 + 4)


def test_square_cannot_spoil_what_it_was_given(model, batch) -> None:
    """It writes minus infinity into the logits that it gets; those may be somebody's."""
    images, labels = batch
    with torch.no_grad():
        stored = model.forward_exit(images, 1)
    before = stored.clone()
    square(lambda pixels: stored[: len(pixels)], images, labels, EPS, queries=2)
    assert torch.equal(stored, before)


def test_only_the_standard_version_is_called_autoattack() -> None:
    assert Effort().describe(10).startswith("AutoAttack, standard version: apgd-ce + apgd-t + fab-t + square, 100")
    for effort, classes in ((Effort(steps=10), 10), (Effort(queries=100), 10), (Effort(), 3)):
        assert effort.describe(classes).startswith("reduced AutoAttack")
    assert "apgd-t" not in Effort().describe(3), "its loss needs four classes"
    assert "5 targets" in Effort().describe(6)


def test_what_cannot_be_attacked_is_refused(model, batch) -> None:
    with pytest.raises(UsageError, match="exits 1 to 3"):
        OneExit(model, 4)
    with pytest.raises(UsageError, match="linf, l2"):
        auto_attack(OneExit(model, 1), *batch, EPS, norm="l1", effort=LITTLE)
    with pytest.raises(UsageError, match="at least 1"):
        Effort(steps=0)

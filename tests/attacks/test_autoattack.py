"""The wrapper of the AutoAttack package."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mexit.attacks.autoattack import AutoAttackConfig, ExitClassifier, auto_attack
from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy
from mexit.core.bundle import Bundle
from mexit.data import digits, splits
from mexit.errors import UsageError
from mexit.models import MultiExit, build_model, model_spec
from mexit.train import checkpoint

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
EPS = 0.1
REDUCED = AutoAttackConfig(steps=5, queries=20, targets=2)


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
def test_attacked_images_are_valid_and_robust_samples_are_unchanged(model, deployed, batch, target, norm) -> None:
    images, labels = batch
    eps = EPS if norm == "linf" else 1.0
    network = deployed if target == "policy" else ExitClassifier(model, int(target[-1]))
    lines: list[str] = []
    result = auto_attack(network, images, labels, eps, norm=norm, config=REDUCED, on_message=lines.append)
    change = (result.images - images).flatten(1)
    assert change.norm(dim=1, p=2 if norm == "l2" else torch.inf).max() <= eps + 1e-5
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    with torch.no_grad():
        before, after = network(images).argmax(dim=1) == labels, network(result.images).argmax(dim=1) == labels
    assert torch.equal(result.robust, after)
    assert after.sum() < before.sum(), "no attack succeeded"
    assert torch.equal(result.images[after], images[after]), "an image was changed without success"
    assert len(lines) == 4 or not result.robust.any(), "a part did not run"
    assert not result.warnings


def test_the_same_seed_gives_the_same_images_and_leaves_the_global_generator_unchanged(model, batch) -> None:
    network, state = ExitClassifier(model, 1), torch.get_rng_state()
    first, again = (auto_attack(network, *batch, EPS, config=REDUCED).images for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_network_log_and_trace_function_are_restored(model, batch) -> None:
    log, trace = logging.getLogger("auto-attack"), sys.gettrace()
    before = log.level, log.propagate, list(log.handlers)

    def trace_function(*_: object) -> None:
        return None

    model.train()
    sys.settrace(trace_function)
    try:
        auto_attack(ExitClassifier(model, 2), *batch, EPS, config=AutoAttackConfig(1, 1, 1))
        kept = sys.gettrace()
    finally:
        sys.settrace(trace)
    assert kept is trace_function, "debuggers and coverage tools stop working"
    assert model.training
    model.eval()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert (log.level, log.propagate, log.handlers) == before


class Rounding(nn.Module):
    """Rounds pixels, so that the gradient is 0 almost everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        return (images * 4).round() / 4


def test_masked_gradients_give_a_warning(batch) -> None:
    torch.manual_seed(0)
    model = build_model("digits-cnn", 10).eval()
    model.normalise = Rounding()
    images = batch[0]
    with torch.no_grad():
        labels = model(images)[0].argmax(dim=1)
    result = auto_attack(ExitClassifier(model, 1), images, labels, EPS, config=REDUCED)
    assert any("zero gradient" in warning for warning in result.warnings)


def test_only_the_standard_version_is_called_autoattack() -> None:
    assert (
        AutoAttackConfig()
        .describe(10)
        .startswith("AutoAttack, standard version: apgd-ce + apgd-t + fab-t + square, 100")
    )
    for config, classes in (
        (AutoAttackConfig(steps=10), 10),
        (AutoAttackConfig(queries=100), 10),
        (AutoAttackConfig(), 3),
    ):
        assert config.describe(classes).startswith("reduced AutoAttack")
    assert "apgd-t" not in AutoAttackConfig().describe(3), "its loss needs four classes"
    assert "5 targets" in AutoAttackConfig().describe(6)


def test_unknown_exits_norms_and_strengths_are_refused(model, batch) -> None:
    with pytest.raises(UsageError, match="exits 1 to 3"):
        ExitClassifier(model, 4)
    with pytest.raises(UsageError, match="linf, l2"):
        auto_attack(ExitClassifier(model, 1), *batch, EPS, norm="l1", config=REDUCED)
    with pytest.raises(UsageError, match="at least 1"):
        AutoAttackConfig(steps=0)

"""AutoAttack by its authors' package, on one exit or on a deployed policy.

F. Croce, M. Hein: Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks,
ICML 2020. The package is `pyautoattack` (extra `eval`). `torchattacks` has a class of the same name with 10 steps
instead of 100, which is not the standard AutoAttack.

The standard version is a cascade: APGD on cross-entropy, APGD on the targeted DLR loss (9 target classes), FAB (9
target classes), each with 100 steps, then Square with 5,000 queries. Every attack runs only on the samples that are
still classified correctly.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mexit.attacks.pgd import frozen
from mexit.attacks.soft_policy import DeployedPolicy
from mexit.errors import UsageError, missing_extra
from mexit.models.multi_exit import MultiExit

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
_NORMS = {"linf": "Linf", "l2": "L2"}  # our names to those of the package
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class AutoAttackConfig:
    """Strength of AutoAttack. The defaults are the standard version; reports call anything less "reduced".

    Attributes:
        steps: steps of APGD and FAB.
        queries: queries of Square per sample.
        targets: target classes of APGD-T and FAB-T; at most C - 1 are used.
        batch: images per forward pass.
        seed: seed of every part.
    """

    steps: int = 100
    queries: int = 5000
    targets: int = 9
    batch: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.queries, self.targets, self.batch) < 1 or self.seed < 0:
            raise UsageError(f"steps, queries, targets and batch must be at least 1 and seed at least 0: {self}")

    def describe(self, classes: int) -> str:
        """The attack as reports print it, for a network of `classes` classes."""
        standard = (self.steps, self.queries, self.targets) == (100, 5000, 9) and classes > 3
        name = "AutoAttack, standard version" if standard else "reduced AutoAttack"
        parts = " + ".join(_parts(classes))
        targets = min(self.targets, classes - 1)
        return f"{name}: {parts}, {self.steps} steps, {targets} targets, {self.queries} queries, seed {self.seed}"


@dataclass(frozen=True)
class AutoAttackResult:
    """The outcome of AutoAttack.

    Attributes:
        images: (N, C, H, W); unchanged where no part succeeded.
        robust: whether the prediction is still correct, (N,) bool.
        warnings: warnings of the package, such as zero gradients.
    """

    images: Tensor
    robust: Tensor
    warnings: tuple[str, ...]


class ExitClassifier(nn.Module):
    """Exit k (from 1) of a network as a classifier: images to logits (B, C).

    Raises:
        UsageError: the network has no exit k.
    """

    def __init__(self, model: MultiExit, k: int) -> None:
        super().__init__()
        if not 1 <= k <= model.exits:
            raise UsageError(f"there is no exit {k}: this network has exits 1 to {model.exits}")
        self.model, self.k = model, k

    def forward(self, images: Tensor) -> Tensor:
        """Images to a new tensor (B, C) float32 (Square writes into it)."""
        return self.model.forward_exit(images, self.k).float().clone()


def auto_attack(
    network: ExitClassifier | DeployedPolicy,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    config: AutoAttackConfig | None = None,
    on_message: OnMessage | None = None,
) -> AutoAttackResult:
    """Run AutoAttack on a classifier.

    Args:
        network: the classifier; it runs in eval mode.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64.
        eps: radius, a fraction of the pixel range.
        norm: "linf" or "l2".
        config: strength; None = the standard version.
        on_message: called with a line of text after each part.

    Raises:
        MissingExtra: `pyautoattack` is not installed.
    """
    config = config or AutoAttackConfig()
    package = import_pyautoattack()
    with _captured_log(on_message) as warnings, frozen(network.model, train_mode=False), torch.random.fork_rng():
        with torch.no_grad():
            classes = network(images[:1]).shape[-1]
        attack = package.AutoAttack(
            network,
            norm=package_norm(norm),
            eps=eps,
            seed=config.seed,
            device=images.device,
            version="custom",
            attacks=list(_parts(classes)),
        )
        _configure(attack, config, classes)
        attacked, _ = attack.run_standard_evaluation(images, labels, batch_size=config.batch)
        with torch.no_grad():
            predictions = [network(part).argmax(dim=-1) for part in attacked.split(config.batch)]
    return AutoAttackResult(attacked.detach(), torch.cat(predictions) == labels, tuple(warnings))


def import_pyautoattack() -> ModuleType:
    """The package `pyautoattack` with its Square attack. Raises `MissingExtra` if it is not installed."""
    try:
        import pyautoattack
        import pyautoattack.square
    except ImportError as error:
        raise missing_extra(error.name or "pyautoattack", "eval", "AutoAttack and Square") from None
    module: ModuleType = pyautoattack
    return module


def package_norm(norm: str) -> str:
    """The package's name of a norm. Raises `UsageError` for norms that AutoAttack does not have."""
    if norm not in _NORMS:
        raise UsageError(f"AutoAttack is run in the norms {', '.join(_NORMS)}, found '{norm}'")
    return _NORMS[norm]


def _parts(classes: int) -> tuple[str, ...]:
    """The attacks of the cascade; the targeted DLR loss needs four classes."""
    return PARTS if classes > 3 else tuple(part for part in PARTS if part != "apgd-t")


def _configure(attack: Any, config: AutoAttackConfig, classes: int) -> None:
    """Set the parameters that the package sets for its version "standard", with the given strength."""
    for apgd in (attack.apgd, attack.apgd_targeted):
        apgd.n_restarts, apgd.n_iter = 1, config.steps
        # Checkpoints for halving the step size. The package computes them from n_iter before it can be changed.
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (
            max(int(share * config.steps), 1) for share in (0.22, 0.06, 0.03)
        )
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(config.targets, classes - 1)
    attack.fab.n_restarts, attack.fab.n_iter = 1, config.steps
    attack.square.n_queries = config.queries


@contextmanager
def _captured_log(on_message: OnMessage | None) -> Iterator[list[str]]:
    """Collect the package's warnings, pass its progress lines to `on_message`, and print nothing.

    The package also removes the trace function of debuggers and coverage tools; it is restored.
    """
    warnings: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                if text not in warnings:
                    warnings.append(text)
            elif on_message is not None and text.startswith("robust accuracy after"):
                on_message(text)

    log, handler, trace = logging.getLogger("auto-attack"), Handler(), sys.gettrace()
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield warnings
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        sys.settrace(trace)

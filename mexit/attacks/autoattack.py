"""AutoAttack and Square by the authors' own package, on one exit or on a whole deployed policy.

F. Croce, M. Hein: Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, ICML 2020; M. Andriushchenko et al.: Square Attack, ECCV 2020. The package is `pyautoattack` (extra
`eval`; its wheel weighs 42 MB, nearly all of it an example network that nothing here reads). `torchattacks` has a
class of the same name that takes 10 steps where the authors take 100; it is not AutoAttack.

The standard version is a cascade: APGD on cross-entropy, APGD on the targeted DLR loss (9 targets), FAB (9
targets), each of 100 steps, then Square with 5,000 queries; every part sees only what the parts before it left
standing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mexit.attacks.multi_exit_attack import frozen
from mexit.attacks.soft_policy import DeployedPolicy
from mexit.errors import UsageError, missing_extra
from mexit.models.multi_exit import MultiExit

NORMS = {"linf": "Linf", "l2": "L2"}
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
Answers = Callable[[Tensor], Tensor]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How hard to try. The defaults are the standard version; anything less is not AutoAttack and is named so.

    Attributes:
        steps: of APGD and FAB.
        queries: of Square.
        targets: classes that APGD-T and FAB-T aim at, at most C - 1.
        batch: images at a time.
        seed: of every part.
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
        """As reports name it, for a network of `classes` classes."""
        standard = (self.steps, self.queries, self.targets) == (100, 5000, 9) and classes > 3
        name = "AutoAttack, standard version" if standard else "reduced AutoAttack"
        parts = " + ".join(_parts(classes))
        targets = min(self.targets, classes - 1)
        return f"{name}: {parts}, {self.steps} steps, {targets} targets, {self.queries} queries, seed {self.seed}"


@dataclass(frozen=True)
class AutoAttacked:
    """What came out.

    Attributes:
        images: (N, C, H, W); a sample that no part could change is as it was.
        standing: (N,) bool, whether the answer is still right, by the logits that were attacked.
        flags: warnings of the package, such as zero gradients; empty where it had none.
    """

    images: Tensor
    standing: Tensor
    flags: tuple[str, ...]


class OneExit(nn.Module):
    """Exit k (from 1) of a network as a classifier: images to logits (B, C)."""

    def __init__(self, model: MultiExit, k: int) -> None:
        super().__init__()
        if not 1 <= k <= model.exits:
            raise UsageError(f"there is no exit {k}: this network has exits 1 to {model.exits}")
        self.model, self.k = model, k

    def forward(self, images: Tensor) -> Tensor:
        """A new tensor each time: Square writes into it."""
        return self.model.forward_exit(images, self.k).float().clone()


def auto_attack(
    network: OneExit | DeployedPolicy,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    effort: Effort | None = None,
    note: Note | None = None,
) -> AutoAttacked:
    """Attack a classifier.

    Args:
        network: one exit of a run, or the deployed policy of a bundle; run in eval mode.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64.
        eps: radius, a fraction of the pixel range.
        norm: "linf" or "l2".
        effort: None = the standard version.
        note: called with a line after each part.

    Raises:
        MissingExtra: `pyautoattack` is not installed.
    """
    effort = effort or Effort()
    package = need_package()
    with _quiet(note) as flags, frozen(network.model, train_mode=False), torch.random.fork_rng():
        with torch.no_grad():
            classes = network(images[:1]).shape[-1]
        attack = package.AutoAttack(
            network,
            norm=_norm(norm),
            eps=eps,
            seed=effort.seed,
            device=images.device,
            version="custom",
            attacks=list(_parts(classes)),
        )
        _set(attack, effort, classes)
        attacked, _ = attack.run_standard_evaluation(images, labels, batch_size=effort.batch)
        with torch.no_grad():
            answers = [network(part).argmax(dim=-1) for part in attacked.split(effort.batch)]
    return AutoAttacked(attacked.detach(), torch.cat(answers) == labels, tuple(flags))


def square(
    answers: Answers,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    queries: int = 5000,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """Square alone, which needs answers and no gradient: (N, C, H, W).

    Args:
        answers: images (B, C, H, W) to logits (B, C); may be any program, such as a served bundle.
        images, labels, eps, norm: see `auto_attack`.
        queries: for each sample and restart.
        restarts: with other random numbers, on the samples that still stand.
        seed: of the random numbers.

    Raises:
        MissingExtra: `pyautoattack` is not installed.
    """
    package = need_package()
    with torch.no_grad(), torch.random.fork_rng():
        attack = package.square.SquareAttack(
            lambda batch: answers(batch).clone(),  # it writes into what it gets
            norm=_norm(norm),
            eps=eps,
            n_queries=queries,
            n_restarts=restarts,
            seed=seed,
            resc_schedule=False,
            device=images.device,
        )
        attacked: Tensor = attack.perturb(images, labels)
    return attacked.detach()


def need_package() -> Any:
    """The module. Raises `MissingExtra`: called before long work that would end there."""
    try:
        import pyautoattack
        import pyautoattack.square
    except ImportError as error:
        raise missing_extra(error.name or "pyautoattack", "eval", "AutoAttack and Square") from None
    return pyautoattack


def _parts(classes: int) -> tuple[str, ...]:
    """The targeted DLR loss needs four classes."""
    return PARTS if classes > 3 else tuple(part for part in PARTS if part != "apgd-t")


def _norm(norm: str) -> str:
    if norm not in NORMS:
        raise UsageError(f"AutoAttack is run in the norms {', '.join(NORMS)}, found '{norm}'")
    return NORMS[norm]


def _set(attack: Any, effort: Effort, classes: int) -> None:
    """What the package's `standard` version sets, with this effort."""
    for apgd in (attack.apgd, attack.apgd_targeted):
        apgd.n_restarts, apgd.n_iter = 1, effort.steps
        # Where the step may be halved: shares of the steps that the package computes before they can be changed.
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (
            max(int(share * effort.steps), 1) for share in (0.22, 0.06, 0.03)
        )
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(effort.targets, classes - 1)
    attack.fab.n_restarts, attack.fab.n_iter = 1, effort.steps
    attack.square.n_queries = effort.queries


@contextmanager
def _quiet(note: Note | None) -> Iterator[list[str]]:
    """The package's log: warnings are collected, lines about progress go to `note`, nothing to the terminal.

    It also takes away the trace function that coverage tools and debuggers set; that is put back.
    """
    flags: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                if text not in flags:
                    flags.append(text)
            elif note is not None and text.startswith("robust accuracy after"):
                note(text)

    log, handler, trace = logging.getLogger("auto-attack"), Handler(), sys.gettrace()
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield flags
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
        sys.settrace(trace)

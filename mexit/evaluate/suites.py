"""The attacks of `mexit evaluate` beyond PGD, group by group, each a function from a range to new evidence.

Gradients come from the network in torch; what counts is what the subject answers, so every image is put to it
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mexit.attacks.autoattack import AutoAttackConfig, ExitClassifier, auto_attack
from mexit.attacks.black_box import rays, square
from mexit.attacks.multi_exit_attack import Attack, craft, craft_each_exit, keep_worst, random_noise
from mexit.attacks.pgd import PGDConfig
from mexit.attacks.policy_attacks import AttackSearch, AttackTarget, route_attack, soft_attack
from mexit.attacks.rng import CounterRNG
from mexit.attacks.slowdown import SLOWDOWNS, slowdown_attack
from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy, policy_log_probabilities
from mexit.core.progress import Progress
from mexit.errors import UsageError
from mexit.evaluate.config import EvaluationConfig
from mexit.evaluate.results import AttackResults
from mexit.evaluate.target import BATCH, Deployed, EvaluationTarget, Images, Labels, Logits, open_run
from mexit.models.multi_exit import MultiExit

# Shares of the radius in question at which the curve is measured, and the radius that has to break everything.
CURVE = (0.25, 0.5, 1.0, 1.5, 2.0)
EVERYTHING = 0.5
LEVELS = 255


@dataclass(frozen=True)
class AttackContext:
    """Where the strong attacks take place.

    Attributes:
        subject, plan, progress: what, how hard, who listens.
        images, labels, index: the S samples: (S, C, H, W), (S,), places in the data set (S,).
        steps: of PGD.
    """

    subject: EvaluationTarget
    plan: EvaluationConfig
    progress: Progress
    images: Images
    labels: Labels
    index: Labels
    steps: PGDConfig

    @property
    def model(self) -> Any:
        """The network that gives gradients."""
        return self.subject.network.model

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, places."""
        return torch.from_numpy(self.images), torch.from_numpy(self.labels), torch.from_numpy(self.index)

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same in batches."""
        rows = np.array_split(np.arange(len(self.labels)), range(BATCH, len(self.labels), BATCH))
        arrays = (self.images, self.labels, self.index)
        return [tuple(torch.from_numpy(array[part]) for array in arrays) for part in rows]  # type: ignore[misc]

    def effort(self) -> AutoAttackConfig:
        """Of AutoAttack."""
        return AutoAttackConfig(steps=self.plan.autoattack_steps, queries=self.plan.queries)


def pgd_suite(
    model: MultiExit, images: Images, labels: Labels, index: Labels, config: PGDConfig, *, seed: int = 0
) -> dict[str, Images]:
    """One batch under every attack of the papers.

    The single attacks exit by exit give the transfer matrix; max-average selects from them.

    Args:
        model: gives the gradients.
        images: (B, C, H, W) float32 in [0, 1].
        labels: (B,) int64.
        index: positions of the samples in the data set, (B,) int64.
        config: parameters of the attacks.
        seed: seed of the random starts.

    Returns:
        Images (B, C, H, W) by condition: `clean`, `noise`, `average`, `max-average`, `exit 1`, ..., `exit E`.
    """
    pixels, truth, places = torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(index)
    rng = CounterRNG(seed, 0)
    singles = craft_each_exit(model, pixels, truth, Attack("single", config), rng=rng, index=places)
    suite = {
        "clean": pixels,
        "noise": random_noise(pixels, places, config, rng=rng),
        "average": craft(model, pixels, truth, Attack("average", config), rng=rng, index=places),
        "max-average": keep_worst(model, singles, truth),
    }
    suite |= {f"exit {k}": attacked for k, attacked in enumerate(singles, start=1)}
    return {name: attacked.numpy() for name, attacked in suite.items()}


def attack_policies(place: AttackContext, evidence: AttackResults) -> None:
    """Routes, the softened policy, Square and RayS on every budget; and the attacks made for another run."""
    plan = place.plan
    if plan.transfer is not None:
        for name, images in _from_another_run(place).items():
            evidence.subset[f"transfer {name}"] = place.subject.replay(images)
    exits = place.model.exits
    black_boxes = BLACK_BOXES if place.steps.norm == "linf" else {"square served": _square_served}
    place.progress.note(
        f"policy: {len(place.labels)} images, {len(place.subject.budgets)} budgets, each at most {exits} exits x "
        f"{plan.targets} targets x {place.steps.steps} steps and {1 + len(black_boxes)} x {plan.queries} queries"
    )
    with place.progress.track("attacking budgets", (3 + len(black_boxes)) * len(place.subject.budgets)) as advance:
        for name, deployed in place.subject.budgets.items():
            gates = _gates(place, deployed)
            found = evidence.budgets.setdefault(name, {})
            found["route"] = place.subject.replay(_hunted(place, gates, lambda v: route_attack(v, plan.targets)))
            advance(1, name)
            found["soft"] = place.subject.replay(_hunted(place, gates, soft_attack))
            advance(1, name)
            found["square"] = place.subject.replay(_square(place, gates))
            advance(1, name)
            for attack, black_box in black_boxes.items():
                found[attack] = place.subject.replay(black_box(place, deployed))
                advance(1, name)


def slow_policies(place: AttackContext, evidence: AttackResults) -> None:
    """Both slowdown attacks on every budget."""
    place.progress.note(
        f"slowdown: {len(place.labels)} images, {len(place.subject.budgets)} budgets, {len(SLOWDOWNS)} attacks x "
        f"{place.steps.steps} steps"
    )
    for name, deployed in place.subject.budgets.items():
        gates = _gates(place, deployed)
        for attack in SLOWDOWNS:
            images = _hunted(place, gates, lambda victim, attack=attack: slowdown_attack(victim, attack))
            evidence.budgets.setdefault(name, {})[attack] = place.subject.replay(images)


def auto_attack_all(place: AttackContext, evidence: AttackResults) -> dict[str, tuple[str, ...]]:
    """AutoAttack on the chosen exits and on every budget; returns the package's warnings by target."""
    exits = place.plan.chosen_exits(place.model.exits)
    targets: dict[str, ExitClassifier | DeployedPolicy] = {
        f"exit {k}": ExitClassifier(place.model, k) for k in exits
    }
    for name, deployed in place.subject.budgets.items():
        targets[name] = DeployedPolicy(place.model, _gates(place, deployed))
    place.progress.note(
        f"autoattack: {len(place.labels)} images, {len(targets)} targets; "
        f"{place.effort().describe(len(place.subject.data.classes))}"
    )
    images, labels, _ = place.tensors()
    warnings: dict[str, tuple[str, ...]] = {}
    for target, network in targets.items():

        def note(line: str, target: str = target) -> None:
            place.progress.note(f"{target}: {line}")

        found = auto_attack(
            network, images, labels, place.steps.eps, norm=place.steps.norm, config=place.effort(), on_message=note
        )
        warnings[target] = found.warnings
        logits = place.subject.replay(found.images.numpy())
        if isinstance(network, ExitClassifier):
            evidence.autoattack[network.k] = logits
        else:
            evidence.budgets.setdefault(target, {})["autoattack"] = logits
    return warnings


def radii(place: AttackContext) -> dict[float, dict[str, Logits]]:
    """At each radius of the curve, the subject under one single attack an exit; the step grows with the radius."""
    clean = place.subject.replay(place.images)
    found = {0.0: {f"exit {k}": clean for k in range(1, len(clean) + 1)}}
    wanted = sorted({share * place.steps.eps for share in CURVE} | {EVERYTHING})
    with place.progress.track("accuracy against the radius", len(wanted)) as advance:
        for eps in [eps for eps in wanted if eps <= 1]:
            size = min(1.0, place.steps.step_size * eps / place.steps.eps)
            found[eps] = under_singles(place, replace(place.steps, eps=eps, step_size=size))
            advance(1, f"eps {eps:.3g}")
    return found


def under_singles(place: AttackContext, steps: PGDConfig) -> dict[str, Logits]:
    """The subject under one single attack an exit: exit k to logits (E, S, C)."""
    attack = Attack("single", steps)
    parts = [
        craft_each_exit(place.model, images, labels, attack, rng=CounterRNG(0, 0), index=index)
        for images, labels, index in place.batches()
    ]
    attacked = torch.cat(parts, dim=1).numpy()
    return {f"exit {k}": place.subject.replay(one) for k, one in enumerate(attacked, start=1)}


def to_levels(images: Images) -> Images:
    """As a camera or a file would hold them: rounded to 8 bits."""
    return (np.round(images * LEVELS) / LEVELS).astype(np.float32)


def _gates(place: AttackContext, deployed: Deployed) -> SoftPolicy:
    with torch.no_grad():
        logits = torch.cat([place.model(images) for images, _, _ in place.batches()], dim=1)
    return SoftPolicy.fit(deployed.policy, logits)


def _hunted(place: AttackContext, gates: SoftPolicy, attack: Any) -> Images:
    """The images of an attack on a `AttackTarget`, batch by batch."""
    hunts: list[AttackSearch] = [
        attack(AttackTarget(place.model, gates, images, labels, index, place.steps))
        for images, labels, index in place.batches()
    ]
    return np.concatenate([hunt.images.numpy() for hunt in hunts])


def _square(place: AttackContext, gates: SoftPolicy) -> Images:
    images, labels, _ = place.tensors()
    network = DeployedPolicy(place.model, gates)
    return _run_square(place, network, images, labels, place.steps.eps)


def _square_served(place: AttackContext, deployed: Deployed) -> Images:
    images, labels, eps = _eight_bits(place)
    return to_levels(_run_square(place, _served(place, deployed), images, labels, eps))


def _rays(place: AttackContext, deployed: Deployed) -> Images:
    images, labels, eps = _eight_bits(place)
    served = _served(place, deployed)
    found = rays(lambda batch: served(batch).argmax(dim=-1), images, labels, eps, place.plan.queries)
    return to_levels(found.numpy())


def _eight_bits(place: AttackContext) -> tuple[Tensor, Tensor, float]:
    """Images, labels and radius as they can be sent: of 8 bits, the radius rounded down to whole levels."""
    levels = int(place.steps.eps * LEVELS + 1e-9)
    if levels < 1:
        raise UsageError(f"eps {place.steps.eps:g} is below one level of an 8-bit image: nothing can be sent")
    images, labels, _ = place.tensors()
    return torch.from_numpy(to_levels(images.numpy())), labels, levels / LEVELS


def _served(place: AttackContext, deployed: Deployed) -> Callable[[Tensor], Tensor]:
    """From images, which are rounded to 8 bits, through the engine to the logits of the exit that answers."""

    def answers(batch: Tensor) -> Tensor:
        return policy_log_probabilities(
            deployed.policy, torch.from_numpy(place.subject.replay(to_levels(batch.numpy())))
        ).float()

    return answers


BLACK_BOXES = {"square served": _square_served, "rays": _rays}


def _run_square(place: AttackContext, answers: Any, images: Tensor, labels: Tensor, eps: float) -> Images:
    plan = place.plan
    attacked = square(
        answers, images, labels, eps, norm=place.steps.norm, queries=plan.queries, restarts=plan.restarts
    )
    return np.asarray(attacked.numpy())


def _from_another_run(place: AttackContext) -> dict[str, Images]:
    assert place.plan.transfer is not None
    other, _ = open_run(place.plan.transfer)
    place.progress.note(f"transfer: {len(place.labels)} images attacked on {place.plan.transfer}")
    suites = [
        pgd_suite(other.model, images.numpy(), labels.numpy(), index.numpy(), place.steps)
        for images, labels, index in place.batches()
    ]
    return {name: np.concatenate([suite[name] for suite in suites]) for name in ("average", "max-average")}

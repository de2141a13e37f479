"""The groups of attacks of `mexit evaluate`. Each group adds logits to `AttackResults`.

The gradients come from the torch network, on its own device. Every attacked image is then evaluated by the target
itself, which for a bundle is the engine. Images and logits are numpy between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mexit.attacks.autoattack import AutoAttackConfig, ExitClassifier, auto_attack
from mexit.attacks.black_box import Classifier, rays, square
from mexit.attacks.pgd import Attack, PGDConfig, craft, craft_each_exit, keep_worst, random_noise
from mexit.attacks.policy_attacks import AttackSearch, AttackTarget, route_attack, soft_attack
from mexit.attacks.rng import CounterRNG
from mexit.attacks.slowdown import SLOWDOWNS, slowdown_attack
from mexit.attacks.soft_policy import DeployedPolicy, SoftPolicy, policy_log_probabilities
from mexit.core.progress import Progress
from mexit.data.dataset import split_batches
from mexit.errors import UsageError
from mexit.evaluate.config import EvaluateOptions
from mexit.evaluate.results import NOISE, AttackResults
from mexit.evaluate.target import BudgetPolicy, EvaluationTarget, Images, Index, Labels, Logits
from mexit.models.device import device_of, exact_float32, tensors_for
from mexit.models.multi_exit import MultiExit
from mexit.train import checkpoint

# The radii of the curve, as multiples of the radius in question.
CURVE = (0.25, 0.5, 1.0, 1.5, 2.0)
LEVELS = 255


@dataclass(frozen=True)
class AttackContext:
    """The samples and parameters of the groups beside pgd.

    Attributes:
        target: what is evaluated.
        options: which attacks, and how strong.
        progress: receives progress.
        images: (S, C, H, W).
        labels: (S,).
        index: positions in the data set, (S,).
        pgd: parameters of the gradient attacks.
    """

    target: EvaluationTarget
    options: EvaluateOptions
    progress: Progress
    images: Images
    labels: Labels
    index: Index
    pgd: PGDConfig

    @property
    def model(self) -> MultiExit:
        """The network that gives gradients."""
        return self.target.source.model

    @property
    def large_eps(self) -> float:
        """The radius that turns every image into a uniform grey one: 0.5 per pixel. Every attack must succeed there."""
        return 0.5 if self.pgd.norm == "linf" else 0.5 * math.sqrt(self.images[0].size)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and positions of all samples, on the device of the network."""
        images, labels, index = tensors_for(self.model, self.images, self.labels, self.index)
        return images, labels, index

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and positions of at most `EvaluationTarget.batch` samples each, on the network's device."""
        images, labels, index = (torch.split(tensor, self.target.batch) for tensor in self.tensors())
        return list(zip(images, labels, index, strict=True))

    def soft_policy(self, budget: BudgetPolicy) -> SoftPolicy:
        """The softened policy of a budget, its spreads measured on the clean images."""
        with torch.no_grad():
            logits = torch.cat([self.model(images) for images, _, _ in self.batches()], dim=1)
        return SoftPolicy.fit(budget.policy, logits)


PolicyAttack = Callable[[AttackContext, BudgetPolicy, SoftPolicy], Images]


@exact_float32()
def pgd_suite(
    model: MultiExit, images: Images, labels: Labels, index: Index, config: PGDConfig, *, seed: int = 0
) -> dict[str, Images]:
    """One batch under every attack of RDI-Nets.

    Max-average selects from the single attacks. The single attacks evaluated at every exit are the transfer matrix.

    Args:
        model: gives the gradients, on its own device.
        images, labels, index: (B, C, H, W) in [0, 1], (B,), and positions in the data set (B,).
        config: parameters of the attacks.
        seed: seed of the random starts.

    Returns:
        Images (B, C, H, W) by condition: `clean`, `noise`, `average`, `max-average`, `exit 1`, ..., `exit E`.
    """
    pixels, truth, positions = tensors_for(model, images, labels, index)
    rng = CounterRNG(seed, 0)
    singles = craft_each_exit(model, pixels, truth, Attack("single", config), rng=rng, index=positions)
    suite = {
        "clean": pixels,
        NOISE: random_noise(pixels, positions, config, rng=rng),
        "average": craft(model, pixels, truth, Attack("average", config), rng=rng, index=positions),
        "max-average": keep_worst(model, singles, truth),
    }
    suite |= {f"exit {k}": attacked for k, attacked in zip(model.numbers, singles, strict=True)}
    return {name: attacked.cpu().numpy() for name, attacked in suite.items()}


def run_pgd_group(target: EvaluationTarget, index: Index, config: PGDConfig, progress: Progress) -> dict[str, Logits]:
    """The group pgd: logits (E, N, C) of the target under each condition of `pgd_suite`."""
    logits: dict[str, list[Logits]] = {}
    with progress.track(f"attacking {len(index)} test images", len(index)) as advance:
        for part in split_batches(index, target.batch):
            images, labels = target.load(part)
            for name, attacked in pgd_suite(target.source.model, images, labels, part, config).items():
                logits.setdefault(name, []).append(target.run_batch(attacked))
            advance(len(part), "")
    return {name: np.concatenate(parts, axis=1) for name, parts in logits.items()}


def run_clean(target: EvaluationTarget, index: Index) -> dict[str, Logits]:
    """Logits (E, N, C) of the target on the clean images, for an evaluation without attacks."""
    parts = [target.run_batch(target.load(part)[0]) for part in split_batches(index, target.batch)]
    return {"clean": np.concatenate(parts, axis=1)}


def run_transfer(context: AttackContext, results: AttackResults, run: Path) -> None:
    """Try images that were attacked on another run: average and max-average."""
    context.progress.note(f"transfer: {len(context.labels)} images attacked on {run}")
    model = checkpoint.load_model(run)[0].to(device_of(context.model))
    suites = [
        pgd_suite(model, context.images[rows], context.labels[rows], context.index[rows], context.pgd)
        for rows in split_batches(np.arange(len(context.labels)), context.target.batch)
    ]
    for name in ("average", "max-average"):
        images = np.concatenate([suite[name] for suite in suites])
        results.transfer[f"transfer {name}"] = context.target.exit_logits(images)


def run_policy_group(context: AttackContext, results: AttackResults) -> None:
    """The group policy: every attack of `POLICY_ATTACKS` on every budget.

    RayS is left out under an L2 attack, because it is made for the L-infinity ball.
    """
    options, budgets = context.options, context.target.budgets
    attacks = {name: attack for name, attack in POLICY_ATTACKS.items() if name != "rays" or context.pgd.norm == "linf"}
    black_boxes = len(attacks) - 2
    context.progress.note(
        f"policy: {len(context.labels)} images, {len(budgets)} budgets, each at most {context.model.exits} exits x "
        f"{options.targets} targets x {context.pgd.steps} steps and {black_boxes} x {options.queries} queries"
    )
    with context.progress.track("attacking budgets", len(attacks) * len(budgets)) as advance:
        for name, budget in budgets.items():
            soft_policy = context.soft_policy(budget)
            for attack_name, attack in attacks.items():
                logits = context.target.exit_logits(attack(context, budget, soft_policy))
                results.add_budget(name, attack_name, logits)
                advance(1, name)


def run_slowdown_group(context: AttackContext, results: AttackResults) -> None:
    """The group slowdown: both slowdown attacks on every budget."""
    budgets = context.target.budgets
    context.progress.note(
        f"slowdown: {len(context.labels)} images, {len(budgets)} budgets, {len(SLOWDOWNS)} attacks x "
        f"{context.pgd.steps} steps"
    )
    for name, budget in budgets.items():
        soft_policy = context.soft_policy(budget)
        for attack in SLOWDOWNS:
            images = _search(context, soft_policy, partial(slowdown_attack, name=attack))
            results.add_budget(name, attack, context.target.exit_logits(images))


def run_autoattack_group(context: AttackContext, results: AttackResults) -> dict[str, tuple[str, ...]]:
    """The group autoattack: AutoAttack on the chosen exits and on every budget.

    Returns:
        The package's warnings by attacked network.
    """
    numbers = context.model.numbers
    networks: dict[str, ExitClassifier | DeployedPolicy] = {
        f"exit {k}": ExitClassifier(context.model, numbers.index(k) + 1)
        for k in context.options.autoattack_exits(numbers)
    }
    for name, budget in context.target.budgets.items():
        networks[name] = DeployedPolicy(context.model, context.soft_policy(budget))
    batch = context.options.batch or max(AutoAttackConfig.batch, context.target.batch)
    config = AutoAttackConfig(context.options.autoattack_steps, context.options.queries, batch=batch)
    context.progress.note(
        f"autoattack: {len(context.labels)} images, {len(networks)} networks; "
        f"{config.describe(len(context.target.data.classes))}"
    )
    images, labels, _ = context.tensors()
    warnings: dict[str, tuple[str, ...]] = {}
    for name, network in networks.items():

        def note(line: str, name: str = name) -> None:
            context.progress.note(f"{name}: {line}")

        result = auto_attack(
            network, images, labels, context.pgd.eps, norm=context.pgd.norm, config=config, on_message=note
        )
        warnings[name] = result.warnings
        logits = context.target.exit_logits(result.images.cpu().numpy())
        if isinstance(network, ExitClassifier):
            results.autoattack[numbers[network.k - 1]] = logits
        else:
            results.add_budget(name, "autoattack", logits)
    return warnings


def accuracy_curve(context: AttackContext) -> dict[float, dict[str, Logits]]:
    """The group sanity: at each radius, the target under a single attack on each exit (see `single_attacks`).

    The step size grows with the radius. Radius 0 holds the clean logits.
    """
    clean = context.target.exit_logits(context.images)
    curve = {0.0: {f"exit {k}": clean for k in context.model.numbers}}
    largest = 1.0 if context.pgd.norm == "linf" else math.inf
    radii = sorted({share * context.pgd.eps for share in CURVE} | {context.large_eps})
    with context.progress.track("accuracy against the radius", len(radii)) as advance:
        for eps in [eps for eps in radii if eps <= largest]:
            step_size = min(largest, context.pgd.step_size * eps / context.pgd.eps)
            curve[eps] = single_attacks(context, replace(context.pgd, eps=eps, step_size=step_size))
            advance(1, f"eps {eps:.3g}")
    return curve


def single_attacks(context: AttackContext, config: PGDConfig) -> dict[str, Logits]:
    """The target under a single attack on each exit: `exit 1`, ..., `exit E` to logits (E, S, C)."""
    attack = Attack("single", config)
    parts = [
        craft_each_exit(context.model, images, labels, attack, rng=CounterRNG(0, 0), index=index)
        for images, labels, index in context.batches()
    ]
    attacked = torch.cat(parts, dim=1).cpu().numpy()
    named = zip(context.model.numbers, attacked, strict=True)
    return {f"exit {k}": context.target.exit_logits(images) for k, images in named}


def to_levels(images: Images) -> Images:
    """Images rounded to 8 bits, as a camera or a file holds them."""
    return (np.round(images * LEVELS) / LEVELS).astype(np.float32)


def _search(context: AttackContext, soft_policy: SoftPolicy, attack: Callable[[AttackTarget], AttackSearch]) -> Images:
    """The images of a search for damage, batch by batch."""
    searches = [
        attack(AttackTarget(context.model, soft_policy, images, labels, index, context.pgd))
        for images, labels, index in context.batches()
    ]
    return np.concatenate([search.images.cpu().numpy() for search in searches])


def _route(context: AttackContext, _: BudgetPolicy, soft_policy: SoftPolicy) -> Images:
    return _search(context, soft_policy, lambda target: route_attack(target, context.options.targets))


def _soft(context: AttackContext, _: BudgetPolicy, soft_policy: SoftPolicy) -> Images:
    return _search(context, soft_policy, soft_attack)


def _square(context: AttackContext, _: BudgetPolicy, soft_policy: SoftPolicy) -> Images:
    images, labels, __ = context.tensors()
    return _run_square(context, DeployedPolicy(context.model, soft_policy), images, labels, context.pgd.eps)


def _square_served(context: AttackContext, budget: BudgetPolicy, _: SoftPolicy) -> Images:
    images, labels, eps = _eight_bits(context)
    return to_levels(_run_square(context, _served(context, budget), images, labels, eps))


def _rays(context: AttackContext, budget: BudgetPolicy, _: SoftPolicy) -> Images:
    images, labels, eps = _eight_bits(context)
    served = _served(context, budget)
    attacked = rays(lambda batch: served(batch).argmax(dim=-1), images, labels, eps, context.options.queries)
    return to_levels(attacked.numpy())


POLICY_ATTACKS: dict[str, PolicyAttack] = {
    "route": _route,
    "soft": _soft,
    "square": _square,
    "square served": _square_served,
    "rays": _rays,
}


def _run_square(context: AttackContext, classifier: Classifier, images: Tensor, labels: Tensor, eps: float) -> Images:
    options = context.options
    attacked = square(
        classifier, images, labels, eps, norm=context.pgd.norm, queries=options.queries, restarts=options.restarts
    )
    return np.asarray(attacked.cpu().numpy())


def _eight_bits(context: AttackContext) -> tuple[Tensor, Tensor, float]:
    """Images rounded to 8 bits and their labels, on the CPU, and the radius rounded down to whole levels."""
    levels = int(context.pgd.eps * LEVELS + 1e-9)
    if levels < 1:
        raise UsageError(f"eps {context.pgd.eps:g} is below one level of an 8-bit image: no change can be sent")
    return torch.from_numpy(to_levels(context.images)), torch.from_numpy(context.labels), levels / LEVELS


def _served(context: AttackContext, budget: BudgetPolicy) -> Classifier:
    """The served budget as a classifier: rounds images to 8 bits, runs the engine, applies the policy."""

    def classifier(images: Tensor) -> Tensor:
        logits = torch.from_numpy(context.target.exit_logits(to_levels(images.numpy())))
        return policy_log_probabilities(budget.policy, logits).float()

    return classifier

"""The settings of a training run: one frozen dataclass, stored beside the weights as `settings.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mexit.attacks.pgd import Attack, PGDConfig
from mexit.core.manifest import MAX_SIDE
from mexit.core.schema import decode
from mexit.data.groups import default_group
from mexit.errors import UsageError
from mexit.models import ModelSpec, model_spec
from mexit.models.backbones import check_file, file_hash
from mexit.train.augment import AUGMENTS
from mexit.train.frozen_settings import check_frozen
from mexit.train.methods import method_class
from mexit.train.option_names import option_name
from mexit.train.presets import DEFAULT_MODELS, PRESETS, default_preset, expand_robust

KEEP = ("last", "best")
LR_SCHEDULES = ("steps", "one-cycle")
PRECISIONS = ("auto", "bf16", "fp32")
SHORT_ATTACK_STEPS = 3
# Fields that some runs of mexit 0.1 lack, with the values that those runs used.
_ADDED: dict[str, Any] = {
    "norm": "linf", "rule": "sign", "loss": "ce", "restarts": 1,
    "trades": 0.0, "awp": 0.0, "ema": 0.0, "label_smoothing": 0.0,
    "teachers": [], "fraction": 1.0, "omit_class": None, "selection_steps": 10,
    "minutes": 0.0, "steps_done": 0, "lr_schedule": "steps", "warmup": 0.0, "nesterov": False, "decay_norms": True,
    "recompute_norms": 0, "short_attack_until": 0.0, "average_attack_until": 0.0, "exit_weights": [],
    "validate_every": 1, "size": None, "channels": None, "mean": [], "std": [], "flip": None, "grey_bits": None,
    "group": "none", "split_seed": 0, "changes": [], "weights": None, "code_sha256": None,
    "freeze": False, "finetune": 0,
}  # fmt: skip
# Fields of mexit 0.1 that have another name now.
_RENAMED = {"recipe": "precision"}
# Defaults of methods in mexit 0.1 that have changed: its runs store only the options that differ from them.
_OLD_OPTIONS: dict[str, dict[str, Any]] = {"cap": {"clean_weight": 0.0, "mix": False}, "mse": {"ramp": 0.0}}


@dataclass(frozen=True)
class TrainSettings:
    """Everything that determines the weights of a run.

    Lengths in the pixel range (`eps`, `step`) are fractions of [0, 1].

    Attributes:
        data: data set, as given to `--data`.
        model: name of a network, one of `mexit.models.MODELS` or of `mexit.models.backbones`.
        weights: file with pretrained weights of the network; None = those that it brings, if any.
        code_sha256: hash of the file of a network `module:PATH.py:FUNCTION`.
        method: name of a training method, one of `methods.METHODS`.
        options: options of the method that differ from its defaults.
        preset: published schedule that the settings started from.
        attack: training attack: "none", "single", "average" or "max-average".
        eps: radius of the attacks.
        step: step size of the training attack.
        steps: steps of the training attack.
        test_steps: steps of the attack that evaluates the finished run.
        norm: norm of the attacks: "linf" or "l2".
        rule: update rule of the training attack, see `PGDConfig`; evaluation always uses "sign".
        restarts: random starts of the attacks; the strongest result is kept.
        loss: loss that the training attack maximises, one of `attacks.losses.LOSSES`; evaluation uses "ce".
        short_attack_until: fraction of the run in which the training attack is an average attack of at most 3 steps of
            eps / 2.
        average_attack_until: fraction of the run in which it is an average attack of all steps; afterwards it is
            `attack`.
        craft_train_mode: attack with the network in train mode, as RDI-Nets' code does.
        freeze: whether the heads are trained first, on the features of the frozen network.
        finetune: passes over the training split after that, in which all layers train; `epochs` is the same number.
        epochs: passes over the training split; unused in a run by the clock.
        minutes: length of the run in minutes; every schedule is then a function of the elapsed share of that time. 0 =
            the run ends after `epochs`.
        steps_done: optimisation steps of a finished run by the clock; 0 otherwise.
        batch: images per optimisation step, of all processes together.
        lr: largest learning rate of SGD.
        lr_schedule: "steps" (decays at `decay_at`) or "one-cycle" (a linear fall to 0 at the end).
        warmup: fraction of the run in which the learning rate rises linearly from 0, in [0, 1).
        decay_at: fractions of the run after which "steps" multiplies the learning rate by `decay_factor`.
        decay_factor: factor of each learning rate decay.
        momentum: momentum of SGD, in [0, 1).
        nesterov: whether the momentum is Nesterov's.
        weight_decay: weight decay of SGD.
        decay_norms: whether it applies to BatchNorm and biases too.
        augment: augmentation of training images, one of `augment.AUGMENTS`.
        flip: whether half of the training images are mirrored; None = as `augment` names it.
        seed: seed of weights, sample order, augmentation, attack starts and dropout.
        precision: "bf16" (autocast), "fp32", or "auto" (bf16 where the device supports it).
        keep: weights to keep: "last", or "best" by mean attacked accuracy on the selection split.
        selection_steps: steps of the attack on the selection split.
        validate_every: epochs from one measurement on the selection split to the next; the last epoch always has one.
        trades: weight of the TRADES term; 0 = off.
        awp: relative size of the adversarial weight perturbation; 0 = off.
        ema: decay of the exponential moving average of the weights, which is then the result; 0 = off.
        recompute_norms: number of training images on which BatchNorm's statistics of the result are measured again at
            the end, clean and attacked; 0 = off.
        label_smoothing: share of the label spread over all classes, in [0, 1).
        exit_weights: weight of each exit in every cross-entropy and in TRADES, (E,); () = 1 each.
        teachers: directories of the teacher runs.
        fraction: share of each class's training images to use, in (0, 1].
        omit_class: name of a class whose training images are left out.
        size: (H, W) of the images that the network takes; None = those of the architecture.
        channels: 1 (grey) or 3 (RGB); None = those of the architecture.
        mean, std: normalisation of the pixels, one number per channel, for pixels in [0, 1]; () = that of the
            architecture.
        grey_bits: bits of a grey value in 16-bit files, see `PrepareSpec`; None = 16.
        group: how pictures that stay in one split are found, see `data.groups.find_groups`; "auto" for folders.
        split_seed: seed of the splits.
        changes: what `--resume` changed, in order: the `epoch` and `step` of the checkpoint, from 0, and the values
            `before`.

    Raises:
        UsageError: a value is outside its range.
    """

    data: str = "digits"
    model: str = "digits-cnn"
    method: str = "neo-kd"
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "demo"
    attack: str = "average"
    eps: float = 0.1
    step: float = 0.025
    steps: int = 7
    test_steps: int = 50
    norm: str = "linf"
    rule: str = "sign"
    restarts: int = 1
    loss: str = "ce"
    craft_train_mode: bool = False
    short_attack_until: float = 0.0
    average_attack_until: float = 0.0
    freeze: bool = False
    finetune: int = 0
    epochs: int = 20
    minutes: float = 0.0
    steps_done: int = 0
    batch: int = 64
    lr: float = 0.03
    lr_schedule: str = "steps"
    warmup: float = 0.0
    decay_at: tuple[float, ...] = ()
    decay_factor: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    augment: str = "none"
    flip: bool | None = None
    seed: int = 0
    precision: str = "auto"
    keep: str = "last"
    selection_steps: int = 10
    validate_every: int = 1
    trades: float = 0.0
    awp: float = 0.0
    ema: float = 0.0
    recompute_norms: int = 0
    label_smoothing: float = 0.0
    exit_weights: tuple[float, ...] = ()
    teachers: tuple[str, ...] = ()
    fraction: float = 1.0
    omit_class: str | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    grey_bits: int | None = None
    group: str = "none"
    split_seed: int = 0
    changes: tuple[Mapping[str, Any], ...] = ()
    weights: str | None = None
    code_sha256: str | None = None

    def __post_init__(self) -> None:
        self._check(self.finetune >= 0, "finetune", "must be at least 0")
        self._check(self.freeze or not self.finetune, "finetune", "follows --freeze")
        self._check(self.freeze or self.epochs >= 1, "epochs", "must be at least 1")
        self._check(not self.freeze or self.epochs == self.finetune, "epochs", "must equal --finetune after --freeze")
        self._check(self.batch >= 1, "batch", "must be at least 1")
        self._check(0 <= self.minutes < math.inf, "minutes", "must be at least 0 and finite")
        self._check(self.lr > 0, "lr", "must be above 0")
        self._check_choice("lr_schedule", LR_SCHEDULES)
        self._check(0 <= self.warmup < 1, "warmup", "must be a share of the run, in [0, 1)")
        self._check(0 <= self.momentum < 1, "momentum", "must be in [0, 1)")
        self._check(self.momentum > 0 or not self.nesterov, "momentum", "must be above 0 for --nesterov")
        self._check(self.weight_decay >= 0, "weight_decay", "must be at least 0")
        self._check(self.seed >= 0, "seed", "must be at least 0")
        self._check(self.split_seed >= 0, "split_seed", "must be at least 0")
        self._check_choice("keep", KEEP)
        self._check_choice("precision", PRECISIONS)
        self._check_choice("augment", AUGMENTS)
        sides = self.size or (1, 1)
        self._check(1 <= min(sides) <= max(sides) <= MAX_SIDE, "size", f"must have sides of 1 to {MAX_SIDE} pixels")
        self._check(self.channels in (None, 1, 3), "channels", "must be 1 or 3")
        self._check(self.grey_bits is None or 9 <= self.grey_bits <= 16, "grey_bits", "must lie in 9 to 16")
        self._check(len(self.mean) == len(self.std), "mean", "must have as many numbers as std, one per channel")
        self._check(min(self.std, default=1) > 0, "std", "must be above 0")
        self._check(self.trades >= 0, "trades", "must be at least 0")
        self._check(self.awp >= 0, "awp", "must be at least 0")
        self._check(0 <= self.ema < 1, "ema", "must be in [0, 1)")
        self._check(0 <= self.label_smoothing < 1, "label_smoothing", "must be in [0, 1)")
        self._check(self.validate_every >= 1, "validate_every", "must be at least 1")
        self._check(self.recompute_norms >= 0, "recompute_norms", "must be at least 0")
        self._check(min(self.exit_weights, default=0) >= 0, "exit_weights", "must be at least 0")
        self._check(not self.exit_weights or any(self.exit_weights), "exit_weights", "must have one above 0")
        self._check(0 <= self.short_attack_until <= 1, "short_attack_until", "must be in [0, 1]")
        self._check(0 <= self.average_attack_until <= 1, "average_attack_until", "must be in [0, 1]")
        self._check(0 < self.fraction <= 1, "fraction", "must be above 0 and at most 1")
        if self.recompute_norms and self.keep == "best":
            raise UsageError(
                "--recompute-norms changes the last weights, and --keep best may keep others: use --keep last"
            )
        if self.trades and self.attack == "none":
            raise UsageError("--trades needs attacked images: choose --attack average or max-average")
        self.training_attack()  # checks the fields of the attack

    def _check(self, valid: bool, name: str, requirement: str) -> None:
        if not valid:
            raise UsageError(f"{option_name(name)} {requirement}, found {getattr(self, name)!r}")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        self._check(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}")

    @property
    def heads_only(self) -> bool:
        """Whether the run trains the heads of a frozen network and nothing else."""
        return self.freeze and not self.finetune and not self.minutes

    @property
    def kind(self) -> str:
        """The training method, or "frozen" for a run that trains the heads of a frozen network alone."""
        return "frozen" if self.heads_only else self.method

    def model_spec(self) -> ModelSpec:
        """The architecture of the run, for its size, channels and normalisation.

        Raises:
            UsageError: the network is unknown, or takes images of one shape only.
        """
        check_file(self.model, self.code_sha256)
        spec = model_spec(self.model, self.weights)
        channels, *sides = spec.input_shape
        height, width = self.size or sides
        spec = spec.with_input((self.channels or channels, height, width), self.mean, self.std)
        return replace(spec, prepare=replace(spec.prepare, grey_bits=self.grey_bits))

    def training_attack(self, progress: float = 1.0) -> Attack | None:
        """The training attack, or None for a run on clean images.

        Args:
            progress: fraction of the run that is done, in [0, 1].
        """
        if self.attack == "none":
            return None
        random_start = self.rule != "penalty"  # the penalty rule has no ball to start in
        config = PGDConfig(self.eps, self.step, self.steps, random_start, self.norm, self.rule, self.restarts)
        attack = Attack(self.attack, config, train_mode=self.craft_train_mode, loss=self.loss)
        if progress < self.short_attack_until:
            short = replace(config, steps=min(config.steps, SHORT_ATTACK_STEPS), step_size=config.eps / 2)
            return replace(attack, target_exits="average", pgd=short)
        return replace(attack, target_exits="average") if progress < self.average_attack_until else attack

    def test_attack(self, target_exits: str, eps: float | None = None, steps: int | None = None) -> Attack:
        """An attack for evaluation.

        Args:
            target_exits: exits that are attacked: "single", "average" or "max-average".
            eps: radius, default `self.eps`.
            steps: number of steps, default `self.test_steps`.
        """
        radius, count = self.eps if eps is None else eps, self.test_steps if steps is None else steps
        return Attack(target_exits, PGDConfig(radius, self.step, count, norm=self.norm, restarts=self.restarts))

    def lr_at(self, progress: float) -> float:
        """The learning rate at `progress`, the fraction of the run that is done, in [0, 1)."""
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        if self.lr_schedule == "one-cycle":
            return self.lr * min(rise, (1 - progress) / (1 - self.warmup))
        return self.lr * rise * self.decay_factor ** sum(progress >= point for point in self.decay_at)

    def to_json(self) -> dict[str, Any]:
        """The settings as `settings.json` stores them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: object, where: str) -> TrainSettings:
        """Check and convert the content of a `settings.json`, also one of mexit 0.1.

        Args:
            value: the parsed JSON.
            where: name of the file, for messages.

        Raises:
            Damaged: a field is missing, unknown or of a wrong type.
        """
        if isinstance(value, Mapping):
            stored = _ADDED | {_RENAMED.get(name, name): field_value for name, field_value in value.items()}
            if "recipe" in value and isinstance(stored.get("options"), Mapping):
                stored["options"] = _OLD_OPTIONS.get(str(stored.get("method")), {}) | stored["options"]
            value = stored
        settings = decode(value, TrainSettings, where)
        assert isinstance(settings, TrainSettings)
        return settings


def resolve(data: str, preset: str | None, given: Mapping[str, Any]) -> TrainSettings:
    """Resolve the settings of a run: given values win over the preset, the preset over the defaults.

    The command line and `train_model` both call this function. The preset determines the method unless one is
    given. Options of the preset apply only to the preset's own method.

    Args:
        data: data set, as given to `--data`.
        preset: name of a published schedule for that data set; None = its first.
        given: fields of `TrainSettings`, and "robust": the radius of the attacks of a run that trains against them.
            None values count as not given.

    Raises:
        UsageError: the preset does not exist, or a value is outside its range.
    """
    presets = PRESETS[data.partition(":")[0]]
    given = {name: value for name, value in given.items() if value is not None}
    check_frozen(given)
    preset = preset or default_preset(presets, given)
    if preset not in presets:
        others = ", ".join(name for name, named in PRESETS.items() if preset in named)
        hint = f"; {preset} is for {others}" if others else ""
        raise UsageError(f"no preset '{preset}' for {data}: choose from {', '.join(presets)}{hint}")
    given = expand_robust(given, presets[preset])
    unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(TrainSettings)})
    if unknown:
        raise UsageError(f"no setting {', '.join(unknown)}: see mexit.train.config.TrainSettings")
    for name, expected in (("data", data), ("preset", preset)):
        if given.get(name, expected) != expected:
            raise UsageError(f"two values for {name}: {given[name]} in the settings and {expected} beside them")
    if given.get("minutes") == 0:
        raise UsageError("--minutes must be above 0")
    if given.get("minutes") and "epochs" in given:
        raise UsageError("a run ends after --minutes or after --epochs: give one of them")
    model = DEFAULT_MODELS.get(data.partition(":")[0], "small-cnn")
    values: dict[str, Any] = {"data": data, "preset": preset, "model": model, "group": default_group(data)}
    values |= presets[preset] | given
    values["code_sha256"] = file_hash(values["model"])
    if "epochs" in given:
        values["minutes"] = 0.0
    if given.get("freeze") or given.get("finetune"):
        length = {"epochs": given.get("finetune", 0), "minutes": given.get("minutes", 0.0)}
        values |= {"freeze": True, **length}
    if given.get("keep") == "best" and "recompute_norms" not in given:
        values["recompute_norms"] = 0
    if values["method"] == presets[preset]["method"]:
        values["options"] = {**presets[preset].get("options", {}), **given.get("options", {})}
    else:
        values["options"] = given.get("options", {})
    method = method_class(values["method"])
    if method.attack_use == "never" and given.get("attack", "none") != "none":
        raise UsageError(f"method {values['method']} trains on clean images: leave out --attack or --method")
    chosen = given if method.attack_use == "optional" else values
    if method.attack_use == "never" or "attack" not in chosen:
        values["attack"] = method.default_attack
    if method.attack_use == "required" and values["attack"] == "none":
        raise UsageError("this method trains on attacked images: choose --attack average or max-average")
    return TrainSettings(**values)

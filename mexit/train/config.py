"""The settings of a training run: one frozen dataclass, saved beside the weights, and the published schedules.

Presets per data set (`--preset`): `neo_kd` (NEO-KD, NeurIPS 2023), `rdi` (RDI-Nets, ICLR 2020), `hdkd`
(HDKD, AAAI 2021; the method too), `demo` (digits).
Decay points are fractions of the run, so that they scale with `--epochs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mexit.attacks.multi_exit_attack import Attack
from mexit.attacks.pgd import PGDConfig
from mexit.core.manifest import read_value
from mexit.errors import UsageError
from mexit.train.augment import AUGMENTS
from mexit.train.methods import method_class

KEEP = ("last", "best")
# Fields that runs of mexit 0.1 do not have yet, and what those runs did.
_ADDED: dict[str, Any] = {
    "norm": "linf", "rule": "sign", "loss": "ce", "restarts": 1,
    "trades": 0.0, "awp": 0.0, "ema": 0.0, "label_smoothing": 0.0,
    "teachers": [], "fraction": 1.0, "omit_class": None,
}  # fmt: skip
RECIPES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the weights of a run.

    Attributes:
        data: as typed after `--data`.
        model, method: see `models.PRESETS` and `objectives.METHODS`.
        options: fields of the method's class that differ from its defaults.
        preset: the schedule these settings started from.
        attack: what is trained on: none, single, average or max-average.
        eps, step: radius and step size, fractions of the pixel range.
        steps: of the training attack; `test_steps` of the one that evaluates.
        norm, rule, restarts: of both attacks' steps, see `attacks.gradient.PGDConfig`; the evaluation always takes
            the rule "sign".
        loss: what the training attack climbs, one of `attacks.losses.LOSSES`; the evaluation climbs "ce".
        craft_train_mode: craft with the network in train mode, as RDI-Nets' code does.
        epochs, batch: passes over the training split, samples a step.
        lr, momentum, weight_decay: of SGD.
        decay_at: fractions of the run after which lr is multiplied by `decay_factor`.
        augment: random views of training images: one of `augment.AUGMENTS`.
        seed: of weights, order, starts and dropout.
        recipe: "bf16" (autocast and channels_last), "fp32", or "auto" (bf16 where the processor has it).
        keep: which weights are kept: "last", or "best" mean attacked accuracy on the selection split.
        trades: weight of the TRADES term; 0 = none. `awp`: relative size of the adversarial weight perturbation.
        ema: decay of the averaged weights, which are then the result; 0 = none.
        label_smoothing: share of the label that is spread over all classes.
        teachers: runs that teach.
        fraction: share of the training split that is used, in (0, 1]; every class loses the same share.
        omit_class: a class whose training images are left out, by name.
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
    epochs: int = 20
    batch: int = 64
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_at: tuple[float, ...] = ()
    decay_factor: float = 0.1
    augment: str = "none"
    seed: int = 0
    recipe: str = "auto"
    keep: str = "last"
    trades: float = 0.0
    awp: float = 0.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    teachers: tuple[str, ...] = ()
    fraction: float = 1.0
    omit_class: str | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise UsageError(f"epochs and batch must be at least 1, found {self.epochs} and {self.batch}")
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UsageError(
                f"lr must be above 0, momentum in [0, 1), weight decay at least 0; found {self.lr}, "
                f"{self.momentum}, {self.weight_decay}"
            )
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, found {self.seed}")
        if self.keep not in KEEP or self.recipe not in RECIPES:
            raise UsageError(f"keep must be one of {', '.join(KEEP)}, recipe one of {', '.join(RECIPES)}")
        if self.augment not in AUGMENTS:
            raise UsageError(f"augment must be one of {', '.join(AUGMENTS)}, found '{self.augment}'")
        if not (self.trades >= 0 and self.awp >= 0 and 0 <= self.ema < 1 and 0 <= self.label_smoothing < 1):
            raise UsageError(
                f"trades and awp must be at least 0, ema and label smoothing in [0, 1); found {self.trades}, "
                f"{self.awp}, {self.ema}, {self.label_smoothing}"
            )
        if not 0 < self.fraction <= 1:
            raise UsageError(f"fraction must be above 0 and at most 1, found {self.fraction}")
        if self.trades and self.attack == "none":
            raise UsageError("the TRADES term needs attacked images: choose --attack average or max-average")
        self.training_attack()

    def training_attack(self) -> Attack | None:
        """What the run trains on; None for clean images only."""
        if self.attack == "none":
            return None
        start = self.rule != "penalty"  # a rule without a ball to start in
        steps = PGDConfig(self.eps, self.step, self.steps, start, self.norm, self.rule, self.restarts)
        return Attack(self.attack, steps, train_mode=self.craft_train_mode, loss=self.loss)

    def test_attack(self, objective: str, eps: float | None = None, steps: int | None = None) -> Attack:
        """What the run is evaluated under."""
        radius, count = self.eps if eps is None else eps, self.test_steps if steps is None else steps
        return Attack(objective, PGDConfig(radius, self.step, count, norm=self.norm, restarts=self.restarts))

    def lr_at(self, progress: float) -> float:
        """The learning rate after this share of the run, in [0, 1]."""
        return self.lr * self.decay_factor ** sum(progress >= point for point in self.decay_at)

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Any, where: str) -> TrainSettings:
        """Check and convert stored settings. Raises `Damaged`."""
        if isinstance(value, Mapping):
            value = _ADDED | dict(value)
        settings = read_value(value, TrainSettings, where)
        assert isinstance(settings, TrainSettings)
        return settings


_MNIST_NEO_KD = {
    "epochs": 150, "batch": 128, "lr": 0.01, "weight_decay": 5e-4, "decay_at": (50 / 150,),
    "eps": 0.3, "step": 20 / 255, "steps": 7, "test_steps": 50,
}  # fmt: skip
# 13,100 steps of 256 images are 56 passes over MNIST.
_MNIST_RDI = {
    "epochs": 56, "batch": 256, "lr": 0.033, "weight_decay": 5e-4, "decay_at": (11_700 / 13_100, 12_900 / 13_100),
    "eps": 0.3, "step": 0.01, "steps": 40, "test_steps": 40, "craft_train_mode": True,
}  # fmt: skip
_CIFAR_NEO_KD = {
    "epochs": 150, "batch": 128, "lr": 0.1, "weight_decay": 5e-4, "decay_at": (75 / 150, 115 / 150),
    "eps": 8 / 255, "step": 2 / 255, "steps": 7, "test_steps": 50, "augment": "crop-flip",
}  # fmt: skip
# 64,000 steps of 128 images are 164 passes over the 50,000 of CIFAR, 82,000 are 210.
_CIFAR_RDI = {
    "model": "resnet38", "epochs": 164, "batch": 128, "lr": 0.1, "weight_decay": 1e-4,
    "decay_at": (32 / 64, 48 / 64), "eps": 8 / 255, "step": 2 / 255, "steps": 10, "test_steps": 20,
    "craft_train_mode": True, "augment": "crop-flip",
}  # fmt: skip
_CIFAR_RDI_MOBILENETV2 = _CIFAR_RDI | {
    "model": "mobilenetv2", "epochs": 210, "lr": 0.05, "decay_at": (61.7 / 82, 70 / 82, 78 / 82),
}  # fmt: skip
# Published for CIFAR-100; its weight decay is not, and is that of DBT's code. Views and CIFAR-10 are readings.
_CIFAR_HDKD = {
    "method": "hdkd", "epochs": 300, "batch": 128, "lr": 0.1, "weight_decay": 1e-4, "decay_at": (0.5, 0.75),
    "eps": 8 / 255, "step": 2 / 255, "steps": 7, "test_steps": 50, "augment": "crop-flip",
}  # fmt: skip
_CIFAR = {
    "neo_kd": _CIFAR_NEO_KD, "rdi": _CIFAR_RDI, "rdi_mobilenetv2": _CIFAR_RDI_MOBILENETV2, "hdkd": _CIFAR_HDKD,
}  # fmt: skip
# Views of training images are not published for these two: readings. Nor are epochs and batch for ImageNet, which
# are those of MSDNet's own training.
_TINY_IMAGENET_NEO_KD = {
    "epochs": 150, "batch": 128, "lr": 0.1, "weight_decay": 5e-4, "decay_at": (50 / 150, 100 / 150),
    "eps": 2 / 255, "step": 2 / 3 * 2 / 255, "steps": 7, "test_steps": 50, "augment": "crop-flip",
}  # fmt: skip
_IMAGENET_NEO_KD = {
    "epochs": 90, "batch": 256, "lr": 0.001, "weight_decay": 5e-4,
    "eps": 2 / 255, "step": 2 / 3 * 2 / 255, "steps": 7, "test_steps": 50, "augment": "resized-crop-flip",
}  # fmt: skip
_RDI_WEIGHTS = {"clean_weight": 0.5, "attacked_weight": 0.5}
_DEMO = {
    "epochs": 20, "batch": 64, "lr": 0.03, "weight_decay": 5e-4, "decay_at": (0.6, 0.85),
    "attack": "average", "eps": 0.1, "step": 0.025, "steps": 7, "test_steps": 50,
}  # fmt: skip
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"demo": _DEMO},
    "mnist": {"neo_kd": _MNIST_NEO_KD, "rdi": _MNIST_RDI},
    "fashion-mnist": {"neo_kd": _MNIST_NEO_KD, "rdi": _MNIST_RDI},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": {"neo_kd": _TINY_IMAGENET_NEO_KD},
    "imagenet": {"neo_kd": _IMAGENET_NEO_KD},
    "folder": {"neo_kd": {**_MNIST_NEO_KD, "eps": 8 / 255, "step": 2 / 255}},
}
DEFAULT_MODELS = {
    "digits": "digits-cnn", "cifar10": "msdnet-cifar10", "cifar100": "msdnet-cifar100",
    "tiny-imagenet": "msdnet-tiny-imagenet", "imagenet": "msdnet-imagenet",
}  # fmt: skip


def resolve(data: str, preset: str | None, given: Mapping[str, Any]) -> TrainSettings:
    """Settings for a data set: what was given wins over the preset, the preset over the defaults.

    Args:
        data: as typed after `--data`.
        preset: a schedule of that data set; None = its first.
        given: fields of `TrainSettings` that were typed; None values count as not typed.

    Raises:
        UsageError: no such preset, or settings that cannot be.
    """
    presets = PRESETS[data.partition(":")[0]]
    preset = preset or next(iter(presets))
    if preset not in presets:
        raise UsageError(f"no preset '{preset}' for {data}: choose from {', '.join(presets)}")
    typed = {name: value for name, value in given.items() if value is not None}
    for name, own in (("data", data), ("preset", preset)):
        if typed.get(name, own) != own:
            raise UsageError(f"the settings name the {name} {typed[name]}, and {own} is asked for: name one")
    values: dict[str, Any] = {"data": data, "preset": preset, "model": DEFAULT_MODELS.get(data, "small-cnn")}
    values |= presets[preset] | typed
    method = method_class(values.get("method", TrainSettings.method))
    chosen = typed if method.attack_use == "optional" else values
    if method.attack_use == "never" or "attack" not in chosen:
        values["attack"] = method.default_attack
    if method.attack_use == "required" and values["attack"] == "none":
        raise UsageError("this method trains on attacked images: choose --attack average or max-average")
    if preset.startswith("rdi") and values.get("method") in ("adversarial", "neo-kd"):
        values["options"] = _RDI_WEIGHTS | dict(values.get("options", {}))
    return TrainSettings(**values)

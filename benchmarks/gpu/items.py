"""The queue of the run-book: what each item does, how long it takes, and what it needs.

The order is that of importance. An item that trains is followed by the one that runs AutoAttack on its weights, which
needs the package `pyautoattack` and can also run later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SECONDS_TO_START = 120.0  # least remaining time in which a piece of a long item begins
AUTOATTACK = "autoattack-"


@dataclass(frozen=True)
class Item:
    """One entry of the queue.

    Attributes:
        name: also the name of its folder and, if it trains, of its run.
        group: letter of the group.
        kind: what it does, see `work.KINDS`.
        about: one line for the list.
        minutes: expected duration; of one piece where `cut` is true.
        data: data set that it reads; "" = any of those that are here.
        needs: items that must be done before.
        cut: whether it may stop at any time and continue in a later session.
        preset: published schedule of a training item.
        settings: fields of `TrainSettings` that differ from the preset, or arguments of the kind.
        transfer: training item whose attacked images are tried on this one, where it is done.
        keep: whether the weights come back.
    """

    name: str
    group: str
    kind: str
    about: str
    minutes: float
    data: str = ""
    needs: tuple[str, ...] = ()
    cut: bool = False
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    transfer: str | None = None
    keep: bool = True

    @property
    def outputs(self) -> tuple[str, ...]:
        """Files below the state folder that exist when the item is done."""
        if self.kind == "train":
            run = [f"runs/{self.name}/{name}" for name in ("settings.json", "splits.npz", "weights.safetensors")]
            return (*run, f"items/{self.name}/evaluation.json")
        return (f"items/{self.name}/{self.kind}.json",)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Data set and items that it reads."""
        return (*([f"data:{self.data}"] if self.data else []), *self.needs)

    @property
    def alone(self) -> bool:
        """Whether no other item may use the card at the same time: a run by the clock would do fewer steps."""
        return self.kind == "timing" or bool(self.settings.get("minutes"))

    def fits(self, seconds: float) -> bool:
        """Whether the item, or a piece of it, can begin with this much time left."""
        least = min(60 * self.minutes, SECONDS_TO_START) if self.cut else 60 * self.minutes
        return seconds >= least


def _train(
    name: str,
    group: str,
    about: str,
    minutes: float,
    data: str,
    preset: str,
    settings: Mapping[str, Any],
    **others: Any,
) -> Item:
    return Item(name, group, "train", about, minutes, data, preset=preset, settings=settings, **others)


# Both runs weigh clean images by a half; NEO-KD's weights are those of the preset.
_HALF_CLEAN = {"method": "adversarial", "options": {"clean_weight": 0.5, "attacked_weight": 1.0}}
_MSDNET = {"model": "msdnet-cifar10", "epochs": 150, "keep": "last"}
# The trial "shift-10" of mnist_recipes.py, the best one on the selection split.
MNIST_RECIPE: dict[str, Any] = {
    "model": "mnist-cnn", "method": "adversarial", "attack": "average", "steps": 10, "step": 0.06, "epochs": 30,
    "batch": 256, "lr": 0.05, "lr_schedule": "one-cycle", "warmup": 0.2, "decay_at": (), "nesterov": True, "ema": 0.998,
    "augment": "shift", "validate_every": 10,
}  # fmt: skip
_SMALL_CNN = {"model": "small-cnn", "epochs": 150, "keep": "last", "validate_every": 10}


def _checks() -> Iterator[Item]:
    """Group a: the device computes what the CPU computes, and how fast."""
    yield Item("gpu-tests", "a", "tests", "tests/gpu", 2.0)
    yield Item("graphs-equal", "a", "equality", "20 steps with and without CUDA graphs end with equal weights", 0.7)
    yield Item("timing", "a", "timing", "20 timed steps of every network, with and without CUDA graphs", 2.5)


def _cifar10_by_the_clock() -> Iterator[Item]:
    """Group b: the fast schedule."""
    yield _train(
        "wide-cnn-adversarial", "b", "4 minutes by the clock, preset fast", 5.0, "cifar10", "fast",
        {"model": "wide-cnn", "minutes": 4.0, **_HALF_CLEAN}, cut=True,
    )  # fmt: skip
    yield _train(
        "wide-cnn-neo-kd", "b", "the same with NEO-KD", 5.0, "cifar10", "fast",
        {"model": "wide-cnn", "minutes": 4.0, "method": "neo-kd"}, cut=True, transfer="wide-cnn-adversarial",
    )  # fmt: skip


def _published_schedules() -> Iterator[Item]:
    """Groups c to e: networks and schedules of papers."""
    for method in ("adversarial", "neo-kd"):
        yield _train(
            f"msdnet-cifar10-{method}", "c", "150 epochs by NEO-KD's schedule", 8.0, "cifar10", "neo_kd",
            {**_MSDNET, "method": method}, cut=True,
            transfer=None if method == "adversarial" else "msdnet-cifar10-adversarial",
        )  # fmt: skip
    yield _train(
        "resnet38", "d", "164 epochs by RDI-Nets' schedule", 8.0, "cifar10", "rdi",
        {"model": "resnet38", "keep": "last", "validate_every": 10}, cut=True,
    )  # fmt: skip
    for method, preset in (("neo-kd", "neo_kd"), ("hdkd", "hdkd")):
        yield _train(
            f"msdnet-cifar100-{method}", "e", f"7 exits, schedule of {method}", 8.0, "cifar100", preset,
            {"model": "msdnet-cifar100", "keep": "last", "validate_every": 10}, cut=True,
        )  # fmt: skip


def _distillation() -> Iterator[Item]:
    """Group f: a large teacher and its student."""
    yield _train(
        "resnet18-teacher", "f", "7 minutes by the clock, weights perturbed too", 8.0, "cifar10", "fast",
        {"model": "resnet18-single", "minutes": 7.0, "awp": 0.005, **_HALF_CLEAN}, cut=True,
    )  # fmt: skip
    yield _train(
        "wide-cnn-distilled", "f", "ARD with that teacher, 4 minutes", 5.5, "cifar10", "fast",
        {
            "model": "wide-cnn", "minutes": 4.0, "method": "ard", "attack": "max-average",
            "options": {"share": 0.9, "temperature": 1.0}, "teachers": ("runs/resnet18-teacher",),
        },
        needs=("resnet18-teacher",), cut=True, transfer="wide-cnn-adversarial",
    )  # fmt: skip


def _mnist() -> Iterator[Item]:
    """Group g: MNIST."""
    for seed in range(2):
        yield _train(
            f"mnist-cnn-{seed}", "g", "recipe of mnist_recipes.py", 4.0, "mnist", "neo_kd",
            {**MNIST_RECIPE, "seed": seed}, cut=True,
        )  # fmt: skip
    for seed in range(3):
        for method in ("adversarial", "neo-kd", "skd", "ard", "lw"):
            yield _train(
                f"small-cnn-{method}-{seed}", "g", "150 epochs on MNIST", 6.0, "mnist", "neo_kd",
                {**_SMALL_CNN, "method": method, "seed": seed}, cut=True, keep=seed == 0,
                transfer=None if method == "adversarial" else f"small-cnn-adversarial-{seed}",
            )  # fmt: skip
    for seed in range(5):
        yield Item(
            f"claims-{seed}", "g", "claims", "the claims of benchmarks/method_claims.py, one seed", 8.0, "mnist",
            cut=True, settings={"seed": seed},
        )  # fmt: skip


# Minutes of AutoAttack on all exits and on `medium`, 1,000 images, by the beginning of the name.
_ATTACK_MINUTES = {"wide-cnn": 5.0, "resnet18": 3.0, "msdnet-cifar100": 20.0, "msdnet-cifar10": 8.0, "resnet38": 15.0}


def with_autoattack(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each that trains followed by the one that runs AutoAttack on its weights."""
    for item in items:
        yield item
        if item.kind == "train":
            minutes = next((value for name, value in _ATTACK_MINUTES.items() if item.name.startswith(name)), 4.0)
            yield Item(
                AUTOATTACK + item.name, item.group, "autoattack", "every exit and the policy medium", minutes,
                item.data, needs=(item.name,), cut=True,
            )  # fmt: skip


_GROUPS = (_checks, _cifar10_by_the_clock, _published_schedules, _distillation, _mnist)
QUEUE: tuple[Item, ...] = tuple(with_autoattack(item for group in _GROUPS for item in group()))


def find(name: str) -> Item:
    """The item of that name. Raises `KeyError`."""
    return {item.name: item for item in QUEUE}[name]


# Settings of a rehearsal: a few steps on tiny data.
_TINY: dict[str, Any] = {"batch": 16, "epochs": 1, "steps": 1, "test_steps": 2, "selection_steps": 1}
_TINY_FRACTION = {"cifar10": 0.02, "cifar100": 0.02, "mnist": 0.1}


def miniature(item: Item) -> Item:
    """The item as the rehearsal on a CPU runs it: a few steps, and attacks of one or two steps."""
    if item.kind != "train":
        return replace(item, minutes=0.2)
    tiny = _TINY | {"fraction": _TINY_FRACTION[item.data]}
    if item.preset == "fast":
        tiny |= {"recompute_norms": 16}
    if "minutes" in item.settings:
        tiny = {name: value for name, value in tiny.items() if name != "epochs"} | {"minutes": 0.05}
    return replace(item, minutes=0.2, settings={**item.settings, **tiny})

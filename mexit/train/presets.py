"""Published training schedules, by data set.

A preset maps names of `TrainSettings` fields to values. It names its method; `options` are options of that method
and apply to no other. `decay_at` holds fractions of the run, so a schedule keeps its shape under another `epochs`.

neo_kd            NEO-KD (S. Ham et al., NeurIPS 2023)
rdi               RDI-Nets (T.-K. Hu et al., ICLR 2020); `rdi_mobilenetv2` is its schedule for MobileNetV2
hdkd              HDKD (AAAI 2021)
fast              ours, for a GPU: short schedule of wide-cnn with an attack that grows stronger
demo              a short NEO-KD run on digits
pictures          ours, for a folder: a short schedule by the clock on clean images; `robust_pictures` with an attack
finetune          ours, for a pretrained network, also after its heads (`--freeze`); `robust_finetune` with an attack
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mexit.errors import UsageError
from mexit.models.backbones import is_backbone
from mexit.train.methods import method_class

_NEO_KD: dict[str, Any] = {"method": "neo-kd", "weight_decay": 5e-4, "steps": 7, "test_steps": 50}
_RDI: dict[str, Any] = {
    "method": "adversarial", "options": {"clean_weight": 0.5, "attacked_weight": 0.5}, "craft_train_mode": True,
}  # fmt: skip

_MNIST_NEO_KD = _NEO_KD | {
    "epochs": 150, "batch": 128, "lr": 0.01, "decay_at": (50 / 150,), "eps": 0.3, "step": 20 / 255,
}  # fmt: skip
# 13,100 steps of 256 images are 56 passes over MNIST.
_MNIST_RDI = _RDI | {
    "epochs": 56, "batch": 256, "lr": 0.033, "weight_decay": 5e-4, "decay_at": (11_700 / 13_100, 12_900 / 13_100),
    "eps": 0.3, "step": 0.01, "steps": 40, "test_steps": 40,
}  # fmt: skip
_CIFAR_NEO_KD = _NEO_KD | {
    "epochs": 150, "batch": 128, "lr": 0.1, "decay_at": (75 / 150, 115 / 150),
    "eps": 8 / 255, "step": 2 / 255, "augment": "crop-flip",
}  # fmt: skip
# 64,000 steps of 128 images are 164 passes over the 50,000 images of CIFAR; 82,000 steps are 210 passes.
_CIFAR_RDI = _RDI | {
    "model": "resnet38", "epochs": 164, "batch": 128, "lr": 0.1, "weight_decay": 1e-4, "decay_at": (32 / 64, 48 / 64),
    "eps": 8 / 255, "step": 2 / 255, "steps": 10, "test_steps": 20, "augment": "crop-flip",
}  # fmt: skip
_CIFAR_RDI_MOBILENETV2 = _CIFAR_RDI | {
    "model": "mobilenetv2", "epochs": 210, "lr": 0.05, "decay_at": (61.7 / 82, 70 / 82, 78 / 82),
}  # fmt: skip
# Published for CIFAR-100. Our choices: the weight decay (that of DBT's code), the augmentation, and CIFAR-10.
_CIFAR_HDKD = {
    "method": "hdkd", "epochs": 300, "batch": 128, "lr": 0.1, "weight_decay": 1e-4, "decay_at": (0.5, 0.75),
    "eps": 8 / 255, "step": 2 / 255, "steps": 7, "test_steps": 50, "augment": "crop-flip",
}  # fmt: skip
# Sources of the parts: one-cycle rate and few epochs, E. Wong, L. Rice, Z. Kolter, ICLR 2020; weight decay, EMA, and
# PGD-AT instead of TRADES below 2 M parameters, T. Pang et al., ICLR 2021; alternating mirror images, arXiv 2404.00498.
_CIFAR_FAST = _NEO_KD | {
    "options": {"alpha": 1.5, "clean_weight": 0.5}, "model": "wide-cnn", "epochs": 100, "batch": 512, "lr": 0.2,
    "lr_schedule": "one-cycle", "warmup": 0.15, "nesterov": True, "decay_norms": False, "label_smoothing": 0.1,
    "ema": 0.998, "recompute_norms": 10_000, "augment": "reflect-crop-flip", "eps": 8 / 255, "step": 2 / 255,
    "steps": 10, "short_attack_until": 0.15, "average_attack_until": 0.6, "validate_every": 10,
}  # fmt: skip
_CIFAR = {
    "neo_kd": _CIFAR_NEO_KD, "rdi": _CIFAR_RDI, "rdi_mobilenetv2": _CIFAR_RDI_MOBILENETV2, "hdkd": _CIFAR_HDKD,
    "fast": _CIFAR_FAST,
}  # fmt: skip
# Our choices: the augmentation of both, and epochs and batch for ImageNet, which are those of MSDNet's own training.
_TINY_IMAGENET_NEO_KD = _NEO_KD | {
    "epochs": 150, "batch": 128, "lr": 0.1, "decay_at": (50 / 150, 100 / 150),
    "eps": 2 / 255, "step": 2 / 3 * 2 / 255, "augment": "crop-flip",
}  # fmt: skip
_IMAGENET_NEO_KD = _NEO_KD | {
    "epochs": 90, "batch": 256, "lr": 0.001, "eps": 2 / 255, "step": 2 / 3 * 2 / 255, "augment": "resized-crop-flip",
}  # fmt: skip
_DEMO = _NEO_KD | {
    "attack": "average", "epochs": 20, "batch": 64, "lr": 0.03, "decay_at": (0.6, 0.85), "eps": 0.1, "step": 0.025,
}  # fmt: skip

# Ours. Parts of `fast` that hold without an attack; batch and learning rate are those of `fast` in proportion, halved
# below BatchNorm's usual 128 images.
_PICTURES: dict[str, Any] = {
    "method": "clean", "minutes": 10.0, "batch": 64, "lr": 0.05, "lr_schedule": "one-cycle", "warmup": 0.15,
    "nesterov": True, "decay_norms": False, "weight_decay": 5e-4, "label_smoothing": 0.1, "ema": 0.998,
    "recompute_norms": 10_000, "augment": "photo", "eps": 8 / 255, "step": 2 / 255,
}  # fmt: skip
ROBUST_PICTURES = "robust_pictures"
# Few steps of 2.5 eps / steps (A. Madry et al., ICLR 2018). `adversarial`, because in short runs NEO-KD loses more
# points on clean images than it gains under attack (benchmarks/results/cifar10_methods_*, wide_cnn_two_minutes_*).
_ROBUST_PICTURES = _PICTURES | {
    "method": "adversarial", "attack": "average", "steps": 5, "step": 4 / 255, "short_attack_until": 0.3,
}  # fmt: skip

# Ours, for joint training after the heads of a frozen network. The last exit, which is the most accurate, teaches the
# others at a constant temperature: it is confident from the start, so that an adaptive one would grow without end.
FINETUNE, ROBUST_FINETUNE = "finetune", "robust_finetune"
_FINETUNE: dict[str, Any] = {
    "method": "skd", "options": {"share": 0.5, "temperature": 2.0, "scale": 1.0}, "attack": "none", "minutes": 10.0,
    "batch": 32, "lr": 0.0001, "lr_schedule": "one-cycle", "warmup": 0.15, "nesterov": True, "decay_norms": False,
    "weight_decay": 1e-4, "augment": "photo", "eps": 8 / 255, "step": 2 / 255,
}  # fmt: skip
_FROZEN = {
    FINETUNE: _FINETUNE,
    ROBUST_FINETUNE: _FINETUNE | {"attack": "average", "steps": 5, "step": 4 / 255, "short_attack_until": 0.3},
}

_SCHEDULES: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"demo": _DEMO},
    "mnist": {"neo_kd": _MNIST_NEO_KD, "rdi": _MNIST_RDI},
    "fashion-mnist": {"neo_kd": _MNIST_NEO_KD, "rdi": _MNIST_RDI},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": {"neo_kd": _TINY_IMAGENET_NEO_KD},
    "imagenet": {"neo_kd": _IMAGENET_NEO_KD},
    "folder": {
        "pictures": _PICTURES,
        ROBUST_PICTURES: _ROBUST_PICTURES,
        "neo_kd": _MNIST_NEO_KD | {"eps": 8 / 255, "step": 2 / 255},
    },
}
# The first preset of a data set is its default.
PRESETS = {data: schedules | _FROZEN for data, schedules in _SCHEDULES.items()}
DEFAULT_MODELS = {
    "digits": "digits-cnn", "cifar10": "msdnet-cifar10", "cifar100": "msdnet-cifar100",
    "tiny-imagenet": "msdnet-tiny-imagenet", "imagenet": "msdnet-imagenet", "folder": "wide-cnn-20m",
}  # fmt: skip


def default_preset(presets: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The first preset of a data set, or that of a pretrained network or of training with an attack if `given` does so.

    Folders train a backbone of the user with the presets of pretrained networks: the rate of `pictures` is 50 times
    theirs and destroys pretrained weights.
    """
    pretrained = given.get("freeze") or given.get("finetune")
    pretrained = pretrained or (ROBUST_PICTURES in presets and is_backbone(given.get("model", "")))
    clean, robust = (FINETUNE, ROBUST_FINETUNE) if pretrained else (next(iter(presets)), ROBUST_PICTURES)
    if robust not in presets:
        return clean
    attacked = "robust" in given or given.get("attack", "none") != "none"
    if "method" in given:
        attacked |= method_class(given["method"]).attack_use in ("required", "preferred")
    return robust if attacked else clean


def expand_robust(given: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Replace "robust" by the radius, the step in the proportion of the preset, and an attack."""
    if "robust" not in given:
        return dict(given)
    eps, given = given["robust"], {name: value for name, value in given.items() if name != "robust"}
    name = given.get("method", preset["method"])
    if method_class(name).attack_use == "never" or given.get("attack") == "none":
        raise UsageError(f"--robust trains against attacks, and method {name} here on clean images: choose one of them")
    if given.get("eps", eps) != eps:
        raise UsageError(f"two radii of the attacks: --robust {eps:.6g} and --eps {given['eps']:.6g}")
    attack = {"attack": "average"} if method_class(name).attack_use == "optional" else {}
    return attack | {"step": eps * preset["step"] / preset["eps"]} | given | {"eps": eps}

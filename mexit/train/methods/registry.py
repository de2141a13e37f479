"""The methods, by the name typed after `--method`: one file each, each a thin objective on the same loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mexit.errors import UsageError
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.ard import ARD
from mexit.train.methods.at_aka import AtAka, AtAkaTeacher, CatAka
from mexit.train.methods.base import Outputs, TrainingMethod
from mexit.train.methods.cap import CAP
from mexit.train.methods.clean import Clean
from mexit.train.methods.cmic import CMIC
from mexit.train.methods.hdkd import HDKD
from mexit.train.methods.lw import LW
from mexit.train.methods.mcmi import MCMI
from mexit.train.methods.mse import MSE
from mexit.train.methods.neo_kd import NeoKD
from mexit.train.methods.skd import SKD

__all__ = ["METHODS", "Outputs", "TrainingMethod", "build", "default_attack", "find"]

METHODS: dict[str, type[Any]] = {
    "clean": Clean,
    "adversarial": Adversarial,
    "neo-kd": NeoKD,
    "skd": SKD,
    "ard": ARD,
    "lw": LW,
    "mse": MSE,
    "mcmi": MCMI,
    "hdkd": HDKD,
    "cmic": CMIC,
    "cap": CAP,
    "at-aka": AtAka,
    "at-aka-teacher": AtAkaTeacher,
    "cat-aka": CatAka,
}

_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "nothing"}

# Published for NEO-KD by number of exits: 3 (MNIST, CIFAR-10), 5 (Tiny-ImageNet, ImageNet), 7 (CIFAR-100).
NEO_KD_GAMMA = {5: (1.0, 1.0, 1.0, 1.5, 1.5), 7: (1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5)}


def default_attack(method: str) -> str:
    """The attack a method trains on where none is named."""
    return str(find(method).default_attack)


def build(method: str, exits: int, options: Mapping[str, Any]) -> TrainingMethod:
    """The objective of a method; `options` are fields of its class.

    Raises:
        UsageError: an unknown option, or a value that it cannot take.
    """
    kind = find(method)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    unknown = sorted(set(options) - set(names))
    if unknown:
        have = ", ".join(names) or "none"
        raise UsageError(f"method {method} has no option {', '.join(unknown)}; it has: {have}")
    hints = get_type_hints(kind)
    values = {name: _option(name, value, hints[name]) for name, value in options.items()}
    if kind is NeoKD:
        values.setdefault("gamma", NEO_KD_GAMMA.get(exits, (1.0,) * exits))
    objective: TrainingMethod = kind(**values)
    return objective


def _option(name: str, value: Any, kind: Any) -> Any:
    """A value as typed after `--set`, or as stored, in the type of the option."""
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for choice in choices:
        if get_origin(choice) is tuple:
            several = value if isinstance(value, list | tuple) else (value,)
            return tuple(_option(name, one, get_args(choice)[0]) for one in several)
        if isinstance(value, bool) or choice is bool:
            if isinstance(value, bool) and choice is bool:
                return value
        elif choice is int and isinstance(value, int | float) and float(value).is_integer():
            return int(value)
        elif isinstance(value, (int, float) if choice is float else choice):
            return value
    words = " or ".join(_TYPE_WORDS.get(choice, "numbers, comma-separated") for choice in choices)
    raise UsageError(f"option {name} takes {words}, found {value!r}")


def find(method: str) -> type[Any]:
    """The class of a method. Raises `UsageError` naming those that exist."""
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}': choose from {', '.join(METHODS)}")
    return METHODS[method]

"""The training methods by the name typed after `--method`, and their construction from options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mexit.errors import UsageError
from mexit.train.methods.adversarial import Adversarial
from mexit.train.methods.ard import ARD
from mexit.train.methods.at_aka import AtAka, AtAkaTeacher, CatAka
from mexit.train.methods.base import TrainingMethod
from mexit.train.methods.cap import CAP
from mexit.train.methods.clean import Clean
from mexit.train.methods.cmic import CMIC
from mexit.train.methods.hdkd import HDKD
from mexit.train.methods.lw import LW
from mexit.train.methods.mcmi import MCMI
from mexit.train.methods.mse import MSE
from mexit.train.methods.neo_kd import NeoKD
from mexit.train.methods.skd import SKD

METHODS: dict[str, type[TrainingMethod]] = {
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

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "nothing"}


def method_class(name: str) -> type[TrainingMethod]:
    """The class of a method. Raises `UsageError` for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}': choose from {', '.join(METHODS)}")
    return METHODS[name]


def build_method(name: str, options: Mapping[str, Any]) -> TrainingMethod:
    """Build a method.

    Args:
        name: as typed after `--method`.
        options: fields of its class, as typed after `--set` or as stored.

    Raises:
        UsageError: an unknown method or option, or a value of the wrong type or outside its range.
    """
    method = method_class(name)
    names = [field.name for field in dataclasses.fields(method) if field.init]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise UsageError(f"method {name} has no option {', '.join(unknown)}; it has: {', '.join(names) or 'none'}")
    hints = get_type_hints(method)
    return dataclasses.replace(
        method(), **{option: _convert(option, value, hints[option]) for option, value in options.items()}
    )


def _convert(option: str, value: Any, hint: Any) -> Any:
    """The value in the type of the option."""
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if value == choice and not isinstance(value, bool):
                return choice
        raise UsageError(f"{option} must be one of {', '.join(map(str, get_args(hint)))}, found {value!r}")
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple:
            values = value if isinstance(value, list | tuple) else (value,)
            return tuple(_convert(option, one, get_args(kind)[0]) for one in values)
        if isinstance(value, bool) or kind is bool:
            if isinstance(value, bool) and kind is bool:
                return value
        elif kind is int and isinstance(value, int | float) and float(value).is_integer():
            return int(value)
        elif isinstance(value, (int, float) if kind is float else kind):
            return value
    expected = " or ".join(_TYPE_NAMES.get(kind, "numbers, comma-separated") for kind in kinds)
    raise UsageError(f"option {option} takes {expected}, found {value!r}")

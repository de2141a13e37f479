"""Options typed after `--set` reach a method in the right type, or are refused with a message."""

from __future__ import annotations

import dataclasses

import pytest

from mexit.commands.train import method_options
from mexit.errors import UsageError
from mexit.train.methods import METHODS, build_method
from mexit.train.methods.cap import CAP
from mexit.train.methods.mcmi import MCMI
from mexit.train.methods.neo_kd import NeoKD
from mexit.train.methods.skd import SKD


@pytest.mark.parametrize("method", METHODS)
def test_every_default_can_be_typed(method) -> None:
    plain = build_method(method, {})
    for field in dataclasses.fields(METHODS[method]):
        value = getattr(plain, field.name, None) if field.init else None
        if value is None or value == ():
            continue
        text = ",".join(str(one) for one in value) if isinstance(value, tuple) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        typed = build_method(method, method_options([f"{field.name}={text}"]))
        converted = getattr(typed, field.name)
        assert converted == value
        assert type(converted) is type(value)


def test_values_are_converted() -> None:
    mcmi = build_method("mcmi", {"tune_epochs": 20.0})  # as runs of version 0.1.0 store it
    assert isinstance(mcmi, MCMI)
    assert isinstance(mcmi.tune_epochs, int)
    cap = build_method("cap", {"particles": 2.0})
    assert isinstance(cap, CAP)
    assert isinstance(cap.particles, int)
    neo_kd = build_method("neo-kd", {"gamma": 2.0})
    assert isinstance(neo_kd, NeoKD)
    assert neo_kd.gamma == (2.0,)
    skd = build_method("skd", {"temperature": 4, "scale": None})
    assert isinstance(skd, SKD)
    assert (skd.temperature, skd.scale) == (4, None)


@pytest.mark.parametrize(
    ("method", "options", "part"),
    [
        ("cap", {"particles": 2.5}, "particles takes a whole number, found 2.5"),
        ("cap", {"particles": float("inf")}, "a whole number, found inf"),
        ("cap", {"particles": "many"}, "a whole number, found 'many'"),
        ("skd", {"share": "abc"}, "share takes a number"),
        ("neo-kd", {"alpha": True}, "alpha takes a number, found True"),
        ("neo-kd", {"renormalise": 1.0}, "true or false"),
        ("neo-kd", {"gamma": "x"}, "gamma takes a number"),
        ("neo-kd", {"redraw": 3.0}, "redraw must be one of sample, batch, fixed"),
        ("neo-kd", {"delta": 3.0}, "has no option delta"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(method, options, part) -> None:
    with pytest.raises(UsageError, match=part):
        build_method(method, options)

"""Every engine of the catalogue that opens here is held to the rule of `engine_equality`, on real test images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_equality import TOLERANCES, hold
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.errors import BackendError, MissingExtra, UsageError
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.backends.registry import ENGINES, open_backend
from mexit.runtime.reference import run_all_exits

ALWAYS = {"ort", "ort:int8", "openvino", "openvino:int8"}  # their packages are in the dev extra


@pytest.fixture(scope="module")
def images(test_digits) -> NDArray[np.float32]:
    return (test_digits[0][:, None] / np.float32(255)).astype(np.float32)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_an_engine_answers_as_the_slow_reference(name: str, int8_bundle: Path, images) -> None:
    bundle = Bundle.open(int8_bundle)
    try:
        backend = open_backend(bundle, name)
    except (MissingExtra, BackendError, UsageError) as error:
        if name in ALWAYS:
            raise
        pytest.skip(str(error))
    engine = ENGINES[name]
    assert (backend.engine, backend.precision, backend.variant) == (
        engine.engine, engine.precision, engine.variant,
    )  # fmt: skip
    found = hold(backend, OrtBackend(bundle, precision=engine.variant), images)
    print(f"{name}: {found}")  # noqa: T201  the count of moved rows is part of the rule
    if engine.engine == "ort":
        assert (found.difference, found.neighbours, found.moved) == (0, 0, 0)


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_the_static_network_answers_as_the_segments_do(name: str, int8_bundle: Path, images) -> None:
    backend = open_backend(Bundle.open(int8_bundle), name)
    assert "static" not in vars(backend), "it is opened at the first use"
    tolerance = TOLERANCES[ENGINES[name].precision]
    last = run_all_exits(backend, images)[-1]
    features, logits = backend.static.run(backend.carry(images))
    assert features.arrays == ()
    assert np.abs(logits - last).max() <= tolerance * np.abs(last).max()
    runner = backend.static_runners.take()
    runner.start(images[:1])
    assert np.abs(runner.run(1) - logits[:1]).max() <= tolerance * np.abs(last).max()


class Disturbed(OrtBackend):
    """ONNX Runtime under another name, whose logits are `damage`ed."""

    engine = "other"

    def __init__(self, bundle: Bundle, damage) -> None:
        super().__init__(bundle)
        self.runners = None
        self.segments = [_Harmed(segment, damage) for segment in self.segments]


class _Harmed:
    def __init__(self, segment, damage) -> None:
        self.segment, self.damage = segment, damage

    def run(self, carried: HostCarried):
        features, logits = self.segment.run(carried)
        return features, self.damage(logits).astype(np.float32)


def _by_neighbour(logits: np.ndarray) -> np.ndarray:
    """The rows of a large batch learn of each other."""
    return logits + 1e-2 * logits.mean(axis=0) * (len(logits) > 64)


def _late(logits: np.ndarray) -> np.ndarray:
    """Nobody alone is sure of anything: the answer of a batch is no answer of one row."""
    return logits if len(logits) > 1 else logits * 0.9


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lambda z: z * 1.001, "logits differ"), (_by_neighbour, "differ"), (_late, "other rows change")],
)
def test_the_rule_catches_what_it_is_for(damage, said: str, digits_bundle: Path, images) -> None:
    bundle = Bundle.open(digits_bundle)
    with pytest.raises(AssertionError, match=said):
        hold(Disturbed(bundle, damage), OrtBackend(bundle), images)


def test_a_difference_within_tolerance_moves_only_rows_at_a_threshold(digits_bundle: Path, images) -> None:
    bundle = Bundle.open(digits_bundle)
    share = TOLERANCES["bf16"] / 4
    backend = Disturbed(bundle, lambda z: z * (1 - share))
    backend.precision = "bf16"
    found = hold(backend, OrtBackend(bundle), images)
    assert 0 < found.moved < len(images) / 10
    assert found.neighbours == 0

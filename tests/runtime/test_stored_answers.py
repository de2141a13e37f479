"""The check of an opened version with stored answers, and its warm-up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit import Bundle, Runtime
from mexit.errors import BackendError
from mexit.flows.export import ExportOptions, export_bundle
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.registry import open_backend
from mexit.runtime.stored_answers import check_answers, warm_up


@pytest.fixture(scope="module")
def bundle_with_images(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's run, exported with calibration images."""
    options = ExportOptions(calibration_images=True, exits="all", attack="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("with-images"))
        out = Path("bundles/digits").absolute()
        export_bundle(workspace / "runs" / "digits", out=out, options=options)
    return out


class OtherSegment:
    """A segment whose logits a function changes."""

    def __init__(self, segment, change) -> None:
        self._segment, self._change = segment, change

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        carried, logits = self._segment.run(carried)
        return carried, self._change(logits)


class OtherBackend:
    """An engine that computes other logits at one exit."""

    engine, precision, variant, static = "ort", "fp32", "fp32", None

    def __init__(self, backend, k: int, change) -> None:
        self._backend = backend
        self.segments = list(backend.segments)
        self.segments[k - 1] = OtherSegment(self.segments[k - 1], change)

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        return self._backend.carry(images)


def with_changed_exit(path: Path, k: int, change) -> Runtime:
    bundle = Bundle.open(path)
    return Runtime(bundle, OtherBackend(open_backend(bundle, "ort"), k, change), "full")


def test_stored_images_are_answered_as_at_calibration(bundle_with_images: Path) -> None:
    assert check_answers(Runtime.open(bundle_with_images)) == 32


def test_another_rounding_is_accepted(bundle_with_images: Path) -> None:
    assert check_answers(with_changed_exit(bundle_with_images, 2, lambda logits: logits * np.float32(1 + 1e-4))) == 32


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_engine_with_other_answers_is_refused(bundle_with_images: Path, k: int) -> None:
    runtime = with_changed_exit(bundle_with_images, k, lambda logits: -logits)
    with pytest.raises(BackendError, match=rf"exit {k} answers \d+ of 32 stored images"):
        check_answers(runtime)


def test_without_images_values_must_be_finite(digits_bundle: Path) -> None:
    assert check_answers(Runtime.open(digits_bundle)) == 0
    with pytest.raises(BackendError, match="not finite"):
        check_answers(with_changed_exit(digits_bundle, 3, lambda logits: logits * np.float32("nan")))


@pytest.mark.parametrize("budget", ["medium", "full"])
def test_a_warm_up_is_not_counted(digits_bundle: Path, budget: str) -> None:
    runtime = Runtime.open(digits_bundle, budget)
    warm_up(runtime)
    assert runtime.stats.snapshot().predictions == 0

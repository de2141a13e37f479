"""TensorRT on a GPU: the answers of ONNX Runtime, within rounding. Skipped without a GPU.

    python -m pytest tests/gpu -rs

They have never been run: the machines with a GPU so far had no TensorRT.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit.core.bundle import Bundle
from mexit.errors import BackendError, Damaged, MissingExtra
from mexit.flows.tensorrt_engines import build_engines
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.backends.tensorrt import TrtBackend, find_gpu
from mexit.runtime.backends.tensorrt_builder import load_tensorrt
from mexit.runtime.reference import run_all_exits
from mexit.runtime.runtime import Runtime

# Share of the largest logit. Both engines compute in float32 (TF32 is off) and add in another order.
TOLERANCE = 3e-4


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        load_tensorrt()
        find_gpu()
    except (MissingExtra, BackendError) as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path_factory.getbasetemp() / "gpu-cache"))


@pytest.fixture
def images(test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> NDArray[np.float32]:
    """The test split, (449, 1, 8, 8): more rows than an engine takes at once."""
    return (test_digits[0][:, None] / np.float32(255)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 8, 63, 64, 65, 449])
def test_the_logits_of_every_exit_equal_those_of_onnx_runtime(
    digits_bundle: Path, images: NDArray[np.float32], rows: int
) -> None:
    bundle = Bundle.open(digits_bundle)
    logits = run_all_exits(TrtBackend(bundle), images[:rows])
    expected = run_all_exits(OrtBackend(bundle), images[:rows])
    assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_no_row_depends_on_the_rest_of_its_batch(digits_bundle: Path, images: NDArray[np.float32]) -> None:
    backend = TrtBackend(Bundle.open(digits_bundle))
    order = np.random.default_rng(0).permutation(64)
    together = run_all_exits(backend, images[:64])
    np.testing.assert_allclose(run_all_exits(backend, images[order]), together[:, order], rtol=0, atol=1e-4)


def test_answers_equal_those_of_onnx_runtime(
    digits_bundle: Path, test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    """Rows are selected and concatenated on the GPU; an exit may differ only at a threshold."""
    answers = [
        Runtime.open(digits_bundle, "medium", backend=name)(test_digits[0][..., None].repeat(3, -1))
        for name in ("trt", "ort")
    ]
    differing = sum(one.exit != other.exit for one, other in zip(*answers, strict=True))
    assert differing <= len(answers[0]) // 100, f"{differing} of {len(answers[0])} leave at another exit"


def test_a_changed_plan_is_not_opened(digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "cache"))
    plan = build_engines(digits_bundle).rows[0].file
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(Damaged, match="was changed"):
        Runtime.open(digits_bundle, "full", backend="trt")

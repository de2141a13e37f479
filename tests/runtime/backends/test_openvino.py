"""OpenVINO: precision, validity of results, and concurrent calls."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from mexit import BackendError, UsageError
from mexit.cli import app
from mexit.core.bundle import Bundle
from mexit.runtime.backends import openvino
from mexit.runtime.backends.base import HostCarried
from mexit.runtime.backends.openvino import PRECISIONS, OpenVinoBackend, refuse_other_precision
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.reference import run_all_exits


@pytest.fixture(scope="module")
def bundle(int8_bundle: Path) -> Bundle:
    return Bundle.open(int8_bundle)


@pytest.fixture(scope="module")
def images(test_digits) -> NDArray[np.float32]:
    return (test_digits[0][:200, None] / np.float32(255)).astype(np.float32)


def needs_bf16() -> None:
    if "BF16" not in openvino.load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")


def test_fp32_is_fp32_and_bf16_is_not(bundle: Bundle, images) -> None:
    needs_bf16()
    expected = run_all_exits(OrtBackend(bundle), images)
    scale = np.abs(expected).max()
    assert np.abs(run_all_exits(OpenVinoBackend(bundle), images) - expected).max() < 1e-5 * scale
    rounded = np.abs(run_all_exits(OpenVinoBackend(bundle, precision="bf16"), images) - expected).max()
    assert 1e-4 * scale < rounded < 2e-2 * scale


@pytest.mark.parametrize(
    ("precision", "change"),
    [("fp32", {"hint": "bf16"}), ("bf16", {"hint": "f32"}), ("int8", {"variant": "fp32"})],
)
def test_another_precision_than_the_one_asked_for_is_refused(bundle, monkeypatch, precision, change) -> None:
    needs_bf16()
    monkeypatch.setitem(PRECISIONS, precision, dataclasses.replace(PRECISIONS[precision], **change))
    with pytest.raises(BackendError, match=f"asked for {precision} and compiled .* on this processor: choose"):
        OpenVinoBackend(bundle, precision=precision)


@pytest.mark.parametrize(
    ("precision", "used", "good"),
    [
        ("fp32", {"f32"}, True), ("fp32", {"f32", "bf16"}, False), ("fp32", set(), False),
        ("bf16", {"bf16", "f32"}, True), ("bf16", {"f16"}, False),
        ("int8", {"u8", "f32"}, True), ("int8", {"i8"}, True), ("int8", {"f32"}, False),
    ],
)  # fmt: skip
def test_accepted_layer_precisions(precision: str, used: set[str], good: bool) -> None:
    if good:
        refuse_other_precision(precision, used)
    else:
        with pytest.raises(BackendError, match="choose another precision"):
            refuse_other_precision(precision, used)


@pytest.mark.parametrize("threads", [1, 2])
def test_settings_are_read_back(bundle: Bundle, threads: int) -> None:
    for segment in OpenVinoBackend(bundle, threads).segments:
        assert isinstance(segment, openvino.OpenVinoSegment)
        setting = segment.compiled.get_property
        assert setting("INFERENCE_NUM_THREADS") == threads
        assert setting("NUM_STREAMS") == 1
        assert setting("ENABLE_CPU_PINNING") is False
        assert setting("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_referenced_results_never_change(bundle: Bundle, images) -> None:
    first = OpenVinoBackend(bundle).segments[0]
    results = []
    for start in range(0, 80, 8):
        features, logits = first.run(HostCarried([images[start : start + 8]]))
        results += [(array, array.copy()) for array in (*features.arrays, logits)]
    first.run(HostCarried([images[:8] * 0.5]))
    for array, before in results:
        assert array.base is None, "a view of memory that another call may write"
        np.testing.assert_array_equal(array, before)


def test_inputs_are_not_changed_and_may_be_read_only(bundle: Bundle, images) -> None:
    backend = OpenVinoBackend(bundle)
    frozen = images[:8].copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(run_all_exits(backend, frozen), run_all_exits(backend, images[:8].copy()))
    turned = np.ascontiguousarray(images[:8, :, :, ::-1])[:, :, :, ::-1]
    np.testing.assert_array_equal(run_all_exits(backend, turned), run_all_exits(backend, frozen))
    np.testing.assert_array_equal(frozen, images[:8])


def test_concurrent_calls(bundle: Bundle, images) -> None:
    backend = OpenVinoBackend(bundle)
    parts = [images[start : start + 1 + start % 7] for start in range(0, 190, 5)]
    alone = [run_all_exits(backend, part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            concurrent = pool.map(lambda part: run_all_exits(backend, part), parts)
            for logits, expected in zip(concurrent, alone, strict=True):
                np.testing.assert_array_equal(logits, expected)


def test_the_engine_works_after_a_failed_call(bundle: Bundle, images) -> None:
    backend = OpenVinoBackend(bundle)
    expected = run_all_exits(backend, images[:4])
    with pytest.raises(BackendError, match=r"openvino failed in segments/fp32/1\.onnx"):
        backend.segments[0].run(HostCarried([np.zeros((4, 3, 8, 8), np.float32)]))
    np.testing.assert_array_equal(run_all_exits(backend, images[:4]), expected)


def test_invalid_threads_and_models_are_refused(bundle: Bundle, monkeypatch) -> None:
    with pytest.raises(UsageError, match="threads must be at least 1, found 0"):
        OpenVinoBackend(bundle, 0)
    monkeypatch.setattr(Bundle, "segment", lambda *_: b"no model")
    with pytest.raises(BackendError, match=r"openvino cannot load segments/fp32/1\.onnx"):
        OpenVinoBackend(bundle)


def test_a_tensor_that_the_file_lacks_is_named(bundle: Bundle) -> None:
    variant = bundle.manifest.variants["fp32"]
    first = variant.segments[0]
    outputs = (*first.outputs[:-1], dataclasses.replace(first.outputs[-1], name="answers"))
    segments = (dataclasses.replace(first, outputs=outputs), *variant.segments[1:])
    variants = {"fp32": dataclasses.replace(variant, segments=segments)}
    changed = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, variants=variants))
    with pytest.raises(BackendError, match=r"segments/fp32/1\.onnx has no tensor 'answers'"):
        OpenVinoBackend(changed)


@pytest.mark.parametrize("backend", ["openvino", "openvino:bf16"])
def test_the_command_refuses_a_budget_of_an_engine_that_was_not_calibrated(digits_bundle, tmp_path, backend) -> None:
    """Exit code 3, and the message names the command to type; the budget `full` works."""
    if backend != "openvino":
        needs_bf16()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.png")
    command = ["run", str(digits_bundle), str(tmp_path / "image.png"), "--backend", backend, "--budget"]
    refused = CliRunner().invoke(app, [*command, "low"])
    assert refused.exit_code == 3
    assert f"mexit calibrate --backend {backend}" in " ".join(refused.output.split())
    assert CliRunner().invoke(app, [*command, "full"]).exit_code == 0

"""Exported segments have the logits of the network, at every exit and batch size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mexit
from mexit.core.atomic_io import sha256_file
from mexit.core.bundle import Bundle
from mexit.errors import BackendError, MissingExtra, UsageError
from mexit.export.validate import check_against_torch
from mexit.flows.export import export_bundle
from mexit.flows.tensorrt_engines import build_engines
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.reference import run_all_exits
from mexit.train.checkpoint import load_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_every_exit_equals_torch_within_1e_4_on_real_images(workspace, digits_bundle, test_digits, batch) -> None:
    model, _, _ = load_model(workspace / "runs" / "digits")
    images = (test_digits[0][:batch, None] / np.float32(255)).astype(np.float32)
    logits = run_all_exits(OrtBackend(Bundle.open(digits_bundle)), images)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    assert np.abs(logits - expected).max() < 1e-4


def test_a_segment_that_differs_from_torch_is_refused(workspace, test_digits) -> None:
    model, _, _ = load_model(workspace / "runs" / "digits")
    images = (test_digits[0][:8, None] / np.float32(255)).astype(np.float32)
    with torch.no_grad():
        wrong = model(torch.from_numpy(images)).numpy()
    wrong[1, 3, 4] += 0.01
    with pytest.raises(BackendError, match="exit 2"):
        check_against_torch(model, lambda _: wrong, images)


def test_segments_hold_no_path_of_the_machine_that_wrote_them(digits_bundle) -> None:
    for segment in (digits_bundle / "segments" / "fp32").glob("*.onnx"):
        content = segment.read_bytes()
        assert str(Path(torch.__file__).parent).encode() not in content
        assert str(Path(mexit.__file__).parent).encode() not in content


def test_the_manifest_records_run_weights_settings_and_splits(workspace, digits_bundle) -> None:
    manifest = Bundle.open(digits_bundle).manifest
    assert manifest.provenance["weights_sha256"] == sha256_file(workspace / "runs" / "digits" / "weights.safetensors")
    assert manifest.provenance["run"] == "runs/digits"
    assert manifest.provenance["settings"]["method"] == "adversarial"
    assert manifest.splits is not None
    assert {name: part.n for name, part in manifest.splits.parts.items()} == {
        "train": 943, "selection": 81, "calibration": 243, "certification": 81, "test": 449,
    }  # fmt: skip


def test_an_existing_bundle_is_replaced_only_on_request(workspace, monkeypatch) -> None:
    monkeypatch.chdir(workspace)
    with pytest.raises(UsageError, match="--replace"):
        export_bundle(Path("runs/digits"))


def test_without_tensorrt_the_bundle_is_complete_and_the_error_names_the_command(digits_bundle, monkeypatch) -> None:
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"mexit export {digits_bundle} --trt"):
        build_engines(digits_bundle)
    assert Bundle.open(digits_bundle).policies().entries

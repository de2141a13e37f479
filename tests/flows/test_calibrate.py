"""Calibration of a bundle: certificates, the images in the bundle, and a folder of the user."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, typed
from PIL import Image

from mexit import Bundle, Damaged, RiskInfeasible, Runtime, UsageError
from mexit.calibrate.calibration import CalibrationTraces
from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.data import digits, splits
from mexit.errors import BadInput
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.export import ExportOptions, export_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def with_images(workspace, tmp_path_factory) -> Path:
    """A bundle with images, outside the workspace of its run."""
    out = tmp_path_factory.mktemp("with-images") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        options = ExportOptions(calibrate=False, calibration_images=True)
        return export_bundle(Path("runs/digits"), out=out, options=options).bundle


def test_the_bundle_has_clean_and_attacked_images_of_the_same_samples(with_images) -> None:
    bundle = Bundle.open(with_images)
    assert {spec.file for spec in bundle.manifest.calibration} == {
        f"calibration/{split}-{condition}.npz"
        for split in ("calibration", "certification")
        for condition in ("clean", "attacked")
    }
    result = calibrate_bundle(with_images, data="bundle")
    traces = [bundle.load_trace(ref) for ref in (result.entry.trace, *result.entry.evidence)]
    for clean, attacked in ((traces[0], traces[1]), (traces[2], traces[3])):
        np.testing.assert_array_equal(clean.index, attacked.index)
        assert attacked.origin.condition.startswith("PGD-50 average")
    assert result.entry.frontier[10].attacked is not None


def test_calibration_on_the_images_equals_calibration_on_the_data_set(with_images, digits_bundle) -> None:
    """The bundle holds all samples of the small splits."""
    from_images = calibrate_bundle(with_images, data="bundle").entry
    assert Runtime.open(digits_bundle).bundle.policies().entries[0].frontier == from_images.frontier


def test_a_device_without_torch_calibrates_from_the_images_in_one_command(with_images, tmp_path) -> None:
    shutil.copytree(with_images, tmp_path / "digits")
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None; "
        "sys.argv = ['mexit', 'calibrate', 'digits', '--data', 'bundle', '--json']; "
        "from mexit.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["entry"]["frontier"][10]["attacked"]["n"] == 81
    assert (printed["expected"]["test"], printed["expected"]["certification"]["n"]) == (None, 81)
    assert "the bundle carries no test images" in printed["expected"]["missing"]
    assert Runtime.open(tmp_path / "digits", "low").calibrated


def test_a_bundle_without_images_is_refused_with_the_option_that_adds_them(bundle_copy) -> None:
    with pytest.raises(UsageError, match="--with-calibration-images"):
        calibrate_bundle(bundle_copy, data="bundle")


def test_damaged_images_are_refused(with_images, tmp_path) -> None:
    copy = Path(shutil.copytree(with_images, tmp_path / "digits"))
    path = copy / "calibration" / "calibration-clean.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match="calibration-clean"):
        Bundle.open(copy)
    path.write_bytes(b"no npz at all")
    manifest = json.loads((copy / "bundle.json").read_text())
    for spec in manifest["calibration"]:
        if spec["file"].endswith("calibration-clean.npz"):
            spec |= {"sha256": sha256_bytes(b"no npz at all"), "bytes": 13}
    (copy / "bundle.json").write_bytes(to_json(manifest))
    with pytest.raises(Damaged, match="not readable"):
        calibrate_bundle(copy, data="bundle")


def test_a_folder_of_the_user_has_no_measurement_under_attack(bundle_copy, tmp_path) -> None:
    data = digits.load()
    for place in splits.split(data).part("train")[:700]:
        image = np.asarray(data.images.at(np.array([place]))[0])
        folder = tmp_path / "own" / str(data.labels[place])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.repeat(4, 0).repeat(4, 1)).save(folder / f"{place}.png")
    result = calibrate_bundle(bundle_copy, data=f"folder:{tmp_path / 'own'}")
    assert "not the data" in result.why_not_attacked
    assert result.expected["test"]["n"] == result.expected["test"]["of"] == 175, "a quarter of the folder"
    assert result.entry.frontier[10].attacked is None
    assert Runtime.open(bundle_copy, "low").calibrated


def test_certificate_is_stored_shown_and_selectable(bundle_copy) -> None:
    result = calibrate_bundle(bundle_copy, options=CalibrateOptions(max_risk=0.2, confidence=0.9, attack="none"))
    (certificate,) = result.entry.certificates
    runtime = Runtime.open(bundle_copy, "certified")
    assert runtime.policy() == result.entry.policy(result.entry.frontier[certificate["first"]])
    shown = typed("inspect", bundle_copy).stdout
    assert certificate["id"] in shown
    assert "with confidence 90.0%" in " ".join(shown.split())


def test_an_infeasible_certificate_changes_nothing_and_has_its_own_exit_code(bundle_copy) -> None:
    before = (bundle_copy / "policies.json").read_bytes()
    said = refused("calibrate", bundle_copy, "--max-risk", 0.001, "--attack", "none", code=3)
    assert RiskInfeasible.exit_code == 3
    assert "2995 samples would do" in said
    assert (bundle_copy / "policies.json").read_bytes() == before


def test_a_cost_bound_too_tight_for_the_risk_is_infeasible(bundle_copy) -> None:
    with pytest.raises(RiskInfeasible):
        calibrate_bundle(
            bundle_copy, options=CalibrateOptions(max_risk=0.05, confidence=0.9, max_cost="17%", attack="none")
        )


def test_score_and_policy_can_be_named(bundle_copy) -> None:
    options = CalibrateOptions(measure="margin", ensemble=True, policy="geometric", attack="none")
    entry = calibrate_bundle(bundle_copy, options=options).entry
    assert (entry.measure, entry.ensemble) == ("margin", True)
    with pytest.raises(UsageError, match="auto, max-probability"):
        calibrate_bundle(bundle_copy, options=CalibrateOptions(measure="softmax"))


def test_the_report_has_scores_reliability_and_held_out_results(bundle_copy) -> None:
    calibrate_bundle(bundle_copy, options=CalibrateOptions(attack="none"))
    content = json.loads((bundle_copy / "reports" / "calibration.json").read_text())
    assert len(content["scores"]) == 8
    assert [row["exit"] for row in content["reliability"]] == [1, 2, 3]
    assert len(content["promised_against_seen"]) == 41
    assert (bundle_copy / "reports" / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_and_certification_share_no_samples_with_each_other_or_with_test(digits_bundle) -> None:
    bundle = Bundle.open(digits_bundle)
    entry = bundle.policies().entries[0]
    parts = splits.split(digits.load()).parts
    for ref in (entry.trace, *entry.evidence):
        trace = bundle.load_trace(ref)
        assert set(trace.index.tolist()) <= set(parts[trace.origin.split].tolist())
        assert not set(trace.index.tolist()) & set(parts["test"].tolist())
    clean = bundle.load_trace(entry.trace)
    with pytest.raises(BadInput, match="disjoint"):
        CalibrationTraces(clean, None, clean, None)


@pytest.mark.parametrize("method", ["conformal", "hoeffding-bentkus"])
def test_removed_risk_methods_are_refused_with_the_two_that_exist(bundle_copy, method) -> None:
    said = refused("calibrate", bundle_copy, "--max-risk", 0.2, "--risk-method", method, code=UsageError.exit_code)
    assert f"unknown risk method '{method}': choose from auto, binomial, betting" in said


def test_a_stored_certificate_of_a_removed_method_stays_readable(bundle_copy) -> None:
    options = CalibrateOptions(max_risk=0.2, confidence=0.9, attack="none")
    entry = calibrate_bundle(bundle_copy, options=options).entry
    stored = replace(entry, certificates=({**entry.certificates[0], "method": "conformal"},))
    bundle = Bundle.open(bundle_copy)
    bundle.save_policies(bundle.policies_or_empty().with_entry(stored))
    assert Bundle.open(bundle_copy).policies().entries[-1].certificates[0]["method"] == "conformal"
    assert Runtime.open(bundle_copy, "certified").calibrated

"""`mexit calibrate --max-error`: from pictures to unsure answers, and what it refuses."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refused, typed
from PIL import Image

from mexit import Bundle, Runtime
from mexit.commands.calibrate import show_calibration
from mexit.core.policies_file import RejectOutcome
from mexit.core.trace import UNKNOWN
from mexit.data import digits, splits
from mexit.errors import BadInput, UsageError
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle

COUNT = 240


@pytest.fixture(scope="module")
def other_things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, in the folder itself and in subfolders that are no classes of the bundle."""
    root, rng = tmp_path_factory.mktemp("other"), np.random.default_rng(0)
    (root / "leaves" / "oak").mkdir(parents=True)
    for number in range(COUNT):
        folder = root if number % 3 else root / "leaves" / "oak"
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{number:03}.png")
    return root


def test_unsure_answers_follow_the_calibrated_thresholds(bundle_copy: Path, other_things: Path, test_digits) -> None:
    options = CalibrateOptions(
        max_error=0.15, confidence=0.9, reject_from=f"folder:{other_things}", max_unknown=0.2, attack="none"
    )
    entry = calibrate_bundle(bundle_copy, options=options).entry
    assert (entry.reject.n, entry.reject.n_unknown, entry.reject.max_unknown) == (81, COUNT // 2, 0.2)
    assert entry.reject.reject_from == f"folder:{other_things}"
    bundle = Bundle.open(bundle_copy)
    unknown = [bundle.load_trace(ref) for ref in entry.evidence if ref.condition == UNKNOWN]
    assert [trace.origin.split for trace in unknown] == ["calibration", "certification"]
    assert not set(unknown[0].index.tolist()) & set(unknown[1].index.tolist())
    noise = [Image.open(path) for path in sorted(other_things.rglob("*.png"))]
    for name in entry.named:
        runtime = Runtime.open(bundle_copy, name)
        outcome = entry.frontier[entry.named[name]].rejected
        assert outcome.unknown_answered <= 0.2
        answers = runtime([np.asarray(image) for image in noise])
        assert np.mean([one.reason != "unsure" for one in answers]) < 0.2
        answers = runtime(test_digits[0][:, None] / np.float32(255))
        answered = np.array([one.reason != "unsure" for one in answers])
        right = np.array([one.index for one in answers], object) == test_digits[1]
        assert abs(answered.mean() - outcome.coverage) < 0.2
        assert right[answered].mean() > 0.85
    report = json.loads((bundle_copy / "reports" / "calibration.json").read_text())
    assert report["promised_against_seen"][-1]["rejected"]["coverage"] == entry.frontier[-1].rejected.coverage


def test_without_max_error_the_next_calibration_removes_the_option(bundle_copy: Path) -> None:
    calibrate_bundle(bundle_copy, options=CalibrateOptions(max_error=0.2, attack="none"))
    assert json.loads((bundle_copy / "policies.json").read_text())["version"] == 2
    result = calibrate_bundle(bundle_copy, options=CalibrateOptions(attack="none"))
    assert result.entry.reject is None
    assert json.loads((bundle_copy / "policies.json").read_text())["version"] == 1
    [lost] = result.lost
    assert lost.text.startswith("removed: the reject option (at most 20.00% wrong answers)")
    restored = typed(*shlex.split(lost.command)[1:], "--attack", "none", "--cost", "macs", "--json")
    assert json.loads(restored.stdout)["entry"]["reject"]["max_error"] == 0.2
    assert json.loads(restored.stdout)["lost"] == []


@pytest.mark.slow
def test_an_export_that_replaces_a_bundle_says_that_the_option_is_removed(bundle_copy: Path, workspace: Path) -> None:
    calibrate_bundle(bundle_copy, options=CalibrateOptions(max_error=0.2, attack="none"))
    run = workspace / "runs" / "digits"
    done = typed("export", run, "--out", bundle_copy, "--exits", "all", "--replace", "--attack", "none")
    shown = " ".join(done.output.split())
    assert done.exit_code == 0, shown
    assert "removed: the reject option (at most 20.00% wrong answers), which the replaced calibration for ort" in shown
    assert f"mexit calibrate {bundle_copy} --backend ort --max-error 0.2" in shown


def test_budgets_that_reject_nothing_are_named(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = calibrate_bundle(bundle_copy, options=CalibrateOptions(max_error=0.2, attack="none"))
    everything = [name for names, point in result.entry.by_policy() for name in names if point.rejected.coverage == 1]
    assert "full" in everything
    show_calibration(result)
    words = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(everything)}: every picture of the certification split is answered" in words
    assert "--reject-from folder:PATH" in words
    frontier = tuple(replace(point, rejected=RejectOutcome(0.9, 0.01, None, (3,))) for point in result.entry.frontier)
    show_calibration(replace(result, entry=replace(result.entry, frontier=frontier)))
    assert "--reject-from" not in capsys.readouterr().out


def test_a_certificate_and_the_option_are_stored_together(bundle_copy: Path) -> None:
    options = CalibrateOptions(max_error=0.2, max_risk=0.2, confidence=0.9, attack="none")
    entry = calibrate_bundle(bundle_copy, options=options).entry
    certified = entry.frontier[entry.named["certified"]]
    assert certified.reject is not None
    assert entry.certificates[0]["max_risk"] == entry.reject.max_error == 0.2
    assert Runtime.open(bundle_copy, "certified").policy().reject == certified.reject


def test_the_command_shows_coverage_and_inspect_does_too(bundle_copy: Path) -> None:
    shown = typed("calibrate", bundle_copy, "--attack", "none", "--max-error", "0.2")
    assert shown.exit_code == 0
    for text in (shown.output, typed("inspect", bundle_copy).output):
        words = " ".join(text.split())
        assert "reject option: at most 20.00% wrong answers" in words
        assert "at most 20.00% of the answers are wrong, with confidence 95.0%" in words
    printed = typed("calibrate", bundle_copy, "--attack", "none", "--max-error", "0.2", "--json").stdout
    assert json.loads(printed)["entry"]["reject"]["max_error"] == 0.2


@pytest.mark.parametrize("score", [{"ensemble": True}, {"measure": "agreement"}])
def test_scores_of_several_exits_are_refused(score: dict[str, Any], bundle_copy: Path) -> None:
    """The static network, which is one of the policies, computes no earlier exits."""
    options = CalibrateOptions(max_error=0.2, attack="none", **score)
    with pytest.raises(UsageError, match="leave out --ensemble and --measure agreement"):
        calibrate_bundle(bundle_copy, options=options)


def test_the_next_command_names_a_budget_that_is_available(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = calibrate_bundle(bundle_copy, options=CalibrateOptions(max_error=0.2, attack="none"))
    show_calibration(result)
    assert "mexit serve --budget low" in capsys.readouterr().out
    named = {name: index for name, index in result.entry.named.items() if name != "low"}
    show_calibration(replace(result, entry=replace(result.entry, named=named), unavailable=("low",)))
    shown = capsys.readouterr().out
    assert "not available: low" in shown
    assert "mexit serve --budget medium" in shown


def test_an_error_that_cannot_be_certified_changes_nothing_and_has_exit_code_3(bundle_copy: Path) -> None:
    before = (bundle_copy / "policies.json").read_bytes()
    said = refused("calibrate", bundle_copy, "--attack", "none", "--max-error", "0.002", code=3)
    assert "cannot be certified at confidence 0.95 on 81 pictures" in said
    assert "would be enough" in said
    assert "is the smallest that this data certifies at that confidence" in said
    assert (bundle_copy / "policies.json").read_bytes() == before
    said = refused("calibrate", bundle_copy, "--attack", "none", "--max-error", "0.03", code=3)
    assert "would be enough; the whole data set has 1797 pictures and needs" in said


@pytest.mark.parametrize("value", ["0", "1", "2%", "-0.1"])
def test_a_bound_that_is_no_share_is_refused(bundle_copy: Path, value: str) -> None:
    said = refused("calibrate", bundle_copy, f"--max-error={value}", code=2)
    assert "--max-error" in said


def test_other_things_without_a_bound_are_refused(bundle_copy: Path, other_things: Path) -> None:
    with pytest.raises(UsageError, match="add --max-error"):
        calibrate_bundle(bundle_copy, options=CalibrateOptions(reject_from=f"folder:{other_things}"))


def test_one_picture_of_other_things_is_too_few(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "few" / "one.png")
    with pytest.raises(BadInput, match="at least 2 are needed"):
        calibrate_bundle(
            bundle_copy,
            options=CalibrateOptions(max_error=0.2, reject_from=f"folder:{tmp_path / 'few'}", attack="none"),
        )


def test_pictures_without_labels_cannot_bound_the_error(bundle_copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    data = digits.load()
    for place in splits.split(data).part("train")[:60]:
        Image.fromarray(np.asarray(data.images.at(np.array([place]))[0])).save(folder / f"{place}.png")
    with pytest.raises(UsageError, match="has no labels, which --max-error needs"):
        calibrate_bundle(bundle_copy, data=f"folder:{folder}", options=CalibrateOptions(max_error=0.2, attack="none"))

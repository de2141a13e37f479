"""Artifacts of released versions give the answers that those versions gave."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import MEXIT, quiet, typed
from numpy.typing import NDArray
from PIL import Image
from write_golden import profile_of

from mexit import Bundle, Runtime
from mexit.core.atomic_io import to_json
from mexit.core.scores import Scorer
from mexit.data import digits

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
having_a_run = pytest.mark.parametrize(
    "released", [version for version in VERSIONS if (GOLDEN / version / "runs").is_dir()], indirect=True, scope="module"
)
having_times = pytest.mark.parametrize(
    "released",
    [version for version in VERSIONS if "time" in json.loads((GOLDEN / version / "answers.json").read_text())],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module", params=VERSIONS)
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder of one released version."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path_factory.mktemp("golden") / request.param))


@pytest.fixture(autouse=True)
def beside_the_run(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the released folder: a bundle names its run relative to it."""
    monkeypatch.chdir(released)


@pytest.fixture(scope="module")
def answers(released: Path) -> dict[str, Any]:
    """What the released version itself said."""
    return json.loads((released / "answers.json").read_text())


@pytest.fixture(scope="module")
def images(test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> NDArray[np.uint8]:
    """The first 100 test digits, uint8 (100, 8, 8)."""
    return test_digits[0][:100]


def output_of(*arguments: object) -> dict[str, Any]:
    """The JSON object that a command prints."""
    result = typed(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_runtime_gives_the_same_answers_at_every_budget(answers, images) -> None:
    for budget, expected in answers["answers"].items():
        name, _, last = budget.partition(", at most exit ")
        runtime = Runtime.open("bundles/demo", budget=name)
        predictions = [runtime(image, max_exit=int(last) if last else None)[0] for image in images]
        assert [one.exit for one in predictions] == expected["exits"], budget
        assert [one.index for one in predictions] == expected["indices"], budget
        assert [one.macs for one in predictions] == expected["macs"], budget
        assert sorted({one.reason for one in predictions}) == expected["reasons"], budget
        np.testing.assert_allclose([one.confidence for one in predictions], expected["confidences"], atol=1e-4)


def test_the_server_gives_the_same_answers(answers, images) -> None:
    expected = answers["answers"]["medium"]
    command = [*MEXIT, "serve", "bundles/demo", "--budget", "medium", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet()) as server:
        try:
            assert server.stdout is not None
            url = next(found[0] for line in server.stdout if (found := re.search(r"http://127.0.0.1:\d+", line)))
            for image, index, k in zip(images[:20], expected["indices"], expected["exits"], strict=False):
                picture = io.BytesIO()
                Image.fromarray(image).save(picture, "PNG")
                with urllib.request.urlopen(f"{url}/v1/classify", data=picture.getvalue(), timeout=30) as reply:
                    prediction = json.loads(reply.read())
                assert (prediction["index"], prediction["exit"]) == (index, k)
        finally:
            server.terminate()


HEADS_LEFT_OUT = {"0.1.0": 3}  # last points of the frontier, for which that version left out heads that now run


def test_calibrating_again_gives_the_same_thresholds(released, answers) -> None:
    options = answers["calibration"].get("options", ("--attack", "none", "--max-risk", 0.05))
    entry = output_of("calibrate", "bundles/demo", *options)["entry"]
    compare_policies(entry, answers["calibration"], HEADS_LEFT_OUT.get(released.name, 0))


@having_times
def test_a_profile_selects_the_same_thresholds_in_time(answers, tmp_path) -> None:
    bundle = Bundle.open("bundles/demo")
    path = tmp_path / "profile.json"
    path.write_bytes(to_json(profile_of(bundle, answers["time"]["times_us"])))
    timing = Runtime.open(bundle.path, cost="time", profile=path).timing
    assert timing is not None
    compare_policies(asdict(timing.entry), answers["time"])
    assert timing.entry.frontier[-1].calibration.mean_us == answers["time"]["times_us"]["static_us"]


def compare_policies(entry: dict[str, Any], expected: dict[str, Any], left_out: int = 0) -> None:
    """Scores, thresholds, costs and certificates are equal, but for the last `left_out` points."""
    assert (entry["measure"], entry["ensemble"], entry["named"]) == tuple(
        expected[key] for key in ("measure", "ensemble", "named")
    )
    np.testing.assert_allclose(entry["temperatures"], expected["temperatures"], rtol=1e-3)
    count = len(entry["frontier"]) - left_out
    points = entry["frontier"][:count]
    assert [point["calibration"]["mean_macs"] for point in points] == expected["mean_macs"][:count]
    for point, thresholds in zip(points, expected["thresholds"][:count], strict=True):
        np.testing.assert_allclose(
            np.array(point["thresholds"], float), np.array(thresholds, float), rtol=1e-3, equal_nan=True
        )
    for certificate, was in zip(entry["certificates"], expected["certificates"], strict=True):
        assert {key: certificate[key] for key in was} == was


@having_a_run
def test_calibrating_again_and_then_evaluating_gives_the_same_evaluation(answers) -> None:
    bundle = Path("bundles/demo")
    output_of("calibrate", bundle, "--attack", "none", "--max-risk", 0.05)
    evaluated = output_of("evaluate", bundle, "--samples", 200, "--steps", 5)
    compare_evaluations(evaluated, answers["evaluation"]["bundle"])
    for name, was in answers["evaluation"]["bundle"]["budgets"].items():
        assert evaluated["budgets"][name]["clean"]["value"] == was["clean"]
        if name != "full":
            assert evaluated["budgets"][name]["clean"]["mean_macs"] == was["mean_macs"]


def test_an_ensemble_that_is_calibrated_again_answers_as_it_was_measured(tmp_path) -> None:
    """In mexit 0.1 the budget `full` answered with the ensemble; calibration now measures the last exit alone."""
    bundle = Bundle.open(shutil.copytree("bundles/demo", tmp_path / "demo"))
    (entry,) = bundle.policies().entries
    bundle.save_policies(bundle.policies().with_entry(replace(entry, ensemble=True, budgets=None)))
    assert Runtime.open(bundle.path).policy("full").ensemble, "stored policies answer as they did"
    output_of("calibrate", bundle.path, "--attack", "none", "--ensemble", "--measure", "max-probability")
    runtime = Runtime.open(bundle.path)
    (entry,) = runtime.bundle.policies().entries
    trace = runtime.bundle.load_trace(next(ref for ref in entry.evidence if ref.split == "certification"))
    images, predictions = digits.load().batch(trace.index, bundle.manifest.input), {}
    for name, index in entry.named.items():
        predictions[name] = runtime(images, budget=name)
        hits = [one.index == label for one, label in zip(predictions[name], trace.labels, strict=True)]
        assert np.mean(hits) == pytest.approx(entry.frontier[index].held_out.accuracy), name
    confidences = [one.confidence for one in predictions["full"]]
    alone, merged = (
        1 / (1 + np.exp(-Scorer("max-probability", both, entry.temperatures, 10).score(trace.logits)[-1]))
        for both in (False, True)
    )
    np.testing.assert_allclose(confidences, alone, atol=1e-4)
    assert np.abs(confidences - merged).max() > 0.05


@having_a_run
def test_a_run_evaluates_the_same(answers) -> None:
    evaluated = output_of("evaluate", "runs/demo", "--samples", 200, "--steps", 5)
    compare_evaluations(evaluated, answers["evaluation"]["run"])


def compare_evaluations(evaluated: dict[str, Any], expected: dict[str, Any]) -> None:
    """Clean accuracy is equal; under attack one image of 200 may differ, since another processor rounds differently."""
    for row, was in zip(evaluated["exits"], expected["exits"], strict=True):
        assert row["clean"]["value"] == was["clean"]
        for attack in ("average", "max-average", "worst"):
            assert row[attack]["value"] == pytest.approx(was[attack], abs=0.0051)


@having_a_run
def test_a_run_exports_to_a_bundle_with_the_same_costs() -> None:
    exported = Path("bundles/again")
    output_of("export", "runs/demo", "--out", exported, "--no-calibrate", "--exits", "all")
    assert Bundle.open(exported).manifest.cumulative_macs == Bundle.open("bundles/demo").manifest.cumulative_macs


@having_a_run
def test_a_run_can_be_continued() -> None:
    assert typed("train", "--resume", "--out", "runs/demo").exit_code == 0

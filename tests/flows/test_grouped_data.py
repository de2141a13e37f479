"""Groups of pictures reach from the folder to splits, traces, certificates and reports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import refused, typed
from PIL import Image

from mexit import Bundle, UsageError
from mexit.data import digits, folder
from mexit.data.dataset import DataSet
from mexit.data.splits import NAMES, Splits
from mexit.errors import RiskInfeasible
from mexit.evaluate.config import EvaluateOptions
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.flows.evaluate import evaluate_model
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.train import TrainOptions, TrainResult, train_model

pytestmark = pytest.mark.slow

CLASSES, FILMS, FRAMES = 3, 40, 4
SETTINGS = {"method": "clean", "model": "digits-cnn", "size": (8, 8), "channels": 1, "epochs": 4, "precision": "fp32"}
OPTIONS = TrainOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders `0` to `2` with films of one digit that moves and changes its brightness."""
    root = tmp_path_factory.mktemp("films")
    data = digits.load()
    for label in range(CLASSES):
        (root / str(label)).mkdir()
        for film, index in enumerate(np.flatnonzero(data.labels == label)[:FILMS]):
            image = np.asarray(data.images.at(np.array([index]))[0])
            large = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
            for frame in range(FRAMES):
                moved = np.roll(large, frame, axis=1) * (10 - frame) // 10
                Image.fromarray(moved.astype(np.uint8)).save(root / str(label) / f"{film:03}_{frame:02}.png")
    return root


@pytest.fixture(scope="module")
def trained(films: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    """A run on the films, and its bundle with calibration images."""
    root = tmp_path_factory.mktemp("grouped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = train_model(f"folder:{films}", settings=SETTINGS, out=root / "run", options=OPTIONS)
        options = ExportOptions(calibration_images=True, exits="all")
        export_bundle(root / "run", out=root / "bundle", options=options)
    return result, root / "bundle"


def test_the_groups_of_a_folder_are_found_and_stored(trained: tuple[TrainResult, Path]) -> None:
    result, bundle = trained
    assert result.settings["group"] == "auto"
    assert result.settings["split_seed"] == 0
    splits = Splits.load(result.run / "splits.npz")
    assert splits.grouping.startswith("120 groups of pictures by track_frame in the names")
    assert splits.groups is not None
    for name in NAMES:
        own = splits.groups_of(splits.part(name))
        others = np.concatenate([splits.groups_of(splits.part(other)) for other in NAMES if other != name])
        assert not np.isin(own, others).any()
    assert Splits.of_bundle(Bundle.open(bundle)).hashes() == splits.hashes()


def test_traces_and_outcomes_count_groups(trained: tuple[TrainResult, Path]) -> None:
    bundle = Bundle.open(trained[1])
    splits, entry = Splits.of_bundle(bundle), bundle.policies().entries[0]
    for ref in (entry.trace, *entry.evidence):
        trace = bundle.load_trace(ref)
        assert (trace.groups == splits.groups_of(trace.index)).all()
        assert len(trace.index) == FRAMES * len(np.unique(trace.groups))
    point = entry.frontier[-1]
    assert point.held_out.groups == point.held_out.n / FRAMES
    assert point.held_out.accuracy_error > 0


@pytest.mark.parametrize("data", [None, "bundle"], ids=["data set", "images in the bundle"])
def test_certificates_count_groups(trained: tuple[TrainResult, Path], tmp_path: Path, data: str | None) -> None:
    bundle = shutil.copytree(trained[1], tmp_path / "bundle")
    groups = Bundle.open(bundle).policies().entries[0].frontier[-1].held_out.groups
    options = CalibrateOptions(attack="none", max_risk=0.02, loss="disagreement")
    with pytest.raises(RiskInfeasible, match=rf"^{groups} groups cannot certify risk 0.02 .* 149 would do"):
        calibrate_bundle(bundle, options=options, data=data)
    result = calibrate_bundle(bundle, options=replace(options, max_risk=0.8, confidence=0.8), data=data)
    assert result.entry.certificates[0]["groups"] == {"clean": groups}
    assert result.entry.certificates[0]["method"] == "betting"


def test_evaluation_counts_groups(trained: tuple[TrainResult, Path]) -> None:
    result = evaluate_model(trained[1], options=EvaluateOptions(groups=(), device="cpu"))
    report = result.report
    row = report["budgets"]["full"]["clean"]
    assert row["groups"] == row["n"] / FRAMES
    naive = np.sqrt(row["value"] * (1 - row["value"]) / row["n"])
    assert row["stderr"] > 1.2 * naive
    card = next(path for path in result.written if path.suffix == ".md").read_text()
    assert "Groups: 120 groups of pictures by track_frame" in card
    assert f"| test | {row['n']} | {row['groups']} |" in " ".join(card.split(" "))


def test_a_seed_and_a_regular_expression_are_settings(films: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"group": r"/(\d+)_", "split_seed": 3, "epochs": 1, "fraction": 0.3}
    run = train_model(f"folder:{films}", settings=settings, out=tmp_path / "run", options=OPTIONS).run
    stored = json.loads((run / "settings.json").read_text())
    assert (stored["group"], stored["split_seed"]) == (r"/(\d+)_", 3)
    splits = Splits.load(run / "splits.npz")
    assert splits.grouping == "40 groups of pictures by '/(\\\\d+)_'"
    for name, value in (("group", "none"), ("split_seed", 4)):
        with pytest.raises(UsageError, match=name.replace("_", ".")):
            train_model(resume=True, out=run, settings={name: value}, options=OPTIONS)


def test_a_group_that_cannot_be_found_is_refused_before_anything_is_written(films: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="matches no path"):
        train_model(f"folder:{films}", settings=SETTINGS | {"group": "clip"}, out=tmp_path / "run", options=OPTIONS)
    assert not (tmp_path / "run").exists()


def test_unlabelled_films_are_divided_by_film(trained: tuple[TrainResult, Path], films: Path, tmp_path: Path) -> None:
    root = shutil.copytree(films / "0", tmp_path / "pictures")
    bundle = shutil.copytree(trained[1], tmp_path / "bundle")
    result = calibrate_bundle(bundle, data=f"folder:{root}")
    traces = [Bundle.open(bundle).load_trace(ref) for ref in (result.entry.trace, *result.entry.evidence)]
    assert not set(traces[0].groups) & set(traces[1].groups)
    stored, labels = Splits.of_bundle(Bundle.open(bundle)), folder.load(films).labels
    unseen = sum((labels[stored.part(name)] == 0).sum() for name in ("calibration", "certification", "test"))
    assert sum(len(trace.index) for trace in traces) == unseen < FILMS * FRAMES, "films that trained are left out"


def test_other_labelled_films_are_split_by_film(trained: tuple[TrainResult, Path], films: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(films, tmp_path / "changed")
    (changed / "0" / "000_00.png").write_bytes((changed / "0" / "001_00.png").read_bytes())
    bundle = shutil.copytree(trained[1], tmp_path / "bundle")
    entry = calibrate_bundle(bundle, data=f"folder:{changed}").entry
    trace = Bundle.open(bundle).load_trace(entry.trace)
    assert len(np.unique(trace.groups)) < len(trace.groups)
    assert folder.load(changed).sha256 != folder.load(films).sha256


def test_pictures_that_trained_do_not_calibrate_after_the_folder_has_changed(
    trained: tuple[TrainResult, Path], films: Path, tmp_path: Path
) -> None:
    """Class 1 has new names, half of class 2 is gone, and class 0 has new films."""
    changed = shutil.copytree(films, tmp_path / "changed")
    for path in sorted((changed / "1").iterdir()):
        path.rename(path.with_name(f"9{path.name}"))
    for path in sorted((changed / "2").iterdir())[::8]:
        path.unlink()
    rng = np.random.default_rng(0)
    for film in range(500, 540):
        scene = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8)).resize((32, 32)))
        for frame in range(FRAMES):
            Image.fromarray(np.roll(scene, frame, axis=1)).save(changed / "0" / f"{film}_{frame:02}.png")
    bundle = shutil.copytree(trained[1], tmp_path / "bundle")
    assert typed("calibrate", bundle, "--data", f"folder:{changed}", "--attack", "none").exit_code == 0
    before, after = folder.load(films), folder.load(changed)
    stored = Splits.of_bundle(Bundle.open(bundle))
    content = {name: {path_bytes(before, i) for i in stored.part(name)} for name in NAMES}
    entry = Bundle.open(bundle).policies().entries[0]
    for ref in (entry.trace, *entry.evidence):
        trace = Bundle.open(bundle).load_trace(ref)
        own = {path_bytes(after, i) for i in trace.index}
        assert not own & (content["train"] | content["selection"])
        assert own & content[trace.origin.split]
        assert any(after.images.names[i].startswith("0/5") for i in trace.index), "new films"


def path_bytes(data: DataSet, i: int) -> bytes:
    return bytes(data.images.at(np.array([i]))[0])


@pytest.mark.parametrize("labels", [True, False], ids=["labelled", "unlabelled"])
def test_a_folder_of_trained_pictures_is_refused(
    trained: tuple[TrainResult, Path], films: Path, tmp_path: Path, labels: bool
) -> None:
    data, stored = folder.load(films), Splits.of_bundle(Bundle.open(trained[1]))
    for i in stored.part("train"):
        name = data.images.names[i]
        path = tmp_path / "own" / (name if labels else name.replace("/", "-"))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(films / name, path)
    bundle = shutil.copytree(trained[1], tmp_path / "bundle")
    before = (bundle / "policies.json").read_bytes()
    said = refused("calibrate", bundle, "--data", f"folder:{tmp_path / 'own'}", "--attack", "none", code=1)
    assert "trained the network" in said
    assert "add pictures that did not" in said
    assert (bundle / "policies.json").read_bytes() == before


@pytest.mark.long
def test_a_changed_folder_has_the_groups_and_the_seed_of_the_run(films: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"group": r"/(\d+)_", "split_seed": 3, "epochs": 1, "fraction": 0.3}
    own = shutil.copytree(films, tmp_path / "own")
    run = train_model(f"folder:{own}/", settings=settings, out=tmp_path / "run", options=OPTIONS).run
    bundle = export_bundle(run, out=tmp_path / "bundle", options=ExportOptions(calibrate=False, exits="all")).bundle
    for path in own.glob("*/*_00.png"):
        path.unlink()
    shown = typed("calibrate", bundle, "--data", f"folder:{own}", "--attack", "none")
    said = " ".join(shown.stderr.split())
    assert "40 groups of pictures by" in said
    assert "360 of the 360 pictures" not in said, "three quarters of the training films were left out by --fraction"
    assert "keep their split" in said
    stored, entry = Splits.load(run / "splits.npz"), Bundle.open(bundle).policies().entries[0]
    trace, after = Bundle.open(bundle).load_trace(entry.trace), folder.load(own)
    names = {folder.load(films).images.names[i] for i in stored.part("calibration")}
    assert {after.images.names[i] for i in trace.index} == {name for name in names if not name.endswith("_00.png")}
    for path in sorted(own.rglob("*.png")):
        path.rename(path.with_name(path.name.replace("_", "-")))
    said = " ".join(typed("calibrate", bundle, "--data", f"folder:{own}", "--attack", "none").stderr.split())
    assert "the groups are found by --group auto, because those of the run cannot be" in said


def test_a_hundred_pictures_without_groups_are_trained_and_exported(tmp_path: Path) -> None:
    data = digits.load()
    for label in range(2):
        (tmp_path / "own" / str(label)).mkdir(parents=True)
        for index in np.flatnonzero(data.labels == label)[:50]:
            image = np.asarray(data.images.at(np.array([index]))[0])
            Image.fromarray(image).save(tmp_path / "own" / str(label) / f"{index}.png")
    run = train_model(f"folder:{tmp_path / 'own'}", settings=SETTINGS, out=tmp_path / "run", options=OPTIONS).run
    stored = Splits.load(run / "splits.npz")
    assert stored.groups is None
    assert (len(stored.part("calibration")), len(stored.part("test"))) == (20, 25)
    export_bundle(run, out=tmp_path / "bundle", options=ExportOptions(exits="all"))
    assert Bundle.open(tmp_path / "bundle").policies().entries[0].frontier[-1].calibration.n == 20

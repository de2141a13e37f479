"""Mistakes at the command line: each has its exit code and a helpful message, and none prints a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import MEXIT, program, quiet, refused, typed
from PIL import Image

from mexit.data.preprocess import MAX_ENCODED_BYTES, MAX_PIXELS


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.fixture
def run_copy(workspace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workspace / "runs" / "digits", tmp_path / "runs" / "digits"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_help_without_a_command_and_usage_error_for_an_unknown_command() -> None:
    assert "demo" in typed().output
    assert "No such command 'tarin'" in refused("tarin", code=2)
    assert "No such option" in refused("inspect", "--nope", code=2)


@pytest.mark.parametrize("command", ["inspect", "calibrate", "bench", "serve", "evaluate", "export"])
def test_without_run_or_bundle_the_message_names_the_command_that_creates_one(command: str) -> None:
    needs_run = command in ("export", "evaluate")
    needed = "no runs here yet: type mexit train" if needs_run else "no bundles here yet: type mexit export"
    assert f"error: {needed}" in refused(command, code=2)


def test_run_and_resume_name_the_command_that_comes_before(picture: Path) -> None:
    assert "error: no bundles here yet: type mexit export" in refused("run", picture, code=2)
    assert "error: no runs here yet: type mexit train" in refused("train", "--resume", code=2)


@pytest.mark.parametrize("command", ["inspect", "calibrate", "bench", "serve"])
def test_a_missing_bundle_is_named(command: str) -> None:
    said = refused(command, "nowhere", code=2)
    assert "error: bundle nowhere does not exist: make one with mexit export" in said


@pytest.mark.parametrize("line", ["export", "evaluate", "train --resume --out"])
def test_a_missing_run_is_named(line: str) -> None:
    said = refused(*line.split(), "nowhere", code=2)
    assert "error: run nowhere does not exist: make one with mexit train" in said


def test_a_pointer_to_a_missing_bundle_is_named() -> None:
    Path("bundles").mkdir()
    for content in (b"bundles/gone\n", b"\0\xff\xfe", b""):
        Path("bundles/latest").write_bytes(content)
        said = refused("inspect", code=2)
        assert "error: bundles/latest names" in said or "does not exist" in said
    os.remove("bundles/latest")
    os.mkdir("bundles/latest")
    assert "pointer bundles/latest is not a file" in refused("inspect", code=5)


@pytest.mark.parametrize("command", ["inspect", "run", "calibrate", "bench", "serve"])
def test_every_command_refuses_a_changed_segment(command: str, bundle_copy: Path, picture: Path) -> None:
    flip(bundle_copy / "segments/fp32/2.onnx")
    arguments = [command, bundle_copy, *([picture] if command == "run" else [])]
    assert "segments/fp32/2.onnx was changed: its sha256 is not the recorded one" in refused(*arguments, code=5)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest cut short": (lambda path: (path / "bundle.json").write_bytes(b'{"format":'), "is not valid JSON"),
    "manifest without a field": (lambda path: without(path / "bundle.json", "exits"), "missing exits"),
    "manifest too new": (lambda path: with_value(path / "bundle.json", "version", 3), "is newer than this mexit"),
    "segment gone": (lambda path: (path / "segments/fp32/1.onnx").unlink(), "1.onnx does not exist, although"),
    "splits gone": (lambda path: (path / "splits.npz").unlink(), "splits.npz does not exist, although bundle.json"),
    "trace changed": (lambda path: flip(next((path / "traces").iterdir())), "was changed after calibration"),
    "trace gone": (lambda path: shutil.rmtree(path / "traces"), "does not exist"),
    "policies cut short": (lambda path: (path / "policies.json").write_bytes(b"{"), "is not valid JSON"),
    "policies changed": (lambda path: with_value(path / "policies.json", "entries", []), "checksum does not match"),
    "policies of another": (lambda path: with_value(path / "policies.json", "model", "f" * 64), "belongs to"),
    "policies too new": (lambda path: with_value(path / "policies.json", "version", 3), "is newer than this"),
}  # fmt: skip


def without(path: Path, field: str) -> None:
    value = json.loads(path.read_bytes())
    del value[field]
    path.write_text(json.dumps(value))


def with_value(path: Path, field: str, new: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), field: new}))


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_inspect_names_the_damaged_file(damage: Callable[[Path], object], words: str, bundle_copy: Path) -> None:
    damage(bundle_copy)
    said = refused("inspect", bundle_copy, code=2 if words == "does not exist" else 5)
    assert said.startswith("error: ")
    assert words in said


@pytest.mark.parametrize("damage", ["policies cut short", "policies changed", "policies of another"])
def test_calibrate_repairs_damaged_policies(damage: str, bundle_copy: Path, picture: Path) -> None:
    DAMAGE[damage][0](bundle_copy)
    assert "run mexit calibrate" in refused("run", bundle_copy, picture, code=5) or damage == "policies cut short"
    assert typed("calibrate", bundle_copy, "--attack", "none").exit_code == 0
    assert typed("inspect", bundle_copy).exit_code == 0
    assert typed("run", bundle_copy, picture).exit_code == 0


def test_swapped_segments_are_damage(bundle_copy: Path, picture: Path) -> None:
    """The checksums match, but the first two segments are swapped: no static network can be derived from them."""
    manifest = json.loads((bundle_copy / "bundle.json").read_bytes())
    one, two = manifest["variants"]["fp32"]["segments"][:2]
    for key in ("file", "sha256", "bytes"):
        one[key], two[key] = two[key], one[key]
    (bundle_copy / "bundle.json").write_text(json.dumps(manifest))
    (bundle_copy / "policies.json").unlink()
    said = refused("run", bundle_copy, picture, "--budget", "full", code=5)
    assert "static.onnx: segment 2 needs input, which segment 1 does not compute" in said


def test_a_bundle_without_splits_needs_data(
    bundle_copy: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_value(bundle_copy / "bundle.json", "splits", None)
    (bundle_copy / "policies.json").unlink()
    monkeypatch.chdir(workspace)  # where the run behind the bundle is
    assert "stores no splits, so it is not known which images calibrate" in refused("calibrate", bundle_copy, code=2)
    assert "stores no splits, so it is not known which images calibrate" in refused("evaluate", bundle_copy, code=2)
    assert typed("bench", bundle_copy, "--repeats", "20", "--batch", "1").exit_code == 0


def test_other_classes_and_broken_images_are_named(digits_bundle: Path, picture: Path) -> None:
    for place in range(60):
        for name in ("cat", "dog"):
            Path("pets", name).mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, Path("pets", name, f"{place}.png"))
            with Path("pets", name, f"{place}.png").open("ab") as file:
                file.write(bytes([place]))
    said = refused("calibrate", digits_bundle, "--data", "folder:pets", code=2)
    assert "folder:pets has the classes 'cat', 'dog'; " in said
    for image in Path("pets/cat").iterdir():
        image.write_bytes(b"no image")
    said = refused("train", "--data", "folder:pets", "--method", "clean", "--epochs", "1", "--threads", "1", code=1)
    assert "pictures that cannot be read: image pets/cat/" in said
    assert "8 bytes that are not an image" in said


def test_an_uncalibrated_bundle_answers_only_with_the_full_budget(bundle_copy: Path, picture: Path) -> None:
    (bundle_copy / "policies.json").unlink()
    assert f"has no policies.json: run mexit calibrate {bundle_copy}" in refused("run", bundle_copy, picture, code=3)
    assert typed("run", bundle_copy, picture, "--budget", "full").exit_code == 0
    assert typed("inspect", bundle_copy).exit_code == 0


def test_an_infeasible_budget_names_a_feasible_one(digits_bundle: Path, picture: Path) -> None:
    said = refused("run", digits_bundle, picture, "--budget", "1%", code=3)
    assert "but the cheapest policy costs" in said
    nearest = said.rpartition(" ")[2]
    assert typed("run", digits_bundle, picture, "--budget", nearest).exit_code == 0
    assert "nearest feasible budget" in refused("calibrate", digits_bundle, "--budget", "tiny=10", code=3)


@pytest.mark.parametrize(
    ("budget", "code", "words"),
    [("cheap", 2, "'cheap' is not a budget: write low, medium, high, full"), ("0", 2, "must be above zero"),
     ("150%", 2, "at most 100%"), ("0ms", 2, "must be above zero"),
     ("certified", 2, "mexit calibrate --max-risk 0.02 makes both")],
)  # fmt: skip
def test_a_malformed_budget_explains_the_notation(
    budget: str, code: int, words: str, digits_bundle: Path, picture: Path
) -> None:
    assert words in refused("run", digits_bundle, picture, "--budget", budget, code=code)


def test_a_named_budget_can_be_used_by_its_name(bundle_copy: Path, picture: Path) -> None:
    done = typed("calibrate", bundle_copy, "--attack", "none", "--budget", "night=33%", "--json")
    assert done.exit_code == 0
    answer = json.loads(typed("run", bundle_copy, picture, "--budget", "night", "--json").stdout)
    assert "night" in json.dumps(answer)


MISTAKES = {
    "run {bundle} {picture} --backend cuda": "unknown backend 'cuda': choose from auto",
    "run {bundle} {picture} --threads 0": "threads must be at least 1, found 0",
    "run {bundle} {picture} --deadline 0": "must be above zero, found 0",
    "run {bundle} {picture} --deadline nan": "must be above zero, found nan",
    "run {bundle}": "no image named: mexit run [BUNDLE] IMAGE...",
    "calibrate {bundle} --budget night": "--budget expects NAME=VALUE, not 'night'",
    "calibrate {bundle} --budget low=33%": "'low' means a budget already: choose another name",
    "calibrate {bundle} --budget 12M=33%": "'12M' means a budget already: choose another name",
    "calibrate {bundle} --measure x --attack none": "unknown measure 'x': choose from",
    "calibrate {bundle} --attack x": "unknown attack 'x'",
    "calibrate {bundle} --data folder:/nowhere": "image folder /nowhere does not exist",
    "calibrate {bundle} --data mnist --data-dir /nowhere": "no mnist in /nowhere/mnist",
    "bench {bundle} --repeats 1": "--repeats must be at least 20",
    "bench {bundle} --batch 0": "each --batch at least 1",
    "evaluate {bundle} --budgets certified": "high, full; mexit calibrate --max-risk 0.02 adds one",
    "evaluate {bundle} --samples -1": "--samples must be at least 1, found -1",
    "evaluate {bundle} --eps 8": "write 8/255, not 8",
    "evaluate {bundle} --eps 8/0": "'8/0' is not a number or a fraction: write 0.3 or 8/255",
    "evaluate {bundle} --eps 0": "0 < eps <= 1",
    "evaluate {bundle} --steps 0": "at least one step",
    "export {bundle}": "is a bundle already",
    "export {run} --out bundles/ä": "cannot be a bundle's name, which is part of URLs",
    "export {run} --out {bundle}": "exists already: choose another name with --out",
    "train --model x": "unknown model 'x': choose from digits-cnn",
    "calibrate {bundle} --loss disagreement": "--loss has no effect alone: add --max-risk, such as 0.02",
    "calibrate {bundle} --risk-method auto --max-error 0.1": "--risk-method has no effect alone: add --max-risk",
    **{
        f"calibrate {{bundle}} --target-drop {share}": "--target-drop must lie between 0 and 1"
        for share in ("0", "-0.1", "1", "nan")
    },
    "calibrate {bundle} --max-cost 50%": "--max-cost has no effect alone: add --max-risk",
    "calibrate {bundle} --confidence 0.9": "--confidence has no effect alone: add --max-risk, --target-drop",
    "calibrate {bundle} --max-error 0.1 --max-unknown 0.2": "--max-unknown has no effect alone: add --reject-from",
    "export {bundle} --trt --attack none --no-calibrate": "--attack and --no-calibrate: for the export of a run, and",
    "export {bundle} --trt --out x": "--out: for the export of a run",
    "train --method x": "unknown method 'x': choose from clean",
    "train --set x=1": "has no option x; it has: ",
    "train --set x": "--set expects NAME=VALUE, not 'x'",
    "train --preset x": "no preset 'x' for digits: choose from demo",
    "train --data x": "unknown data set 'x': choose from digits",
    "train --data mnist --data-dir /nowhere": "no mnist in /nowhere/mnist",
    "train --epochs 0": "--epochs must be at least 1, found 0",
    "train --epochs many": "Invalid value for '--epochs'",
    "train --lr nan": "lr must be above 0",
    "train --eps nan": "0 < eps <= 1",
    "train --seed -1": "seed must be at least 0, found -1",
    "train --threads -1": "threads must be at least 1, found -1",
    "train --device tpu": "unknown device 'tpu': choose auto, cpu or cuda",
    "train --keep worst": "keep must be one of last, best",
    "train --out {run}": "exists already: continue it with --resume --out",
}


@pytest.mark.parametrize(("line", "words"), MISTAKES.items(), ids=MISTAKES.keys())
def test_a_mistake_is_explained(
    line: str,
    words: str,
    workspace: Path,
    digits_bundle: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if line.startswith(("evaluate", "calibrate")):
        monkeypatch.chdir(workspace)  # where the run behind the bundle is
    places = {"bundle": digits_bundle, "picture": picture, "run": workspace / "runs/digits"}
    assert words in refused(*(word.format(**places) for word in line.split()), code=2)


def test_export_replaces_only_bundles(workspace: Path) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter1.txt").write_text("years of work")
    said = refused("export", workspace / "runs/digits", "--out", "thesis", "--replace", code=2)
    assert "thesis is not a bundle, so it is not replaced" in said
    assert Path("thesis/chapter1.txt").read_text() == "years of work"


RUN_DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "weights changed": (lambda run: (run / "weights.safetensors").write_bytes(b"\xff" * 99), 5, "is not readable"),
    "weights empty": (lambda run: (run / "weights.safetensors").write_bytes(b""), 5, "is not readable"),
    "weights gone": (lambda run: (run / "weights.safetensors").unlink(), 2, "mexit train --resume"),
    "settings gone": (lambda run: (run / "settings.json").unlink(), 2, "settings.json does not exist"),
    "settings no json": (lambda run: (run / "settings.json").write_bytes(b"{"), 5, "is not valid JSON"),
    "settings without lr": (lambda run: without(run / "settings.json", "lr"), 5, "settings.json: missing lr"),
    "settings lr a text": (lambda run: with_value(run / "settings.json", "lr", "fast"), 5, "lr: expected float"),
    "settings lr negative": (lambda run: with_value(run / "settings.json", "lr", -1), 5, "lr must be above 0"),
    "settings of another": (lambda run: with_value(run / "settings.json", "model", "small-cnn"), 5, "another net"),
    "settings of no model": (lambda run: with_value(run / "settings.json", "model", "x"), 2, "unknown model 'x'"),
    "splits cut short": (lambda run: (run / "splits.npz").write_bytes(b"PK"), 5, "splits.npz are not readable"),
    "splits gone": (lambda run: (run / "splits.npz").unlink(), 2, "splits.npz does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["export", "evaluate"])
@pytest.mark.parametrize(("damage", "code", "words"), RUN_DAMAGE.values(), ids=RUN_DAMAGE.keys())
def test_a_damaged_run_file_is_named(
    command: str, damage: Callable[[Path], object], code: int, words: str, run_copy: Path
) -> None:
    damage(run_copy)
    if command == "export":  # without its weights a run is exported from its checkpoint
        (run_copy / "checkpoint.safetensors").unlink()
    assert words in refused(command, run_copy, code=code)


def test_good_images_are_answered_beside_bad_ones(digits_bundle: Path, picture: Path) -> None:
    Path("bad.png").write_bytes(b"no image")
    Path("cut.png").write_bytes(picture.read_bytes()[:40])
    Path("folder.png").mkdir()
    result = typed("run", digits_bundle, "bad.png", picture, "gone.png", "cut.png", "folder.png", "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert "8 bytes that are not an image: supported are PNG, JPEG" in json.dumps(shown)
    assert "gone.png does not exist" in json.dumps(shown)
    plain = typed("run", digits_bundle, "gone.png", picture)
    assert plain.exit_code == 2
    assert "gone.png does not exist" in plain.output
    assert "x.png" in plain.output


def test_a_huge_image_is_refused_and_a_tiny_one_is_answered(digits_bundle: Path) -> None:
    with Path("large.png").open("wb") as file:
        file.truncate(MAX_ENCODED_BYTES + 1)
    Image.new("1", (30_000, 3_000)).save("wide.png")
    Image.new("L", (1, 1)).save("tiny.png")
    for name, words in (
        (
            "large.png",
            f"image large.png has {MAX_ENCODED_BYTES + 1} bytes; at most {MAX_ENCODED_BYTES} are expected",
        ),
        ("wide.png", f"the image has 30000 x 3000 pixels; at most {MAX_PIXELS} are allowed"),
    ):
        result = typed("run", digits_bundle, name)
        assert result.exit_code == 1
        assert words in " ".join(result.output.split())
    assert typed("run", digits_bundle, "tiny.png").exit_code == 0


@pytest.mark.slow
def test_a_file_name_that_is_not_utf8_is_shown_escaped(digits_bundle: Path, picture: Path) -> None:
    odd = os.fsdecode(b"odd-\xff.png")
    shutil.copy(picture, odd)
    strict = {**quiet(), "PYTHONIOENCODING": "utf-8:strict"}
    for flags in ([], ["--json"]):
        assert program("run", digits_bundle, odd, *flags, env=strict).returncode == 0
    assert program("run", digits_bundle, os.fsdecode(b"gone-\xff.png"), env=strict).returncode == 2


def test_a_closed_standard_output_is_no_error(digits_bundle: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MEXIT, "inspect", str(digits_bundle)], stdout=writing, stderr=subprocess.PIPE, env=quiet())
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def test_ctrl_c_ends_any_command_with_130(workspace: Path) -> None:
    command = [*MEXIT, "bench", "--repeats", "1000000"]
    process = subprocess.Popen(
        command,
        cwd=workspace,
        env=quiet(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("using bundles/digits, ")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("error: stopped\n")
    assert "Traceback" not in said

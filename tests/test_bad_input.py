"""Every mistake at the command line: its exit code, words that help, never a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import program, refused, typed
from PIL import Image

COMMANDS = {
    "inspect": ["inspect"],
    "run": ["run", "{}", "x.png"],
    "calibrate": ["calibrate"],
    "bench": ["bench"],
    "serve": ["serve", "--port", "0"],
    "evaluate": ["evaluate"],
    "export": ["export"],
}


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


def test_no_command_shows_help_and_an_unknown_one_is_a_usage_error() -> None:
    assert "demo" in typed().output
    assert "No such command 'tarin'" in refused("tarin", code=2)
    assert "No such option" in refused("inspect", "--nope", code=2)


@pytest.mark.parametrize("command", ["inspect", "calibrate", "bench", "serve", "evaluate", "export"])
def test_with_nothing_made_yet_the_command_that_makes_it_is_named(command: str) -> None:
    needed = "runs here yet: type mexit train" if command in ("export", "evaluate") else "bundles here yet: type mexit"
    assert f"error: no {needed}" in refused(command, code=2)


def test_run_and_resume_name_what_to_make_first(picture: Path) -> None:
    assert "error: no bundles here yet: type mexit export" in refused("run", picture, code=2)
    assert "error: no runs here yet: type mexit train" in refused("train", "--resume", code=2)


@pytest.mark.parametrize("command", ["inspect", "calibrate", "bench", "serve"])
def test_a_bundle_that_does_not_exist_is_named(command: str) -> None:
    assert "error: bundle nowhere does not exist: make one with mexit export" in refused(command, "nowhere", code=2)


@pytest.mark.parametrize("arguments", [["export", "nowhere"], ["evaluate", "nowhere"], ["train", "--resume", "--out", "nowhere"]])
def test_a_run_that_does_not_exist_is_named(arguments: list[str]) -> None:
    assert "error: run nowhere does not exist: make one with mexit train" in refused(*arguments, code=2)


def test_a_pointer_to_something_that_is_gone_is_named() -> None:
    Path("bundles").mkdir()
    for content in (b"bundles/gone\n", b"\0\xff\xfe", b""):
        Path("bundles/latest").write_bytes(content)
        said = refused("inspect", code=2)
        assert "error: bundles/latest names" in said or "does not exist" in said
    os.remove("bundles/latest")
    os.mkdir("bundles/latest")
    assert "pointer bundles/latest is not a file" in refused("inspect", code=5)


@pytest.mark.parametrize("command", ["inspect", "run", "calibrate", "bench", "serve"])
def test_one_wrong_segment_byte_stops_every_command(command: str, bundle_copy: Path, picture: Path) -> None:
    flip(bundle_copy / "segments/fp32/2.onnx")
    arguments = [command, bundle_copy, *([picture] if command == "run" else [])]
    assert "segments/fp32/2.onnx was changed: its sha256 is not the recorded one" in refused(*arguments, code=5)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest cut short": (lambda path: (path / "bundle.json").write_bytes(b'{"format":'), "is not valid JSON"),
    "manifest without a field": (lambda path: without(path / "bundle.json", "exits"), "bundle.json: missing exits"),
    "manifest too new": (lambda path: with_value(path / "bundle.json", "version", 2), "is newer than this mexit reads"),
    "segment gone": (lambda path: (path / "segments/fp32/1.onnx").unlink(), "1.onnx does not exist, though bundle.json"),
    "splits gone": (lambda path: (path / "splits.npz").unlink(), "splits.npz does not exist, though bundle.json"),
    "trace changed": (lambda path: flip(next((path / "traces").iterdir())), "was changed after calibration"),
    "trace gone": (lambda path: shutil.rmtree(path / "traces"), "does not exist"),
    "policies cut short": (lambda path: (path / "policies.json").write_bytes(b"{"), "policies.json is not valid JSON"),
    "policies changed": (lambda path: with_value(path / "policies.json", "entries", []), "the checksum does not fit"),
    "policies of another": (lambda path: with_value(path / "policies.json", "model", "f" * 64), "belongs to model ffff"),
    "policies too new": (lambda path: with_value(path / "policies.json", "version", 2), "is newer than this mexit"),
}  # fmt: skip


def without(path: Path, field: str) -> None:
    value = json.loads(path.read_bytes())
    del value[field]
    path.write_text(json.dumps(value))


def with_value(path: Path, field: str, new: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), field: new}))


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_inspect_finds_the_damage_and_names_it(
    damage: Callable[[Path], object], words: str, bundle_copy: Path
) -> None:
    damage(bundle_copy)
    said = refused("inspect", bundle_copy, code=2 if words == "does not exist" else 5)
    assert said.startswith("error: ")
    assert words in said


@pytest.mark.parametrize("damage", ["policies cut short", "policies changed", "policies of another"])
def test_calibrating_anew_repairs_damaged_policies(damage: str, bundle_copy: Path, picture: Path) -> None:
    DAMAGE[damage][0](bundle_copy)
    assert "run mexit calibrate" in refused("run", bundle_copy, picture, code=5) or damage == "policies cut short"
    assert typed("calibrate", bundle_copy, "--attack", "none").exit_code == 0
    assert typed("inspect", bundle_copy).exit_code == 0
    assert typed("run", bundle_copy, picture).exit_code == 0


def test_without_policies_only_the_full_network_answers(bundle_copy: Path, picture: Path) -> None:
    (bundle_copy / "policies.json").unlink()
    assert f"has no policies.json: run mexit calibrate {bundle_copy}" in refused("run", bundle_copy, picture, code=3)
    assert typed("run", bundle_copy, picture, "--budget", "full").exit_code == 0
    assert typed("inspect", bundle_copy).exit_code == 0


def test_an_infeasible_budget_names_one_that_works_as_typed(digits_bundle: Path, picture: Path) -> None:
    said = refused("run", digits_bundle, picture, "--budget", "1%", code=3)
    assert "but exit 1 alone costs" in said
    nearest = said.rpartition(" ")[2]
    assert typed("run", digits_bundle, picture, "--budget", nearest).exit_code == 0
    assert "nearest feasible budget" in refused("calibrate", digits_bundle, "--budget", "tiny=10", code=3)


@pytest.mark.parametrize(
    ("budget", "code", "words"),
    [("cheap", 2, "'cheap' is not a budget: write low, medium, high, full"), ("0", 2, "must be above zero"),
     ("150%", 2, "at most 100%"), ("5ms", 2, "has no times of this device yet; give MACs between")],
)  # fmt: skip
def test_what_is_no_budget_says_how_to_write_one(
    budget: str, code: int, words: str, digits_bundle: Path, picture: Path
) -> None:
    assert words in refused("run", digits_bundle, picture, "--budget", budget, code=code)


def test_a_budget_of_ones_own_can_be_used_by_its_name(bundle_copy: Path, picture: Path) -> None:
    done = typed("calibrate", bundle_copy, "--attack", "none", "--budget", "night=33%", "--json")
    assert done.exit_code == 0
    answer = json.loads(typed("run", bundle_copy, picture, "--budget", "night", "--json").stdout)
    assert "night" in json.dumps(answer)
    for taken in ("low=33%", "full=33%"):
        assert "choose another name" in refused("calibrate", bundle_copy, "--budget", taken, code=2)


WRONG_OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "backend": (["run", "{bundle}", "{picture}", "--backend", "cuda"], 2, "unknown backend 'cuda': choose from auto"),
    "threads": (["run", "{bundle}", "{picture}", "--threads", "0"], 2, "threads must be at least 1, found 0"),
    "deadline": (["run", "{bundle}", "{picture}", "--deadline", "0"], 2, "must be above zero, found 0"),
    "deadline nan": (["run", "{bundle}", "{picture}", "--deadline", "nan"], 2, "must be above zero, found nan"),
    "no image": (["run", "{bundle}"], 2, "no image named: mexit run [BUNDLE] IMAGE..."),
    "budget pair": (["calibrate", "{bundle}", "--budget", "night"], 2, "--budget takes NAME=VALUE, found 'night'"),
    "measure": (["calibrate", "{bundle}", "--measure", "x", "--attack", "none"], 2, "unknown confidence measure 'x'"),
    "attack": (["calibrate", "{bundle}", "--attack", "x"], 2, "unknown attack 'x'"),
    "other data": (["calibrate", "{bundle}", "--data", "folder:/nowhere"], 2, "image folder /nowhere does not exist"),
    "repeats": (["bench", "{bundle}", "--repeats", "1"], 2, "at least 20 repeats"),
    "batch": (["bench", "{bundle}", "--batch", "0"], 2, "batches of 1"),
    "samples": (["evaluate", "{bundle}", "--samples", "-1"], 2, "--samples must be at least 1, found -1"),
    "eps": (["evaluate", "{bundle}", "--eps", "8"], 2, "write 8/255, not 8"),
    "eps word": (["evaluate", "{bundle}", "--eps", "8/0"], 2, "'8/0' is no fraction: write 0.3 or 8/255"),
    "steps": (["evaluate", "{bundle}", "--steps", "-3"], 2, "at least one step"),
    "a bundle again": (["export", "{bundle}"], 2, "is a bundle already"),
    "bundle name": (["export", "{run}", "--out", "bundles/ä b"], 2, "cannot be a bundle's name, which is part of URLs"),
    "bundle exists": (["export", "{run}", "--out", "{bundle}"], 2, "exists already: choose another name with --out"),
    "model": (["train", "--model", "x"], 2, "unknown model 'x': choose from digits-cnn"),
    "method": (["train", "--method", "x"], 2, "unknown method 'x': choose from clean"),
    "option": (["train", "--set", "x=1"], 2, "has no option x; it has: "),
    "preset": (["train", "--preset", "x"], 2, "no preset 'x' for digits: choose from demo"),
    "data": (["train", "--data", "x"], 2, "unknown data set 'x': choose from digits"),
    "data dir": (["train", "--data", "mnist", "--data-dir", "/nowhere"], 2, "no mnist in /nowhere/mnist"),
    "epochs": (["train", "--epochs", "0"], 2, "epochs and batch must be at least 1, found 0"),
    "lr": (["train", "--lr", "nan"], 2, "lr must be above 0"),
    "train eps": (["train", "--eps", "nan"], 2, "0 < eps <= 1"),
    "seed": (["train", "--seed", "-1"], 2, "seed must be at least 0, found -1"),
    "train threads": (["train", "--threads", "-1"], 2, "threads must be at least 1, found -1"),
    "device": (["train", "--device", "tpu"], 2, "unknown device 'tpu': choose auto, cpu or cuda"),
    "keep": (["train", "--keep", "worst"], 2, "keep must be one of last, best"),
    "run exists": (["train", "--out", "{run}"], 2, "exists already: continue it with --resume --out"),
    "no number": (["train", "--epochs", "many"], 2, "Invalid value for '--epochs'"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_an_option_that_cannot_be_says_what_can(
    arguments: list[str], code: int, words: str, workspace: Path, digits_bundle: Path, picture: Path
) -> None:
    places = {"{bundle}": digits_bundle, "{picture}": picture, "{run}": workspace / "runs/digits"}
    said = refused(*[places.get(argument, argument) for argument in arguments], code=code)
    assert words in said
    assert not list(Path().glob("runs/*/weights*"))


def test_export_never_replaces_what_is_no_bundle(workspace: Path) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter1.txt").write_text("years of work")
    said = refused("export", workspace / "runs/digits", "--out", "thesis", "--replace", code=2)
    assert "thesis is no bundle, so it is not replaced" in said
    assert Path("thesis/chapter1.txt").read_text() == "years of work"


RUN_DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "weights changed": (lambda run: (run / "weights.safetensors").write_bytes(b"\xff" * 99), 5, "is not readable"),
    "weights empty": (lambda run: (run / "weights.safetensors").write_bytes(b""), 5, "is not readable"),
    "weights gone": (lambda run: (run / "weights.safetensors").unlink(), 2, "is not finished: mexit train --resume"),
    "settings gone": (lambda run: (run / "settings.json").unlink(), 2, "settings.json does not exist"),
    "settings no json": (lambda run: (run / "settings.json").write_bytes(b"{"), 5, "is not valid JSON"),
    "settings without lr": (lambda run: without(run / "settings.json", "lr"), 5, "settings.json: missing lr"),
    "settings lr a text": (lambda run: with_value(run / "settings.json", "lr", "fast"), 5, "lr: expected float"),
    "settings lr negative": (lambda run: with_value(run / "settings.json", "lr", -1), 5, "lr must be above 0"),
    "settings of another model": (lambda run: with_value(run / "settings.json", "model", "small-cnn"), 5, "another net"),
    "settings of no model": (lambda run: with_value(run / "settings.json", "model", "x"), 2, "unknown model 'x'"),
    "splits cut short": (lambda run: (run / "splits.npz").write_bytes(b"PK"), 5, "splits.npz are not readable"),
    "splits gone": (lambda run: (run / "splits.npz").unlink(), 2, "splits.npz does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["export", "evaluate"])
@pytest.mark.parametrize(("damage", "code", "words"), RUN_DAMAGE.values(), ids=RUN_DAMAGE.keys())
def test_a_damaged_run_is_named(
    command: str, damage: Callable[[Path], object], code: int, words: str, run_copy: Path
) -> None:
    damage(run_copy)
    assert words in refused(command, run_copy, code=code)


def test_bad_images_do_not_keep_good_ones_from_being_answered(digits_bundle: Path, picture: Path) -> None:
    Path("bad.png").write_bytes(b"no image")
    Path("cut.png").write_bytes(picture.read_bytes()[:40])
    Path("folder.png").mkdir()
    result = typed("run", digits_bundle, "bad.png", picture, "gone.png", "cut.png", "folder.png", "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert "8 bytes that are no image (PNG, JPEG" in json.dumps(shown)
    assert "gone.png does not exist" in json.dumps(shown)
    plain = typed("run", digits_bundle, "gone.png", picture)
    assert plain.exit_code == 2
    assert "gone.png does not exist" in plain.output
    assert "x.png" in plain.output


def test_a_huge_image_is_refused_and_a_tiny_one_is_not(digits_bundle: Path) -> None:
    with Path("large.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert refused_answer(digits_bundle, "large.png", code=1) == "image large.png has 67108865 bytes; at most 67108864"
    buffer = io.BytesIO()
    Image.new("1", (30_000, 3_000)).save(buffer, "PNG")
    Path("wide.png").write_bytes(buffer.getvalue())
    assert "30000 x 3000 pixels; at most 64000000" in refused_answer(digits_bundle, "wide.png", code=1)
    Image.new("L", (1, 1)).save("tiny.png")
    assert typed("run", digits_bundle, "tiny.png").exit_code == 0


def refused_answer(bundle: Path, image: str, code: int) -> str:
    result = typed("run", bundle, image)
    assert result.exit_code == code
    said = " ".join(result.output.split())
    return said[said.find("image ") :].removesuffix(" are expected") if "large" in image else said


def test_a_name_that_is_no_text_is_shown_somehow(digits_bundle: Path, picture: Path) -> None:
    odd = os.fsdecode(b"odd-\xff.png")
    shutil.copy(picture, odd)
    for flags in ([], ["--json"]):
        assert program("run", digits_bundle, odd, *flags).returncode == 0
    assert program("run", digits_bundle, os.fsdecode(b"gone-\xff.png")).returncode == 2


def test_standard_output_that_nobody_reads_is_no_error(digits_bundle: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    import subprocess

    from command_line import MEXIT, quiet

    done = subprocess.run([*MEXIT, "inspect", str(digits_bundle)], stdout=writing, stderr=subprocess.PIPE, env=quiet())
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr

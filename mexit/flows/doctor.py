"""`mexit doctor`: find faults of the installation, this machine and the newest bundle, with a fix for each.

Each check is a function that yields findings.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.environment import SECRETS, VARIABLES, unknown_variables
from mexit.core.policies_file import PARITY
from mexit.core.printable import shell_path
from mexit.core.progress import Progress, Silent
from mexit.core.resource_limits import ResourceLimits, read_limits
from mexit.core.versions import installed_version
from mexit.errors import MexitError, NotCalibrated, NotFound
from mexit.flows.doctor_probes import run_probe
from mexit.runtime import autotune
from mexit.runtime.backends.registry import ENGINES
from mexit.runtime.device_cache import cache_root

OK, WARNING, PROBLEM = "ok", "warning", "problem"
REINSTALL_ORT = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]' or 'mexit[gpu]'"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warning" (works, but slower or less safely than it could) or "problem" (does not work).
        found: the state, in words.
        fix: a command or setting that corrects it; for "ok", one that improves it. May be empty.
    """

    name: str
    status: str
    found: str
    fix: str = ""


Check = Callable[[], Iterable[Finding]]
Probe = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class DoctorResult:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    def count(self, status: str) -> int:
        """Return the number of findings with a status."""
        return sum(finding.status == status for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the object of `mexit doctor --json`."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "warnings": self.count(WARNING),
            "problems": self.count(PROBLEM),
        }


def diagnose(
    bundle: Path | None = None,
    *,
    checks: Mapping[str, Check] | None = None,
    progress: Progress | None = None,
) -> DoctorResult:
    """Run every check. Changes nothing; a check that fails becomes a finding.

    Args:
        bundle: a bundle directory; default the newest bundle, if there is one.
        checks: checks by name; default all.
        progress: receives the progress.
    """
    opened, findings = _open(bundle)
    checks = default_checks(opened) if checks is None else checks
    with (progress or Silent()).track("checking", len(checks)) as advance:
        for name, check in checks.items():
            findings += run_check(name, check)
            advance(1, name)
    return DoctorResult(tuple(findings))


def default_checks(bundle: Bundle | None) -> dict[str, Check]:
    """Return all checks by name."""
    checks: dict[str, Check] = {
        "onnxruntime wheels": check_wheels,
        "versions": check_versions,
        "torch": check_torch,
        "networks": check_networks,
        "onnxruntime providers": check_providers,
        "engines": check_engines,
        "processors": partial(check_threads, bundle),
        "variables": check_variables,
        "cache folder": check_cache,
    }
    return {**checks, "bundle": partial(check_bundle, bundle)} if bundle else checks


def run_check(name: str, check: Check) -> list[Finding]:
    """Return the findings of a check; an exception becomes a last finding, so that the other checks run."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:  # a broken installation may raise anything
        reason = f"the check failed: {type(error).__name__}: {error}"
        findings.append(Finding(name, WARNING, reason, "check it by hand, and report the failure to mexit"))
    return findings


def _open(path: Path | None) -> tuple[Bundle | None, list[Finding]]:
    try:
        return Bundle.open(path or newest(BUNDLES, Silent())), []
    except NotFound as error:
        finding = Finding("bundle", PROBLEM, str(error)) if path else Finding("bundle", OK, str(error), "mexit demo")
        return None, [finding]
    except MexitError as error:
        fix = "export it again, or name another bundle: mexit doctor BUNDLE"
        return None, [Finding("bundle", PROBLEM, str(error), fix)]


def check_wheels() -> Iterator[Finding]:
    """The wheels onnxruntime and onnxruntime-gpu install into one folder and break each other."""
    name = "onnxruntime wheels"
    wheels = [f"{wheel} {version}" for wheel in ("onnxruntime", "onnxruntime-gpu")
              if (version := installed_version(wheel))]  # fmt: skip
    if len(wheels) == 2:
        found = f"{' and '.join(wheels)} are both installed; they share one folder and break each other"
        yield Finding(name, PROBLEM, found, REINSTALL_ORT)
    elif wheels:
        yield Finding(name, OK, wheels[0])
    else:
        yield Finding(name, OK, "not installed", "pip install 'mexit[cpu]'")


def check_versions() -> Iterator[Finding]:
    """Installed packages must have the versions that mexit declares."""
    name = "versions"
    try:
        requirements = [Requirement(text) for text in metadata.requires("mexit") or []]
    except metadata.PackageNotFoundError:
        yield Finding(name, OK, "mexit is not installed as a package, so its requirements are unknown")
        return
    outside = {}
    for requirement in requirements:
        version = installed_version(requirement.name)
        if version and not requirement.specifier.contains(version, prereleases=True):
            found = f"{requirement.name} {version} is installed, mexit requires {requirement.specifier}"
            outside[requirement.name] = (found, f"pip install '{requirement.name}{requirement.specifier}'")
    for found, fix in outside.values():
        yield Finding(name, WARNING, found, fix)
    if not outside:
        version = installed_version("mexit")
        yield Finding(name, OK, f"mexit {version}: every installed package has a required version")


def check_torch(probe: Probe = run_probe) -> Iterator[Finding]:
    """torch must import, and a build for CUDA needs a working driver of at least its version."""
    version = installed_version("torch")
    if version is None:
        fix = "to train and export: pip install 'mexit[train]'"
        yield Finding("torch", OK, "not installed; running a bundle does not need it", fix)
        return
    answer = probe("torch")
    if "failed" in answer:
        fix = "pip install --force-reinstall torch"
        yield Finding("torch", PROBLEM, f"torch {version} does not import: {answer['failed']}", fix)
    elif answer["cuda"] and not answer["available"]:
        found = f"torch {version} is built for CUDA {answer['cuda']}, but finds no GPU with a driver for it"
        fix = "install a driver for this version of CUDA; without a GPU, install the CPU build of torch"
        yield Finding("torch", WARNING, found, fix)
    else:
        build = f"CUDA {answer['cuda']}" if answer["cuda"] else "the processor"
        yield Finding("torch", OK, f"torch {version} for {build}")


def check_networks() -> Iterator[Finding]:
    """Packages of networks for `mexit train --model`; none of them is required."""
    for extra, package in (("efficientnet-lite", "efficientnet-lite-pytorch"), ("timm", "timm")):
        version = installed_version(package)
        found = f"{package} {version}" if version else "not installed; only --model needs it"
        yield Finding(f"networks of {extra}", OK, found, "" if version else f"pip install 'mexit[{extra}]'")


def check_providers(probe: Probe = run_probe) -> Iterator[Finding]:
    """onnxruntime lists the providers it was compiled with; a session silently falls back to those that load."""
    name = "onnxruntime providers"
    if not (installed_version("onnxruntime") or installed_version("onnxruntime-gpu")):
        return
    answer = probe("providers")
    if "failed" in answer:
        yield Finding(name, PROBLEM, f"onnxruntime is installed but does not work: {answer['failed']}", REINSTALL_ORT)
        return
    missing = ", ".join(provider for provider in answer["listed"] if provider not in answer["loaded"])
    loaded = ", ".join(answer["loaded"]) or "none"
    if missing:
        found = f"onnxruntime lists {missing}, but a session silently runs on {loaded} instead"
        fix = (
            "install the driver, CUDA and cuDNN that it was built for; "
            "without a GPU: pip uninstall -y onnxruntime-gpu, then pip install 'mexit[cpu]'"
        )
        yield Finding(name, WARNING, found, fix)
    else:
        yield Finding(name, OK, f"{loaded}, loaded by a session")


def check_engines(probe: Probe = run_probe) -> Iterator[Finding]:
    """Every engine of float32 segments must open and give the right answer, and one must be installed.

    Engines of other precisions use the same libraries; `mexit bench --tune` opens them with a bundle that has them.
    """
    names = [name for name, engine in ENGINES.items() if engine.variant == PARITY]
    findings = [check_engine(name, probe("engine", name)) for name in names]
    yield from findings
    if not any(finding.found == _WORKS for finding in findings):
        yield Finding("engines", PROBLEM, "no engine works, so no bundle can run here", "pip install 'mexit[cpu]'")


_WORKS = "opens and gives the right answer"


def check_engine(name: str, answer: Mapping[str, Any]) -> Finding:
    """Return the finding for the answer of one engine's probe."""
    label = f"engine {name}"
    if "missing" in answer:
        return Finding(label, OK, f"not installed. {answer['missing']}")
    if "failed" in answer:
        status = PROBLEM if name == autotune.DEFAULT else WARNING
        found = f"installed, but does not open: {answer['failed']}"
        explained = status == WARNING and answer.get("explained")  # such as: this machine has no GPU
        fix = "nothing, unless --backend is to name this engine" if explained else "reinstall its package"
        return Finding(label, status, found, fix)
    if not answer["right"]:
        return Finding(label, PROBLEM, "opens, but gives a wrong answer", "install another version of it")
    return Finding(label, OK, _WORKS)


def check_threads(
    bundle: Bundle | None, limits: ResourceLimits | None = None, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """More threads than granted processors wait for each other."""
    limits = limits or read_limits()
    granted = f"{limits.processors} by affinity"
    if limits.quota is not None:
        granted += f", the time of {limits.quota:g} by control group"
    requests = {}
    for name in ("MEXIT_THREADS", "OMP_NUM_THREADS"):
        if text := environment.get(name):
            requests[f"{name}={text}"] = text.partition(",")[0]  # OpenMP takes one number per nesting level
    if bundle is not None and not environment.get("MEXIT_THREADS"):
        requests[f"auto for {bundle.path}"] = str(autotune.choose(bundle).threads)
    for source, text in requests.items():
        if not text.isdecimal() or int(text) < 1:
            yield Finding("threads", WARNING, f"{source} is not a number of threads", f"unset {source.split('=')[0]}")
        elif int(text) > limits.threads:
            found = f"{source} asks for {text} threads, which wait for each other; processors: {granted}"
            fix = f"at most {limits.threads} threads, or a larger --cpus of the container"
            yield Finding("threads", WARNING, found, fix)
    yield Finding("processors", OK, granted)


def check_variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """A `MEXIT_*` variable that mexit does not read is probably misspelt."""
    name = "variables"
    for variable, near in unknown_variables(environment).items():
        fix = f"did you mean {near}? unset {variable}" if near else f"unset {variable}"
        yield Finding(name, WARNING, f"{variable} is set, but mexit does not read it", fix)
    known = [variable if variable in SECRETS else f"{variable}={environment[variable]}"
             for variable in VARIABLES if variable in environment]  # fmt: skip
    yield Finding(name, OK, ", ".join(known) or "no MEXIT_* variable is set")


def check_cache(root: Path | None = None) -> Iterator[Finding]:
    """The cache holds measurements and engines of this device; it must be writable, by its owner alone."""
    name = "cache folder"
    try:
        root = root or cache_root()
    except MexitError as error:
        yield Finding(name, WARNING, str(error), "export MEXIT_CACHE=FOLDER")
        return
    if not _writable(root):
        found = f"{root} is not writable: the device is measured at every start, and no engine can be built"
        yield Finding(name, PROBLEM, found, "export MEXIT_CACHE=FOLDER, a writable folder")
        return
    exposed = [path for path in root.glob("*/*") if path.is_dir() and _mode(path) & 0o077]
    if root.is_dir() and _mode(root) & 0o022:
        exposed.append(root)
    for path in exposed:
        found = f"{path} is open to other users (mode {_mode(path):04o})"
        yield Finding(name, WARNING, found, f"chmod 700 {shell_path(path)}")
    if not exposed:
        yield Finding(name, OK, f"{root}, {'writable by its owner only' if root.is_dir() else 'not created yet'}")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _writable(root: Path) -> bool:
    """Return whether files can be created in a folder, or in the nearest folder above it that exists."""
    while not root.exists() and root != root.parent:
        root = root.parent
    try:
        with tempfile.TemporaryFile(dir=root):
            return True
    except OSError:
        return False


def check_bundle(bundle: Bundle) -> Iterator[Finding]:
    """A bundle needs policies for budgets, and a measurement of this device for `--backend auto`."""
    name = f"bundle {bundle.path}"
    try:
        entries = bundle.policies().entries
    except NotCalibrated:
        found = "not calibrated: only the budget full works"
        yield Finding(name, WARNING, found, f"mexit calibrate {shell_path(bundle.path)}")
    except MexitError as error:
        yield Finding(name, PROBLEM, str(error), f"mexit calibrate {shell_path(bundle.path)}")
    else:
        engines = ", ".join(f"{entry.engine} {entry.precision}" for entry in entries)
        yield Finding(name, OK, f"every file matches its checksum; calibrated for {engines}")
    choice = autotune.choose(bundle)
    found = f"{choice.backend} with {choice.threads} thread(s), {choice.reason}"
    yield Finding("auto", OK, found, "" if choice.measured else f"mexit bench {shell_path(bundle.path)} --tune")

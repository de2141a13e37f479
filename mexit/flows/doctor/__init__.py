"""`mexit doctor`: what is wrong with this installation and machine, and what to type.

Every check is a small function that yields findings. Native libraries are tried in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.progress import Progress, Silent
from mexit.errors import MexitError, NotFound
from mexit.flows.doctor import device, engines, packages, setup
from mexit.flows.doctor.finding import Finding, ok, problem, warning

Check = Callable[[], Iterable[Finding]]


@dataclass(frozen=True)
class DoctorResult:
    """Every finding, in the order of the checks."""

    findings: tuple[Finding, ...]

    def count(self, status: str) -> int:
        """How many findings have this status."""
        return sum(found.status == status for found in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "findings": [asdict(found) for found in self.findings],
            "warnings": self.count("warning"),
            "problems": self.count("problem"),
        }


def doctor(bundle: Path | None = None, *, progress: Progress | None = None) -> DoctorResult:
    """Run every check. Nothing is changed, and nothing is raised: what fails is a finding.

    Args:
        bundle: a directory; default the newest bundle, if there is one.
        progress: who listens.
    """
    progress = progress or Silent()
    opened, findings = _open(bundle)
    checks = _checks(opened)
    with progress.track("looking", len(checks)) as advance:
        for name, check in checks.items():
            findings += run(name, check)
            advance(1, name)
    return DoctorResult(tuple(findings))


def run(name: str, check: Check) -> list[Finding]:
    """The findings of a check. One that fails itself is a finding too: the others are still wanted."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # this machine may be broken in ways that no check foresees
        said = f"this could not be looked at: {type(error).__name__}: {error}"
        found.append(warning(name, said, "look at it by hand, and tell the authors of mexit"))
    return found


def _checks(bundle: Bundle | None) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "onnxruntime wheels": packages.wheels,
        "versions": packages.ranges,
        "torch": packages.torch,
        "CUDA": packages.cuda,
        "onnxruntime providers": engines.providers,
        "engines": engines.engines,
        "OpenVINO precision": engines.openvino,
        "processor": device.instructions,
        "processors": partial(device.threads, bundle),
        "memory": partial(device.memory, bundle),
        "load": device.load,
        "waiting threads": device.waiting,
        "variables": setup.variables,
        "cache folder": setup.cache,
    }
    return {**checks, "bundle": partial(setup.state, bundle)} if bundle else checks


def _open(path: Path | None) -> tuple[Bundle | None, list[Finding]]:
    """The bundle to look at, or why there is none."""
    try:
        return Bundle.open(path or newest(BUNDLES, Silent())), []
    except NotFound as error:
        return None, [(problem if path else ok)("bundle", str(error), "mexit demo" if not path else "")]
    except MexitError as error:
        return None, [problem("bundle", str(error), "export it again, or name another: mexit doctor BUNDLE")]

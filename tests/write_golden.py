"""Write `golden/bundle-2`: a bundle of format version 2, and the answers that the present code gives with it.

    python tests/write_golden.py

It is for a change of the format before a release. The folder of a released version is never written again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mexit import Bundle, ExportOptions, Runtime, TrainOptions, export_bundle, train_model
from mexit.calibrate.certificates import CertificateRequest
from mexit.core.atomic_io import to_json
from mexit.core.policies_file import PolicyEntry
from mexit.core.versions import installed_versions
from mexit.data import digits, splits
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.latency_profile import Profile

FOLDER = Path(__file__).parent / "golden" / "bundle-2"
IMAGES = 100
BUDGETS = ("low", "medium", "high", "full", "40%", "1M", "full, at most exit 1", "full, at most exit 2")
CERTIFICATE = CertificateRequest(0.05)
CALIBRATION = ("--attack", "none", "--ensemble", "--measure", "margin", "--max-risk", str(CERTIFICATE.max_risk))
TIMES_US = (300.0, 1150.0, 1000.0)  # exit 1, the last exit and the static network
NAMED_BY_CERTIFICATE = ("loss", "method", "max_risk", "confidence", "first", "last")


def write_bundle(folder: Path) -> None:
    """Train for seconds, and export the exits 1 and 3 with a calibrated ensemble."""
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        train_model(settings={"method": "clean", "epochs": 8}, out=Path("runs/demo"), options=TrainOptions(threads=1))
        export_bundle(Path("runs/demo"), options=ExportOptions(exits="1", calibrate=False))
        options = CalibrateOptions(attack="none", ensemble=True, measure="margin", max_risk=CERTIFICATE.max_risk)
        calibrate_bundle(Path("bundles/demo"), options=options)
        shutil.copytree("bundles/demo", folder, ignore=shutil.ignore_patterns("reports", "static.onnx"))
    os.chdir(folder.parent.parent)


def answers_of(bundle: Path) -> dict[str, Any]:
    """The answers to the first test images, one at a time, at every budget."""
    data = digits.load()
    images = data.images.at(splits.split(data).part("test")[:IMAGES])
    answers = {}
    for budget in BUDGETS:
        name, _, last = budget.partition(", at most exit ")
        runtime = Runtime.open(bundle, budget=name)
        found = [runtime(image, max_exit=int(last) if last else None)[0] for image in images]
        answers[budget] = {
            "exits": [one.exit for one in found],
            "indices": [one.index for one in found],
            "macs": [one.macs for one in found],
            "confidences": [round(one.confidence, 6) for one in found],
            "reasons": sorted({one.reason for one in found}),
        }
    return answers


def calibration_of(entry: PolicyEntry) -> dict[str, Any]:
    """What a calibration selected, in MACs or in time."""
    return {
        "measure": entry.measure,
        "ensemble": entry.ensemble,
        "temperatures": entry.temperatures,
        "named": dict(entry.named),
        "thresholds": [point.thresholds for point in entry.frontier],
        "mean_macs": [point.calibration.mean_macs for point in entry.frontier],
        "certificates": [{name: one[name] for name in NAMED_BY_CERTIFICATE} for one in entry.certificates],
    }


def profile_of(bundle: Bundle, times_us: Mapping[str, Any]) -> dict[str, Any]:
    """A latency profile of ONNX Runtime on this machine with given times, as JSON values."""
    profile = Profile(**times_us, model=bundle.id, engine="ort", precision="fp32", threads=1,
                      versions=installed_versions(PACKAGES))  # fmt: skip
    return asdict(profile)


def main() -> None:
    """Write the folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    path = FOLDER / "bundles" / "demo"
    write_bundle(path)
    bundle = Bundle.open(path)
    times_us = {"exits_us": TIMES_US[:-1], "static_us": TIMES_US[-1]}
    with tempfile.TemporaryDirectory() as work:
        profile = Path(work) / "profile.json"
        profile.write_bytes(to_json(profile_of(bundle, times_us)))
        timed = Runtime.open(path, cost="time", profile=profile).timing
    assert timed is not None
    (entry,) = bundle.policies().entries
    content = {
        "answers": answers_of(path),
        "calibration": {"options": CALIBRATION, **calibration_of(entry)},
        "time": {"times_us": times_us, **calibration_of(timed.entry)},
    }
    (FOLDER / "answers.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

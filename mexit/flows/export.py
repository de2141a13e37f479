"""Export a trained run as a bundle, check every exit against torch, and calibrate it."""

from __future__ import annotations

import copy
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import BUNDLES, RUNS, is_bundle, newest, remember
from mexit.core.atomic_io import sha256_file
from mexit.core.bundle import Bundle
from mexit.core.manifest import NAME_PATTERN
from mexit.core.policies_file import PARITY
from mexit.core.progress import Progress, Silent
from mexit.core.versions import VERSION, installed_versions
from mexit.data import registry
from mexit.errors import MexitError, UsageError, requires_extra
from mexit.flows.calibrate import CalibrateOptions, CalibrateResult, calibrate_bundle, default_attack, network_attack
from mexit.flows.sample_sources import Attack, DatasetSource, gather
from mexit.runtime import autotune
from mexit.runtime.backends.ort import OrtBackend, open_session
from mexit.runtime.reference import run_all_exits

with requires_extra("train", "Exporting a network"):
    from mexit.evaluate.target import GradientSource
    from mexit.export.bundle_writer import BundleContents, build_bundle
    from mexit.export.nested_if import OUTPUTS, build_single_file
    from mexit.export.onnx_export import OnnxSegment, export_segment
    from mexit.export.segments import TorchSegment, cut_segments
    from mexit.export.validate import PrecisionReport, check_against_torch, check_single_file
    from mexit.flows.precision_variants import PRECISIONS, convert_segments
    from mexit.models import MultiExit
    from mexit.models.device import resolve_device
    from mexit.train import checkpoint
    from mexit.train.config import TrainSettings

RECORDED_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
CHECK_IMAGES = 64
TUNING_S = 0.5


@dataclass(frozen=True)
class ExportOptions:
    """What an export makes beside the float32 segments.

    Attributes:
        precision: "fp32", or "int8" or "fp16" for a second set of segments. Export calibrates fp32; the thresholds
            of int8 need a calibration of their own.
        single_file: also write all float32 segments as one ONNX graph.
        calibrate: set thresholds on the run's calibration split.
        calibration_images: put images, clean and attacked, into the bundle, for devices without the data set.
        device: device of the torch network that crafts attacked images: "auto", "cpu" or "cuda".
        attack: of the calibration and of the images in the bundle; see `CalibrateOptions.attack`.
    """

    precision: str = PARITY
    single_file: bool = False
    calibrate: bool = True
    calibration_images: bool = False
    device: str = "auto"
    attack: str | None = None

    def __post_init__(self) -> None:
        CalibrateOptions(attack=self.attack)  # checks the attack
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision '{self.precision}': choose from {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class ExportResult:
    """A written bundle.

    Attributes:
        bundle: its directory.
        model: its id.
        differences: largest |difference| of a logit from torch at each exit, (E,).
        calibration: None where `ExportOptions.calibrate` is false.
        precision_report: the second precision compared with fp32; None with fp32 alone.
    """

    bundle: Path
    model: str
    differences: tuple[float, ...]
    calibration: CalibrateResult | None
    precision_report: PrecisionReport | None = None


def export_bundle(
    run: Path | None = None,
    *,
    out: Path | None = None,
    data_dir: str | Path | None = None,
    replace: bool = False,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a run as a bundle.

    Args:
        run: directory of a finished run; default the newest.
        out: the bundle directory; default `bundles/` and the run's name.
        data_dir: folder of the data sets; default `MEXIT_DATA`.
        replace: overwrite an existing bundle.
        options: default `ExportOptions()`.
        progress: receives notes and progress.

    Raises:
        NotFound: the run or its data set does not exist.
        Damaged: a file of the run is not what was written.
        UsageError: the device does not exist, `out` exists and is not to be replaced, or its name cannot be a
            bundle's.
        BackendError: an exit differs from torch, an operator's MACs are unknown, or a value leaves the range of the
            precision.
        MissingExtra: torch, onnx, onnxscript or onnxruntime is not installed.
    """
    progress, options = progress or Silent(), options or ExportOptions()
    resolve_device(options.device)  # before any work
    run = run or newest(RUNS, progress)
    out = out or BUNDLES / run.name
    _check_target(out, replace)
    bundle, differences, report = _build(run, out, data_dir, options, progress)
    bundle.write(replace=replace)
    remember(BUNDLES, out)
    progress.note(f"wrote {out}: {len(differences)} segments, logits within {max(differences):.1e} of torch")
    calibration = None
    if options.calibrate:
        calibrate_options = CalibrateOptions(device=options.device, attack=options.attack)
        calibration = calibrate_bundle(out, options=calibrate_options, data_dir=data_dir, progress=progress)
    try:
        choice = autotune.tune(Bundle.open(out), TUNING_S, builds=False).choice
        progress.note(f"on this device {choice.backend} with {choice.threads} thread(s) serves {out}")
    except MexitError as error:  # the bundle is complete without timings
        progress.note(f"the engines of this device were not timed: {error}")
    return ExportResult(out, bundle.id, tuple(differences), calibration, report)


def _check_target(out: Path, replace: bool) -> None:
    if not NAME_PATTERN.fullmatch(out.name):
        raise UsageError(f"'{out.name}' cannot be a bundle's name, which is part of URLs: choose one with --out")
    if out.exists() and not replace:
        raise UsageError(f"{out} exists already: choose another name with --out, or add --replace")
    if out.exists() and not is_bundle(out):
        raise UsageError(f"{out} is not a bundle, so it is not replaced: choose another name with --out")


def _build(
    run: Path, out: Path, data_dir: str | Path | None, options: ExportOptions, progress: Progress
) -> tuple[Bundle, list[float], PrecisionReport | None]:
    """Build the bundle in memory and check it; return it, the differences from torch and the precision report."""
    model, settings, splits = checkpoint.load_model(run)
    data = registry.load(settings.data, data_dir)
    splits.check(data)
    spec = settings.model_spec().input
    torch_segments = cut_segments(model, spec.name)
    segments = _export_segments(torch_segments, progress)
    variants: dict[str, Sequence[OnnxSegment]] = {PARITY: segments}
    provenance = _provenance(run, settings)
    report = None
    if options.precision != PARITY:
        variants[options.precision], report = convert_segments(
            torch_segments, segments, options.precision, data, splits, spec, progress
        )
        provenance["parity"] = asdict(report)
    calibration = {}
    if options.calibration_images:
        source = DatasetSource(data, splits, spec, _attack(model, settings, options))
        calibration = {images.file: images.to_bytes() for images in gather(source, progress)}
    single_file = build_single_file([segment.model for segment in segments]) if options.single_file else None
    contents = BundleContents(data.classes, spec, splits, variants, provenance, calibration, single_file)
    bundle = build_bundle(out, contents)
    backend = OrtBackend(bundle)
    images = data.batch(splits.part("selection")[:CHECK_IMAGES], spec)
    differences = check_against_torch(model, lambda batch: run_all_exits(backend, batch), images)
    if single_file is not None:
        session = open_session(single_file, "the single file")
        logits = run_all_exits(backend, images)
        check_single_file(lambda feeds: session.run(list(OUTPUTS), feeds), spec.name, images, logits)
    return bundle, differences, report


def _attack(model: MultiExit, settings: TrainSettings, options: ExportOptions) -> Attack | None:
    """The attack for the images in the bundle, or None."""
    name = options.attack or default_attack(settings.to_json())
    if name == "none":
        return None
    return network_attack(GradientSource(copy.deepcopy(model), settings).to(options.device), name)


def _export_segments(torch_segments: Sequence[TorchSegment], progress: Progress) -> list[OnnxSegment]:
    segments = []
    with progress.track("exporting segments", len(torch_segments)) as advance:
        for segment in torch_segments:
            segments.append(export_segment(segment))
            advance(1, "")
    return segments


def _provenance(run: Path, settings: TrainSettings) -> dict[str, Any]:
    versions = {"mexit": VERSION, "python": platform.python_version(), **installed_versions(RECORDED_PACKAGES)}
    return {
        "run": str(run),
        "weights_sha256": sha256_file(run / checkpoint.WEIGHTS),
        "settings": dict(settings.to_json()),
        "seeds": {"training": settings.seed},
        "versions": versions,
        "commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of mexit's own source, if it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

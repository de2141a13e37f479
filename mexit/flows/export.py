"""Export a trained run as a bundle, check every exit against torch, and calibrate it."""

from __future__ import annotations

import copy
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

from mexit.calibrate.lost_settings import LostSettings, lost_settings
from mexit.core.artifact_paths import BUNDLES, RUNS, is_bundle, newest, remember
from mexit.core.atomic_io import new_directory, sha256_file
from mexit.core.bundle import Bundle
from mexit.core.manifest import NAME_PATTERN
from mexit.core.policies_file import PARITY, Policies
from mexit.core.printable import shell_path
from mexit.core.progress import Progress, Silent
from mexit.core.versions import VERSION, installed_versions
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.data.splits import Splits
from mexit.errors import MexitError, UsageError, requires_extra
from mexit.flows.calibrate import CalibrateOptions, CalibrateResult, calibrate_bundle
from mexit.flows.calibration_source import default_attack, network_attack
from mexit.flows.sample_sources import Attack, DatasetSource, gather
from mexit.runtime import autotune
from mexit.runtime.backends.ort import OrtBackend, open_session
from mexit.runtime.latency_profile import Profile
from mexit.runtime.profile_cache import load_profile
from mexit.runtime.reference import run_all_exits

with requires_extra("train", "Exporting a network"):
    from mexit.evaluate.target import GradientSource
    from mexit.export.bundle_writer import BundleContents, build_bundle
    from mexit.export.nested_if import OUTPUTS, build_single_file
    from mexit.export.onnx_export import OnnxSegment, export_segment
    from mexit.export.segments import TorchSegment, cut_segments
    from mexit.export.validate import PrecisionReport, check_against_torch, check_single_file
    from mexit.flows import keep_exits
    from mexit.flows.precision_variants import PRECISIONS, convert_segments
    from mexit.models import MultiExit, multi_exit
    from mexit.models.device import resolve_device
    from mexit.train import checkpoint, stopped_run
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
        exits: the exits to keep: "auto" for those that save time on this machine, "all", or numbers such as "1,3,7".
            The last one is always kept. "auto" keeps the exits of the bundle that is replaced, if it has the same
            weights and chose them.
        profile: with "auto", a file of times that were measured on another device, with a bundle of the same run and
            all exits; None measures on this machine.
    """

    precision: str = PARITY
    single_file: bool = False
    calibrate: bool = True
    calibration_images: bool = False
    device: str = "auto"
    attack: str | None = None
    exits: str = keep_exits.AUTO
    profile: Path | None = None

    def __post_init__(self) -> None:
        if self.profile is not None and self.exits != keep_exits.AUTO:
            raise UsageError(f"--profile chooses the exits, which --exits {self.exits} names: leave out one of them")
        CalibrateOptions(attack=self.attack)  # checks the attack
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision '{self.precision}': choose from {', '.join(PRECISIONS)}")
        keep_exits.check_option(self.exits)


@dataclass(frozen=True)
class ExportResult:
    """A written bundle.

    Attributes:
        bundle: its directory.
        model: its id.
        differences: largest |difference| of a logit from torch at each exit, (E,).
        calibration: None where `ExportOptions.calibrate` is false.
        precision_report: the second precision compared with fp32; None with fp32 alone.
        unfinished: `epochs` done, and `steps` of the next, of a run that is not finished; None for a finished one.
        exits: the exits that were kept and dropped, see `keep_exits.KeptExits.record`.
        lost: what the calibration of the replaced bundle had and the new one has not.
    """

    bundle: Path
    model: str
    differences: tuple[float, ...]
    calibration: CalibrateResult | None
    precision_report: PrecisionReport | None = None
    unfinished: Mapping[str, int] | None = None
    exits: Mapping[str, Any] = field(default_factory=dict)
    lost: tuple[LostSettings, ...] = ()


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
        run: directory of a run; default the newest. Of one that is not finished, the checkpoint is exported.
        out: the bundle directory; default `bundles/` and the run's name.
        data_dir: folder of the data sets; default `MEXIT_DATA`.
        replace: overwrite an existing bundle.
        options: default `ExportOptions()`.
        progress: receives notes and progress.

    Raises:
        NotFound: the run or its data set does not exist, or the run has neither result nor checkpoint.
        Damaged: a file of the run is not what was written.
        UsageError: the device does not exist, `out` exists and is not to be replaced, or its name cannot be a
            bundle's.
        BackendError: an exit differs from torch, an operator's MACs are unknown, or a value leaves the range of the
            precision.
        MissingExtra: torch, onnx, onnxscript or onnxruntime is not installed.
    """
    progress, options = progress or Silent(), options or ExportOptions()
    resolve_device(options.device)  # before any work
    profile = None if options.profile is None else load_profile(options.profile)
    run = run or newest(RUNS, progress)
    out = out or BUNDLES / run.name
    _check_target(out, replace)
    source = _load(run, data_dir, options, progress)
    bundle, differences, report = _build(source, out, options, profile, progress)
    before, calibration = _policies_at(out), None
    with new_directory(out, replace=replace) as folder:  # the bundle is complete, thresholds included, or absent
        bundle.write_files(folder)
        if options.calibrate:
            calibration = _calibrate(folder, out, data_dir, options, progress)
    remember(BUNDLES, out)
    lost = lost_settings(before, _policies_at(out), out)
    progress.note(f"wrote {out}: {len(differences)} segments, logits within {max(differences):.1e} of torch")
    try:
        choice = autotune.tune(Bundle.open(out), TUNING_S, builds=False).choice
        progress.note(f"on this device {choice.backend} with {choice.threads} thread(s) serves {out}")
    except MexitError as error:  # the bundle is complete without timings
        progress.note(f"the engines of this device were not timed: {error}")
    exits = bundle.manifest.provenance["exits"]
    return ExportResult(out, bundle.id, tuple(differences), calibration, report, source.unfinished, exits, lost)


def _policies_at(out: Path) -> Policies:
    """The policies of the bundle at `out`; none if there is no bundle, or it cannot be read."""
    try:
        return Bundle.open(out).policies_or_empty()
    except MexitError:
        return Policies("", ())


def _check_target(out: Path, replace: bool) -> None:
    if not NAME_PATTERN.fullmatch(out.name):
        raise UsageError(f"'{out.name}' cannot be a bundle's name, which is part of URLs: choose one with --out")
    if out.exists() and not replace:
        raise UsageError(f"{out} exists already: choose another name with --out, or add --replace")
    if out.exists() and not is_bundle(out):
        raise UsageError(f"{out} is not a bundle, so it is not replaced: choose another name with --out")


def _calibrate(
    folder: Path, out: Path, data_dir: str | Path | None, options: ExportOptions, progress: Progress
) -> CalibrateResult:
    """Calibrate the bundle in `folder`, which becomes `out`."""
    calibrate_options = CalibrateOptions(device=options.device, attack=options.attack)
    try:
        result = calibrate_bundle(folder, options=calibrate_options, data_dir=data_dir, progress=progress)
    except MexitError as error:
        raise type(error)(f"{error}; no bundle was written, --no-calibrate exports without thresholds") from None
    written = tuple(out / path.relative_to(folder) for path in result.written)
    return with_changes(result, bundle=out, written=written)


@dataclass(frozen=True)
class _Source:
    """The run to export; `weights` is the file in it, `unfinished` as in `ExportResult`."""

    run: Path
    weights: str
    model: MultiExit
    settings: TrainSettings
    data: DataSet
    splits: Splits
    unfinished: Mapping[str, int] | None


def _load(run: Path, data_dir: str | Path | None, options: ExportOptions, progress: Progress) -> _Source:
    """Load a run, from its checkpoint if it is not finished."""
    settings = checkpoint.load_settings(run)
    weights, unfinished = checkpoint.WEIGHTS, None
    if (run / weights).exists():
        model, settings, splits = checkpoint.load_model(run)
    else:
        splits = Splits.load(run / checkpoint.SPLITS)
    data = registry.load(settings.data, data_dir)
    splits.check(data)
    if not (run / weights).exists():
        weights, position = stopped_run.write_weights(run, settings, data, splits, options.device)
        model = checkpoint.load_model(run, weights)[0]
        if not checkpoint.is_finished(position, settings):
            unfinished = {"epochs": position.epoch, "steps": position.step}
            progress.note(
                f"{run} is not finished: its weights after {position.epoch} epochs and {position.step} steps are "
                f"exported; mexit train --resume --out {shell_path(run)} continues it"
            )
    return _Source(run, weights, model, settings, data, splits, unfinished)


def _build(
    source: _Source, out: Path, options: ExportOptions, profile: Profile | None, progress: Progress
) -> tuple[Bundle, list[float], PrecisionReport | None]:
    """Build the bundle in memory and check it; return it, the differences from torch and the precision report."""
    settings, data, splits = source.settings, source.data, source.splits
    spec = settings.model_spec().input
    cuts = cut_segments(source.model, spec.name)
    if profile is not None:
        keep_exits.check_profile(profile, len(cuts))
    segments = _export_segments(cuts, progress)
    kept = _keep_exits(source, segments, out, options.exits, profile, progress)
    model, segments = multi_exit.keep_exits(source.model, kept.numbers), kept.merge(segments)
    variants: dict[str, Sequence[OnnxSegment]] = {PARITY: segments}
    provenance = {**_provenance(source), "exits": kept.record}
    report = None
    if options.precision != PARITY:
        variants[options.precision], report = convert_segments(
            cut_segments(model), segments, options.precision, data, splits, spec, progress, kept.numbers
        )
        provenance["parity"] = asdict(report)
    calibration = {}
    if options.calibration_images:
        samples = DatasetSource(data, splits, spec, _attack(model, settings, options))
        calibration = {images.file: images.to_bytes() for images in gather(samples, progress)}
    single_file = None
    if options.single_file:
        single_file = build_single_file([segment.model for segment in segments], kept.numbers)
    contents = BundleContents(data.classes, spec, splits, variants, provenance, calibration, single_file, kept.numbers)
    bundle = build_bundle(out, contents)
    backend = OrtBackend(bundle)
    images = data.batch(splits.part("selection")[:CHECK_IMAGES], spec)
    differences = check_against_torch(model, lambda batch: run_all_exits(backend, batch), images)
    if single_file is not None:
        session = open_session(single_file, "the single file")
        logits = run_all_exits(backend, images)
        check_single_file(lambda feeds: session.run(list(OUTPUTS), feeds), spec.name, images, logits, kept.numbers)
    return bundle, differences, report


def _keep_exits(
    source: _Source,
    segments: Sequence[OnnxSegment],
    out: Path,
    option: str,
    profile: Profile | None,
    progress: Progress,
) -> keep_exits.KeptExits:
    if option == keep_exits.ALL:
        return keep_exits.keep_all(len(segments))
    if option != keep_exits.AUTO:
        kept = keep_exits.keep_named(option, len(segments))
    elif profile is None and (record := _recorded_exits(source, out)):
        kept = keep_exits.keep_as_recorded(record)
    else:
        spec = source.settings.model_spec().input
        kept = keep_exits.choose(segments, source.data, source.splits, spec, progress, profile)
    if kept.text:
        progress.note(kept.text)
    return kept


def _recorded_exits(source: _Source, out: Path) -> Mapping[str, Any] | None:
    """The choice of the bundle at `out`, if that has the same weights and chose its exits."""
    if not out.exists():
        return None
    try:
        provenance = Bundle.open(out).manifest.provenance
    except MexitError:  # a damaged bundle is replaced
        return None
    record: Mapping[str, Any] = provenance.get("exits", {})
    same = provenance.get("weights_sha256") == sha256_file(source.run / source.weights)
    return record if same and record.get("option") == keep_exits.AUTO else None


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


def _provenance(source: _Source) -> dict[str, Any]:
    versions = {"mexit": VERSION, "python": platform.python_version(), **installed_versions(RECORDED_PACKAGES)}
    return {
        "run": str(source.run),
        "weights_sha256": sha256_file(source.run / source.weights),
        **({"unfinished": source.unfinished} if source.unfinished else {}),
        "settings": dict(source.settings.to_json()),
        "seeds": {"training": source.settings.seed},
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

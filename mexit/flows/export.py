"""`mexit export`: a finished run becomes a bundle, checked exit by exit against torch before it is written."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mexit.core.artifact_paths import BUNDLES, RUNS, is_bundle, newest, remember
from mexit.core.atomic_io import sha256_file
from mexit.core.bundle import Bundle
from mexit.core.manifest import NAME_PATTERN
from mexit.core.policies import PARITY
from mexit.core.progress import Progress, Silent
from mexit.core.versions import VERSION, installed_versions
from mexit.data import registry
from mexit.data.dataset import DataSet
from mexit.errors import MexitError, UsageError, missing_extra
from mexit.evaluate.gradient_source import Source
from mexit.flows import single_file as nest
from mexit.flows.calibrate import CalibrateResult, calibrate_bundle, network_attack
from mexit.flows.precision_variants import check_precision, convert
from mexit.flows.sample_sources import DatasetSource, gather
from mexit.flows.tune import tune

if TYPE_CHECKING:
    from mexit.export.parity import Parity

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")  # recorded in a bundle
CHECK_IMAGES = 64
TUNING_S = 0.5


@dataclass(frozen=True)
class ExportResult:
    """A bundle.

    Attributes:
        bundle: its directory.
        model: its id.
        differences: largest |difference| of a logit from torch at each exit, (E,).
        calibration: what `calibrate` found; None with `--no-calibrate`, or where the bundle existed before.
        parity: how another precision answers, an `export.parity.Parity`; None with fp32 alone.
    """

    bundle: Path
    model: str
    differences: tuple[float, ...]
    calibration: CalibrateResult | None
    parity: Parity | None = None


def export_bundle(
    source: Path | None = None,
    *,
    out: Path | None = None,
    data_dir: str | Path | None = None,
    replace: bool = False,
    with_calibration: bool = True,
    with_images: bool = False,
    precision: str = PARITY,
    single_file: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a run.

    Args:
        source: a finished run; default the newest.
        out: the bundle directory; default `bundles/` and the run's name.
        data_dir: where data sets lie; default `MEXIT_DATA`.
        replace: put the bundle in place of an existing one.
        with_calibration: also set thresholds, on the run's own held-out split.
        with_images: put calibration images, clean and attacked, into the bundle, for devices without the data.
        precision: of a second set of segments beside fp32, one of `variants.PRECISIONS`; thresholds are set for
            fp32, those of int8 need a calibration of their own.
        single_file: also put all fp32 segments into one graph, see `export.nested_if`.
        progress: who listens.

    Raises:
        NotFound, Damaged: no such run, or not what was written.
        UsageError: the bundle exists already.
        BackendError: an exit differs from torch, an operator's cost is not known, or the network leaves the range
            of the precision.
        MissingExtra: torch, onnx or onnxruntime is not installed.
    """
    progress = progress or Silent()
    check_precision(precision)
    run = source or newest(RUNS, progress)
    out = out or BUNDLES / run.name
    if not NAME_PATTERN.fullmatch(out.name):
        raise UsageError(f"'{out.name}' cannot be a bundle's name, which is part of URLs: name it with --out")
    if out.exists() and not replace:
        raise UsageError(f"{out} exists already: choose another name with --out, or add --replace")
    if out.exists() and not is_bundle(out):
        raise UsageError(f"{out} is no bundle, so it is not replaced: choose another name with --out")
    bundle, differences, parity = _build(run, out, data_dir, with_images, precision, single_file, progress)
    bundle.write(replace=replace)
    remember(BUNDLES, out)
    progress.note(f"wrote {out}: {len(differences)} segments, logits within {max(differences):.1e} of torch")
    calibration = calibrate_bundle(out, data_dir=data_dir, progress=progress) if with_calibration else None
    _tune(out, progress)
    return ExportResult(out, bundle.id, tuple(differences), calibration, parity)


def _tune(out: Path, progress: Progress) -> None:
    """Let `--backend auto` know this device; a bundle that could not be timed is as good as any."""
    try:
        tune(out, seconds=TUNING_S, builds=False, progress=progress)
    except MexitError as error:
        progress.note(f"the engines of this device were not timed: {error}")


def _build(
    run: Path,
    out: Path,
    data_dir: str | Path | None,
    with_images: bool,
    precision: str,
    single_file: bool,
    progress: Progress,
) -> tuple[Bundle, list[float], Parity | None]:
    """The bundle in memory, checked against torch, and how its other precision answers."""
    try:
        from mexit.export import bundle_writer, onnx_export, segments, validate
        from mexit.models import model_spec
        from mexit.train import checkpoint
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train", "Exporting a network") from None
    from mexit.runtime.backends.ort import OrtBackend
    from mexit.runtime.reference import run_all_exits

    model, settings, splits = checkpoint.load_model(run)
    data = registry.load(settings.data, data_dir)
    splits.check(data)
    spec = model_spec(settings.model).input
    cuts = segments.cut(model, spec.name)
    exported = []
    with progress.track("exporting segments", len(cuts)) as advance:
        for cut in cuts:
            exported.append(onnx_export.to_onnx(cut))
            advance(1, "")
    provenance = _provenance(run, settings.to_json(), sha256_file(run / checkpoint.WEIGHTS))
    other = None if precision == PARITY else convert(cuts, exported, precision, data, splits, spec, progress)
    variants = {precision: other.segments} if other else {}
    if other:
        provenance["parity"] = asdict(other.parity)
    travelling = {}
    if with_images:
        samples = DatasetSource(data, splits, spec, network_attack(Source(model, settings), "average"))
        travelling = {images.file: images.to_bytes() for images in gather(samples, progress)}
    nested = nest.build(exported) if single_file else None
    parts = bundle_writer.assemble(
        out.name, data.classes, spec, exported, splits, provenance, travelling, variants, nested
    )
    bundle = Bundle.from_parts(out, parts.manifest, parts.files)
    backend = OrtBackend(bundle)
    images = _check_images(data, splits.part("selection"), spec)
    differences = validate.largest_difference(model, lambda batch: run_all_exits(backend, batch), images)
    if nested is not None:
        nest.check(nested, images, run_all_exits(backend, images))
    return bundle, differences, other.parity if other else None


def _check_images(data: DataSet, index: Any, spec: Any) -> Any:
    return data.batch(np.asarray(index[:CHECK_IMAGES]), spec)


def _provenance(run: Path, settings: Mapping[str, Any], weights_sha256: str) -> dict[str, Any]:
    return {
        "run": str(run),
        "weights_sha256": weights_sha256,
        "settings": dict(settings),
        "seeds": {"training": settings["seed"]},
        "versions": {"mexit": VERSION, "python": platform.python_version(), **installed_versions(PACKAGES)},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of mexit's own checkout, where it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""`mexit export --trt`: builds TensorRT engines from the ONNX segments of a bundle into the device cache.

It needs no torch. `stored_engines` lists the engines of the cache for `mexit inspect`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle, resolve_inside
from mexit.core.policies_file import PARITY
from mexit.core.printable import shell_path
from mexit.core.progress import Progress, Silent
from mexit.errors import BackendError, MexitError, MissingExtra
from mexit.runtime.backends import tensorrt_builder as builder
from mexit.runtime.backends.registry import ENGINES
from mexit.runtime.backends.tensorrt import TrtBackend, find_gpu
from mexit.runtime.device_cache import device_key

MB = 1e6


@dataclass(frozen=True)
class EngineRow:
    """One engine.

    Attributes:
        variant, segment: the segment (from 1) that it runs.
        targets: compute capabilities that it is built for, or the GPU that it was built on.
        bytes: size of the plan.
        seconds: duration of the build.
        state: "built", "cached" or "adopted"; in `stored_engines` "ready", or the reason why it would not be opened.
        file: the plan.
    """

    variant: str
    segment: int
    targets: tuple[str, ...]
    bytes: int
    seconds: float
    state: str
    file: Path


@dataclass(frozen=True)
class EnginesResult:
    """The engines of a bundle.

    Attributes:
        bundle: its directory.
        model: its id.
        builder, builder_version: the package that built them.
        targets: all targets of the package; `EngineRow.targets` says which of them an engine supports.
        rows: one row per engine.
        skipped: reason why a variant has no engines, by its name.
    """

    bundle: Path
    model: str
    builder: str
    builder_version: str
    targets: tuple[str, ...]
    rows: tuple[EngineRow, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "builder": self.builder,
            "builder_version": self.builder_version,
            "targets": self.targets,
            "run_here": False,
            "rows": rows_json(self.rows),
            "skipped": dict(self.skipped),
        }


def rows_json(rows: tuple[EngineRow, ...]) -> list[dict[str, Any]]:
    """Rows as `--json` prints them."""
    return [{**asdict(row), "file": str(row.file)} for row in rows]


def build_engines(
    bundle: Path | None = None,
    *,
    replace: bool = False,
    trust_engines: bool = False,
    progress: Progress | None = None,
) -> EnginesResult:
    """Build the engines of every variant that TensorRT runs, unless they are in the cache. None of them is run.

    Args:
        bundle: a directory; default the newest bundle.
        replace: build engines that exist, too.
        trust_engines: take engines from the folder `engines` of the bundle, and sign them with the key of this
            device. Opening one later runs the code of its author.
        progress: receives progress and notes.

    Raises:
        NotFound, Damaged: no such bundle, or not what was written.
        MissingExtra: TensorRT is not installed; the bundle is complete without it.
        BackendError: a segment of the variant fp32 cannot be built; other variants are then skipped.
        Untrusted, Damaged: an engine in the cache is not what this device stored.
        MexitError: the cache cannot be written.
    """
    progress = progress or Silent()
    opened = Bundle.open(bundle or newest(BUNDLES, progress))
    tensorrt = _load_tensorrt(opened.path)
    if not trust_engines and (opened.path / builder.ENGINES).exists():
        progress.note(f"the engines in {opened.path} are not used: --trust-engines uses them")
    rows: list[EngineRow] = []
    skipped = {}
    supported = [engine.variant for engine in ENGINES.values() if engine.engine == TrtBackend.engine]
    variants = [name for name in supported if name in opened.manifest.variants]
    with progress.track("TensorRT engines", len(variants) * len(opened.manifest.exits)) as advance:
        for variant in variants:
            try:
                for row in _build_variant(opened, tensorrt, variant, replace, trust_engines):
                    progress.note(f"{variant} segment {row.segment}: {row.state}, {row.bytes / MB:.2f} MB")
                    rows.append(row)
                    advance(1, f"{variant} segment {row.segment}")
            except BackendError as error:
                if variant == PARITY:
                    raise
                skipped[variant] = str(error)
    targets = builder.CAPABILITIES if tensorrt.ahead_of_time else rows[0].targets
    return EnginesResult(opened.path, opened.id, tensorrt.package, tensorrt.version, targets, tuple(rows), skipped)


def stored_engines(bundle: Bundle) -> tuple[EngineRow, ...]:
    """The engines in the device cache, and whether they would be opened. Opens none."""
    slots = [
        builder.cache_slot(bundle, package, variant, k)
        for package in builder.PACKAGES
        for variant in bundle.manifest.variants
        for k in range(1, len(bundle.manifest.exits) + 1)
    ]
    return tuple(_stored_row(slot) for slot in slots if (slot.folder / builder.RECORD).exists())


def _load_tensorrt(bundle: Path) -> builder.TensorRT:
    try:
        return builder.load_tensorrt()
    except MissingExtra:
        raise MissingExtra(
            f"TensorRT is not installed here, so no engines were built; the ONNX bundle {bundle} is complete. "
            f"On the device: pip install 'mexit[trt]', then mexit export {shell_path(bundle)} --trt"
        ) from None


def _config(tensorrt: builder.TensorRT, variant: str) -> builder.EngineConfig:
    """The configuration of new engines. Raises as `find_gpu` if the package builds for the GPU of this machine."""
    return builder.engine_config(tensorrt, variant, "" if tensorrt.ahead_of_time else str(find_gpu()[1]))


def _bundle_slot(bundle: Bundle, package: str, variant: str, segment: int) -> builder.EngineSlot:
    """The place of an engine that came with a bundle. Raises `Untrusted` if a link leads out of the bundle."""
    folder = f"{builder.ENGINES}/{package}/{variant}/{segment}"
    for file in (builder.PLAN, builder.RECORD):
        resolve_inside(bundle.path, f"{folder}/{file}")
    return builder.EngineSlot(bundle.path / folder, bundle, variant, segment)


def _build_variant(
    bundle: Bundle, tensorrt: builder.TensorRT, variant: str, replace: bool, trust_engines: bool
) -> Iterator[EngineRow]:
    config = _config(tensorrt, variant)
    for k in range(1, len(bundle.manifest.exits) + 1):
        key = bundle, tensorrt.package, variant, k
        trusted = _bundle_slot(*key) if trust_engines else None
        slot = builder.cache_slot(*key)
        engine = builder.provide(slot, tensorrt, config, rebuild=replace, trusted=trusted)
        yield _row(slot, engine.record, engine.origin)


def _stored_row(slot: builder.EngineSlot) -> EngineRow:
    try:
        record, _ = builder.load(slot, device_key())
        staleness = record.staleness(_config(builder.load_tensorrt(), slot.variant), slot.spec.sha256)
        return _row(slot, record, f"stale, to be built anew: {staleness}" if staleness else "ready")
    except MexitError as error:
        return EngineRow(slot.variant, slot.segment, (), 0, 0.0, str(error), slot.folder / builder.PLAN)


def _row(slot: builder.EngineSlot, record: builder.Record, state: str) -> EngineRow:
    return EngineRow(
        slot.variant, slot.segment, record.config.targets, record.plan_bytes, record.seconds, state,
        slot.folder / builder.PLAN,
    )  # fmt: skip

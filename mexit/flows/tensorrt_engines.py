"""`mexit export --trt`: TensorRT engines from a bundle's ONNX segments into this device's cache, without torch.

`kept` lists what is there for `mexit inspect`. What may be opened, and why, is in `runtime.backends.tensorrt_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.policies import PARITY
from mexit.core.progress import Progress, Silent
from mexit.errors import BackendError, MexitError, MissingExtra
from mexit.runtime.backends import tensorrt as tensorrt_backend
from mexit.runtime.backends import tensorrt_builder, tensorrt_cache
from mexit.runtime.backends.registry import ENGINES

MB = 1e6


@dataclass(frozen=True)
class EngineRow:
    """One engine.

    Attributes:
        variant, segment: whose, from 1.
        targets: compute capabilities that it is for, or the one GPU that it was built on.
        bytes: of the plan.
        seconds: that the build took.
        state: "built", "cached" or "adopted"; of `kept` "ready", or why it would not be opened.
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
        targets: what every engine was asked to be for; `EngineRow.targets` says what came of it.
        rows: one an engine.
        skipped: variant to the reason why it has none.
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
    """Build the engines of every variant that TensorRT runs, or find them in the cache. None of them is run.

    Args:
        bundle: a directory; default the newest bundle.
        replace: build those that exist, too.
        trust_engines: take plans that came in the bundle's folder `engines`, and sign them with this device's key.
            They are not looked into: opening one later runs what its maker put there.
        progress: who listens.

    Raises:
        NotFound, Damaged: no such bundle, or not what was written.
        MissingExtra: TensorRT is not installed; the bundle is complete without it.
        BackendError: a segment of the variant fp32 cannot be built; other variants are then skipped.
        Untrusted, Damaged: an engine in the cache is not what this device put there.
        MexitError: the cache cannot be written.
    """
    progress = progress or Silent()
    opened = Bundle.open(bundle or newest(BUNDLES, progress))
    tensorrt = _load_tensorrt(opened.path)
    if not trust_engines and (opened.path / tensorrt_cache.ENGINES).exists():
        progress.note(f"engines that came in {opened.path} are left alone: --trust-engines takes them")
    rows: list[EngineRow] = []
    skipped = {}
    variants = [name for name in _variants() if name in opened.manifest.variants]
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
    recipe = tensorrt_backend.recipe_for(tensorrt, PARITY)
    return EnginesResult(
        opened.path, opened.id, tensorrt.package, tensorrt.version, recipe.targets, tuple(rows), skipped
    )


def kept(bundle: Bundle) -> tuple[EngineRow, ...]:
    """The engines in this device's cache, and whether they would be opened. Opens none."""
    return tuple(_kept(place) for place in _places(bundle) if (place.folder / tensorrt_cache.RECORD).exists())


def _load_tensorrt(bundle: Path) -> tensorrt_builder.TensorRT:
    try:
        return tensorrt_builder.load_tensorrt()
    except MissingExtra:
        raise MissingExtra(
            f"TensorRT is not installed here, so no engines were built; the ONNX bundle {bundle} is complete. "
            f"On the device: pip install 'mexit[trt]', then mexit export {bundle} --trt"
        ) from None


def _variants() -> tuple[str, ...]:
    return tuple(
        engine.variant for engine in ENGINES.values() if engine.engine == tensorrt_backend.TrtBackend.engine
    )


def _build_variant(
    bundle: Bundle, tensorrt: tensorrt_builder.TensorRT, variant: str, replace: bool, trust_engines: bool
) -> Iterator[EngineRow]:
    recipe = tensorrt_backend.recipe_for(tensorrt, variant)
    for k in range(1, len(bundle.manifest.exits) + 1):
        trusted = tensorrt_cache.shipped(bundle, tensorrt.package, variant, k) if trust_engines else None
        engine = tensorrt_backend.provide_engine(bundle, tensorrt, recipe, k, replace_it=replace, trusted=trusted)
        yield _row(tensorrt_cache.slot(bundle, tensorrt.package, variant, k), engine.record, engine.origin)


def _places(bundle: Bundle) -> Iterator[tensorrt_cache.Slot]:
    for package in tensorrt_builder.PACKAGES:
        for variant in bundle.manifest.variants:
            for k in range(1, len(bundle.manifest.exits) + 1):
                yield tensorrt_cache.slot(bundle, package, variant, k)


def _kept(place: tensorrt_cache.Slot) -> EngineRow:
    try:
        record = tensorrt_cache.load(place, tensorrt_cache.device_key()).record
        return _row(place, record, _state(place, record))
    except MexitError as error:
        return EngineRow(place.variant, place.segment, (), 0, 0.0, str(error), place.folder / tensorrt_cache.PLAN)


def _state(place: tensorrt_cache.Slot, record: tensorrt_cache.Record) -> str:
    """Whether the TensorRT at hand would open it."""
    try:
        tensorrt = tensorrt_builder.load_tensorrt()
        recipe = tensorrt_backend.recipe_for(tensorrt, place.variant)
    except MexitError as error:
        return str(error)
    changes = tensorrt_cache.changes(record, recipe, place)
    return f"stale, to be built anew: {changes}" if changes else "ready"


def _row(place: tensorrt_cache.Slot, record: tensorrt_cache.Record, state: str) -> EngineRow:
    return EngineRow(
        place.variant, place.segment, record.targets, record.plan_bytes, record.seconds, state,
        place.folder / tensorrt_cache.PLAN,
    )  # fmt: skip

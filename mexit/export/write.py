"""Assemble a bundle: segments, manifest, costs, splits, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mexit.core.bundle import SPLITS
from mexit.core.files import sha256_bytes
from mexit.core.manifest import (
    FORMAT,
    VERSION,
    DataSpec,
    ExitSpec,
    FileSpec,
    InputSpec,
    Manifest,
    SegmentSpec,
    SplitSpec,
    Variant,
)
from mexit.data.splits import Splits
from mexit.export.macs import count
from mexit.export.to_onnx import OnnxSegment


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of: the manifest, and the files it vouches for by their path."""

    manifest: Manifest
    files: Mapping[str, bytes]


def assemble(
    name: str,
    classes: Sequence[str],
    spec: InputSpec,
    segments: Sequence[OnnxSegment],
    splits: Splits,
    provenance: Mapping[str, Any],
    calibration: Mapping[str, bytes] | None = None,
) -> Parts:
    """Put the parts of an fp32 bundle together, costs counted on the graphs.

    `calibration` holds images that are to travel in the bundle, by their path in it.
    """
    splits_bytes = splits.to_bytes()
    files = {f"segments/fp32/{k}.onnx": segment.content for k, segment in enumerate(segments, start=1)}
    specs = tuple(
        SegmentSpec(file, sha256_bytes(segment.content), len(segment.content), segment.inputs, segment.outputs)
        for (file, _), segment in zip(files.items(), segments, strict=True)
    )
    hashes = splits.hashes()
    data = DataSpec(
        data_set=splits.data_set,
        sha256=splits.data_sha256,
        parts={part: SplitSpec(len(index), hashes[part]) for part, index in splits.parts.items()},
        file=_file_spec(SPLITS, splits_bytes),
    )
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        name=name,
        classes=tuple(classes),
        input=spec,
        exits=_exits(segments),
        variants={"fp32": Variant(specs, None)},
        splits=data,
        calibration=tuple(_file_spec(file, content) for file, content in (calibration or {}).items()),
        provenance=provenance,
    )
    return Parts(manifest, {**files, **(calibration or {}), SPLITS: splits_bytes})


def _file_spec(file: str, content: bytes) -> FileSpec:
    return FileSpec(file, sha256_bytes(content), len(content))


def _exits(segments: Sequence[OnnxSegment]) -> tuple[ExitSpec, ...]:
    exits, macs, parameters = [], 0, 0
    for segment in segments:
        trunk, head = count(segment.model)
        macs += trunk + head
        parameters += segment.parameters
        exits.append(ExitSpec(trunk, head, macs, parameters))
    return tuple(exits)

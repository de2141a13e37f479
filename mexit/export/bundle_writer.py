"""Assemble a bundle: segments, manifest, costs, splits, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import SPLITS
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
from mexit.errors import BackendError
from mexit.export.macs import count
from mexit.export.onnx_export import OnnxSegment

SINGLE_FILE = "segments/fp32/all.onnx"


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
    variants: Mapping[str, Sequence[OnnxSegment]] | None = None,
    single_file: bytes | None = None,
) -> Parts:
    """Put the parts of a bundle together, costs counted on the graphs.

    `segments` are the variant fp32, `variants` the same segments in other precisions, `single_file` all of fp32 in
    one graph. `calibration` holds images that are to travel in the bundle, by their path in it.

    Raises:
        BackendError: an operator cannot be counted, or a variant costs something else than fp32 does.
    """
    splits_bytes = splits.to_bytes()
    exits = _exits(segments)
    files: dict[str, bytes] = {}
    specs: dict[str, Variant] = {}
    for variant, graphs in {"fp32": segments, **(variants or {})}.items():
        if _exits(graphs) != exits:
            raise BackendError(f"the {variant} segments do not cost what the fp32 segments cost")
        named = {f"segments/{variant}/{k}.onnx": segment for k, segment in enumerate(graphs, start=1)}
        files |= {file: segment.content for file, segment in named.items()}
        specs[variant] = Variant(tuple(_segment_spec(file, segment) for file, segment in named.items()), None)
    if single_file is not None:
        files[SINGLE_FILE] = single_file
        specs["fp32"] = replace(specs["fp32"], single_file=_file_spec(SINGLE_FILE, single_file))
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
        exits=exits,
        variants=specs,
        splits=data,
        calibration=tuple(_file_spec(file, content) for file, content in (calibration or {}).items()),
        provenance=provenance,
    )
    return Parts(manifest, {**files, **(calibration or {}), SPLITS: splits_bytes})


def _file_spec(file: str, content: bytes) -> FileSpec:
    return FileSpec(file, sha256_bytes(content), len(content))


def _segment_spec(file: str, segment: OnnxSegment) -> SegmentSpec:
    content = segment.content
    return SegmentSpec(file, sha256_bytes(content), len(content), segment.inputs, segment.outputs)


def _exits(segments: Sequence[OnnxSegment]) -> tuple[ExitSpec, ...]:
    exits, macs, parameters = [], 0, 0
    for segment in segments:
        trunk, head = count(segment.model)
        macs += trunk + head
        parameters += segment.parameters
        exits.append(ExitSpec(trunk, head, macs, parameters))
    return tuple(exits)

"""Assemble a bundle in memory: segments, counted costs, splits, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import SPLITS, Bundle
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
from mexit.export.macs import count_macs
from mexit.export.onnx_export import OnnxSegment

SINGLE_FILE = "segments/fp32/all.onnx"


@dataclass(frozen=True)
class BundleContents:
    """What goes into a bundle.

    Attributes:
        classes: names, (C,).
        input: the input tensor.
        splits: of the data set that the network was trained on.
        variants: name to segments in order; "fp32" is required, the others are the same segments in other precisions.
        provenance: settings, versions and the run, as JSON.
        calibration: npz files with calibration images, by their path in the bundle.
        single_file: all fp32 segments in one graph, from `nested_if`.
    """

    classes: Sequence[str]
    input: InputSpec
    splits: Splits
    variants: Mapping[str, Sequence[OnnxSegment]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, bytes] = field(default_factory=dict)
    single_file: bytes | None = None


def build_bundle(path: Path, contents: BundleContents) -> Bundle:
    """Build the bundle that `Bundle.write` stores at `path`, with MACs counted on the graphs.

    Raises:
        BackendError: an operator cannot be counted, or the MACs of a variant differ from those of fp32.
    """
    exits = _exit_specs(contents.variants["fp32"])
    files: dict[str, bytes] = {SPLITS: contents.splits.to_bytes(), **contents.calibration}
    variants: dict[str, Variant] = {}
    for name, segments in contents.variants.items():
        if _exit_specs(segments) != exits:
            raise BackendError(f"the {name} segments have other MACs than the fp32 segments")
        specs = []
        for k, segment in enumerate(segments, start=1):
            spec = _file_spec(f"segments/{name}/{k}.onnx", segment.content)
            files[spec.file] = segment.content
            specs.append(SegmentSpec(spec.file, spec.sha256, spec.bytes, segment.inputs, segment.outputs))
        single_file = None
        if name == "fp32" and contents.single_file is not None:
            files[SINGLE_FILE] = contents.single_file
            single_file = _file_spec(SINGLE_FILE, contents.single_file)
        variants[name] = Variant(tuple(specs), single_file)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        name=path.name,
        classes=tuple(contents.classes),
        input=contents.input,
        exits=exits,
        variants=variants,
        splits=_data_spec(contents.splits, files[SPLITS]),
        calibration=tuple(_file_spec(file, content) for file, content in contents.calibration.items()),
        provenance=contents.provenance,
    )
    return Bundle.from_parts(path, manifest, files)


def _data_spec(splits: Splits, content: bytes) -> DataSpec:
    hashes = splits.hashes()
    parts = {name: SplitSpec(len(index), hashes[name]) for name, index in splits.parts.items()}
    return DataSpec(splits.data_set, splits.data_sha256, parts, _file_spec(SPLITS, content))


def _file_spec(file: str, content: bytes) -> FileSpec:
    return FileSpec(file, sha256_bytes(content), len(content))


def _exit_specs(segments: Sequence[OnnxSegment]) -> tuple[ExitSpec, ...]:
    exits, macs, parameters = [], 0, 0
    for segment in segments:
        trunk, head = count_macs(segment.model)
        macs += trunk + head
        parameters += segment.parameters
        exits.append(ExitSpec(trunk, head, macs, parameters))
    return tuple(exits)

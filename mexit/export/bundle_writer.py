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
    StaticSpec,
    Variant,
)
from mexit.data.splits import Splits
from mexit.errors import BackendError
from mexit.export.macs import count_macs
from mexit.export.merge import static_network
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
        single_file: all fp32 segments in one graph, from `nested_if`; with it the fp32 static network is a file, too.
        numbers: number of each exit in the network, (E,); default 1..E.
    """

    classes: Sequence[str]
    input: InputSpec
    splits: Splits
    variants: Mapping[str, Sequence[OnnxSegment]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, bytes] = field(default_factory=dict)
    single_file: bytes | None = None
    numbers: Sequence[int] | None = None


def build_bundle(path: Path, contents: BundleContents) -> Bundle:
    """Build the bundle that `Bundle.write` stores at `path`, with MACs counted on the graphs.

    Raises:
        BackendError: an operator cannot be counted, or the MACs of a variant differ from those of fp32.
        Damaged: the segments cannot be merged into the static network; see `onnx_merge`.
    """
    files: dict[str, bytes] = {SPLITS: contents.splits.to_bytes(), **contents.calibration}
    numbers = contents.numbers or range(1, len(contents.variants["fp32"]) + 1)
    costs: dict[str, tuple[tuple[ExitSpec, ...], StaticSpec]] = {}
    variants: dict[str, Variant] = {}
    for name, segments in contents.variants.items():
        specs = []
        for k, segment in enumerate(segments, start=1):
            specs.append(_segment_spec(f"segments/{name}/{k}.onnx", segment))
            files[specs[-1].file] = segment.content
        network = static_network(segments)
        static = _segment_spec(f"segments/{name}/static.onnx", network)
        costs[name] = _exit_specs(segments, numbers), StaticSpec(sum(count_macs(network.model)), network.parameters)
        if costs[name] != costs["fp32"]:
            raise BackendError(f"the {name} segments have other MACs than the fp32 segments")
        single_file = None
        if name == "fp32" and contents.single_file is not None:
            files |= {SINGLE_FILE: contents.single_file, static.file: network.content}
            single_file = _file_spec(SINGLE_FILE, contents.single_file)
        variants[name] = Variant(tuple(specs), single_file, static)
    exits, static_costs = costs["fp32"]
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
        static=static_costs,
    )
    return Bundle.from_parts(path, manifest, files)


def _data_spec(splits: Splits, content: bytes) -> DataSpec:
    hashes = splits.hashes()
    parts = {name: SplitSpec(len(index), hashes[name]) for name, index in splits.parts.items()}
    return DataSpec(splits.data_set, splits.data_sha256, parts, _file_spec(SPLITS, content))


def _file_spec(file: str, content: bytes) -> FileSpec:
    return FileSpec(file, sha256_bytes(content), len(content))


def _segment_spec(file: str, segment: OnnxSegment) -> SegmentSpec:
    content = segment.content
    return SegmentSpec(file, sha256_bytes(content), len(content), segment.inputs, segment.outputs)


def _exit_specs(segments: Sequence[OnnxSegment], numbers: Sequence[int]) -> tuple[ExitSpec, ...]:
    exits, macs, parameters = [], 0, 0
    for number, segment in zip(numbers, segments, strict=True):
        trunk, head = count_macs(segment.model)
        macs += trunk + head
        parameters += segment.parameters
        exits.append(ExitSpec(trunk, head, macs, parameters, number))
    return tuple(exits)

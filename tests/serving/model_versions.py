"""Versions of the digits network for tests of the model repository: other weights and thresholds, or damaged files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import numpy_helper

from mexit import Bundle
from mexit.core.atomic_io import sha256_bytes
from mexit.core.manifest import Variant
from mexit.core.onnx_merge import merge_models
from mexit.core.policies_file import Policies


def copy(source: Path, target: Path) -> Path:
    """Copy a bundle as a user should: complete, or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.parent / f".{target.name}"
    shutil.copytree(source, hidden)
    hidden.rename(target)
    return target


def damaged(source: Path, target: Path) -> Path:
    """A copy with one wrong byte in segment 2."""
    hidden = target.parent / f".{target.name}"
    shutil.copytree(source, hidden)
    segment = hidden / "segments/fp32/2.onnx"
    content = bytearray(segment.read_bytes())
    content[-20] ^= 1
    segment.write_bytes(content)
    hidden.rename(target)
    return target


def changed(source: Path, target: Path, factor: float = 1.5, shift: float = 0.2) -> Path:
    """A version whose matrices are those of `source` times a factor, and whose thresholds are higher by `shift`."""
    old = Bundle.open(source)
    variant = old.manifest.variants["fp32"]
    contents = [_scaled(old.content(spec.file), factor) for spec in variant.segments]
    specs = [
        replace(spec, sha256=sha256_bytes(content), bytes=len(content))
        for spec, content in zip(variant.segments, contents, strict=True)
    ]
    assert variant.static is not None
    static = merge_models(contents, variant.static.file, only_logits=True)
    static_spec = replace(variant.static, sha256=sha256_bytes(static), bytes=len(static))
    manifest = replace(old.manifest, variants={"fp32": Variant(tuple(specs), None, static_spec)})
    segments = {spec.file for spec in variant.segments}
    kept = {spec.file: old.content(spec.file) for spec in old.manifest.files if spec.file not in segments}
    new = Bundle.from_parts(target, manifest, kept | dict(zip([spec.file for spec in specs], contents, strict=True)))
    new.write()
    shutil.copytree(source / "traces", target / "traces")
    [entry] = old.policies().entries
    points = [
        replace(point, thresholds=tuple(None if t is None else t + shift for t in point.thresholds))
        for point in entry.frontier
    ]
    new.save_policies(Policies(new.id, (replace(entry, frontier=tuple(points)),)))
    return target


def _scaled(content: bytes, factor: float) -> bytes:
    model = onnx.load_model_from_string(content)
    for initializer in model.graph.initializer:
        if len(initializer.dims) == 2:
            scaled = numpy_helper.to_array(initializer) * factor
            initializer.CopyFrom(numpy_helper.from_array(scaled.astype("float32"), initializer.name))
    return bytes(model.SerializeToString())

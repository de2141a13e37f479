"""The manifest: a missing field or a field of another type is named in the error."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mexit.core.manifest import Manifest
from mexit.errors import Damaged, SchemaTooNew

IMAGE = {"name": "input", "shape": [-1, 1, 8, 8], "dtype": "float32"}
FEATURES = {"name": "features", "shape": [-1, 16, 4, 4], "dtype": "float32"}
LOGITS = {"name": "logits", "shape": [-1, 4], "dtype": "float32"}
FILE = {"file": "segments/fp32/1.onnx", "sha256": "0" * 64, "bytes": 5}
FIRST = {**FILE, "inputs": [IMAGE], "outputs": [FEATURES, LOGITS]}
SECOND = {**FILE, "inputs": [FEATURES], "outputs": [LOGITS]}
STATIC = {**FILE, "file": "segments/fp32/static.onnx", "inputs": [IMAGE], "outputs": [LOGITS]}
GOOD: dict[str, Any] = {
    "format": "mexit-bundle",
    "version": 2,
    "name": "digits",
    "classes": ["zero", "eins", "dùe", "三"],
    "input": {
        "name": "input",
        "dtype": "float32",
        "layout": "NCHW",
        "channels": 1,
        "size": [8, 8],
        "range": [0.0, 1.0],
        "prepare": {
            "resize": "box", "fit": "stretch", "crop": 1.0, "grey": "luma", "alpha": "black", "exif": True,
        },
    },
    "exits": [
        {"trunk_macs": 10, "head_macs": 2, "cumulative_macs": 12, "parameters": 100, "number": 1},
        {"trunk_macs": 30, "head_macs": 0, "cumulative_macs": 42, "parameters": 300, "number": 3},
    ],
    "variants": {"fp32": {"segments": [FIRST, SECOND], "single_file": None, "static": STATIC}},
    "static": {"macs": 40, "parameters": 290},
    "calibration": [{"file": "calibration/calibration-clean.npz", "sha256": "4" * 64, "bytes": 9}],
    "splits": {
        "data_set": "digits",
        "sha256": "1" * 64,
        "parts": {"train": {"n": 5, "sha256": "2" * 64}},
        "file": {"file": "splits.npz", "sha256": "3" * 64, "bytes": 7},
    },
    "provenance": {"run": "runs/digits"},
}  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field at any depth; the content of `provenance` is free."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        if key != "provenance":
            yield from paths(inner, (*path, key))


SEGMENTS = ("variants", "fp32", "segments")
ALL = list(paths(GOOD))
FIELDS = [path for path in ALL if isinstance(path[-1], str) and path[-1] not in ("fp32", "train", "static")]


def changed(path: tuple[Any, ...], value: Any = ...) -> dict[str, Any]:
    """The good manifest with one field set to `value`, or without it."""
    manifest = json.loads(json.dumps(GOOD))
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return manifest


def dotted(path: tuple[Any, ...]) -> str:
    """A path as in messages: `bundle.json.input.size[0]`."""
    return "bundle.json" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def at(path: tuple[Any, ...]) -> Any:
    inner: Any = GOOD
    for key in path:
        inner = inner[key]
    return inner


def wrong_types(path: tuple[Any, ...]) -> list[Any]:
    """One value of every JSON type except the right one."""
    right = at(path)
    kinds: dict[type, Any] = {dict: {}, list: [], str: "text", int: 5, float: -1.5, bool: True}
    wrong = [value for kind, value in kinds.items() if kind is not type(right)]
    if isinstance(right, float):
        wrong.remove(5)
    if path[-1] == "single_file":
        return [value for value in wrong if value != {}]
    return [*wrong, None] if path[-1] not in ("splits", "static") else wrong


def test_a_manifest_is_read_and_written_unchanged() -> None:
    assert json.loads(json.dumps(Manifest.from_json(GOOD).to_json())) == GOOD
    assert Manifest.from_json(GOOD).cumulative_macs == (12, 42)
    assert Manifest.from_json(GOOD).numbers == (1, 3)


def test_version_1_has_all_exits_and_no_static_network() -> None:
    old = copy.deepcopy(GOOD)
    old["version"] = 1
    del old["static"], old["variants"]["fp32"]["static"], old["exits"][0]["number"], old["exits"][1]["number"]
    manifest = Manifest.from_json(old)
    assert manifest.numbers == (1, 2)
    assert manifest.static is manifest.variants["fp32"].static is None
    assert json.loads(json.dumps(manifest.to_json())) == old


def test_the_range_of_deep_grey_files_is_stored() -> None:
    assert Manifest.from_json(GOOD).input.prepare.grey_bits is None
    value = copy.deepcopy(GOOD)
    value["input"]["prepare"]["grey_bits"] = 12
    assert Manifest.from_json(value).to_json()["input"]["prepare"]["grey_bits"] == 12
    for wrong in (8, 17, "12", 12.5, True):
        value["input"]["prepare"]["grey_bits"] = wrong
        with pytest.raises(Damaged, match="grey_bits"):
            Manifest.from_json(value)


def test_an_exported_manifest_has_exactly_these_fields(digits_bundle: Path) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return shape(value[0]) if isinstance(value, list) and value else type(value).__name__

    real, good = json.loads((digits_bundle / "bundle.json").read_bytes()), copy.deepcopy(GOOD)
    for manifest in (real, good):
        manifest["provenance"] = manifest["splits"]["parts"] = manifest["calibration"] = {}
    assert shape(real) == shape(good)


@pytest.mark.parametrize("path", FIELDS, ids=dotted)
def test_a_missing_field_is_named(path: tuple[Any, ...]) -> None:
    with pytest.raises(Damaged) as caught:
        Manifest.from_json(changed(path))
    if path[0] in ("format", "version"):
        assert path[0] in str(caught.value)
    else:
        assert str(caught.value) == f"{dotted(path[:-1])}: missing {path[-1]}"


@pytest.mark.parametrize("path", ALL, ids=dotted)
def test_a_field_of_another_type_is_named(path: tuple[Any, ...]) -> None:
    for wrong in wrong_types(path):
        with pytest.raises(Damaged) as caught:
            Manifest.from_json(changed(path, wrong))
        where = path[0] if path[0] in ("format", "version") else f"{dotted(path)}: expected"
        assert where in str(caught.value), wrong


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "mexit-policies", "expected format 'mexit-bundle', found 'mexit-policies'"),
        (("version",), 0, "version must be a positive whole number, found 0"),
        (("name",), "../evil", "cannot be a bundle's name"),
        (("name",), "", "cannot be a bundle's name"),
        (("name",), "x" * 65, "at most 64 letters"),
        (("classes",), ["one"], "at least 2 classes are needed, found 1"),
        (("classes", 1), "", "the class name '' is empty"),
        (("classes", 1), "\x1b[2J", "control characters"),
        (("exits",), [], "at least one exit and the variant fp32 are needed"),
        (("variants",), {}, "at least one exit and the variant fp32 are needed"),
        (SEGMENTS, [FIRST], "2 exits need 2 segments, variant fp32 has 1"),
        (("exits", 1, "cumulative_macs"), 11, r"must be positive and not decrease, found \(12, 11\)"),
        (("exits", 0, "cumulative_macs"), 0, "must be positive and not decrease"),
        (("exits", 0, "number"), 0, r"numbers of the exits must increase from 1, found \(0, 3\)"),
        (("exits", 1, "number"), 1, r"numbers of the exits must increase from 1, found \(1, 1\)"),
        (("static",), None, "static and the static network of variant fp32 must both be there"),
        (("variants", "fp32", "static"), None, "static and the static network of variant fp32 must both be there"),
        (("static", "macs"), 0, "static.macs must be positive, found 0"),
        (("variants", "fp32", "static", "outputs"), [FEATURES, LOGITS], "static network of variant fp32 has the"),
        (("variants", "fp32", "static", "outputs"), [FEATURES], r"expected \[\(-1, 1, 8, 8\), \(-1, 4\)\]"),
        (SEGMENTS, [FIRST, {**SECOND, "inputs": []}], r"segment 2 of variant fp32 has inputs \[\], expected"),
        (SEGMENTS, [FIRST, {**SECOND, "inputs": [IMAGE]}], r"has inputs .*, expected \[\(-1, 16, 4, 4\)\]"),
        (SEGMENTS, [FIRST, {**SECOND, "outputs": []}], r"segment 2 .* has logits \(\), expected \(-1, 4\)"),
        (SEGMENTS, [{**FIRST, "outputs": [FEATURES]}, SECOND], r"segment 1 .* has logits \(-1, 16, 4, 4\)"),
        (("classes",), ["a", "b", "c"], r"has logits \(-1, 4\), expected \(-1, 3\)"),
        (("input", "size"), [9, 8], r"segment 1 .* has inputs .*, expected \[\(-1, 1, 9, 8\)\]"),
        (("input", "dtype"), "uint8", "input must be float32 NCHW in"),
        (("input", "layout"), "NHWC", "input must be float32 NCHW in"),
        (("input", "range"), [0, 255], "input must be float32 NCHW in"),
        (("input", "channels"), 2, "1 or 3 channels"),
        (("input", "size"), [8, 8, 8], r"input.size: expected 2 entries, found 3"),
        (("input", "size"), [0, 8], "1 to 4096 pixels"),
        (("input", "size"), [8, 1 << 40], "1 to 4096 pixels"),
        (("input", "prepare", "resize"), "cubic", "must be one of bilinear, bicubic, box, found 'cubic'"),
        (("input", "prepare", "fit"), "guess", "prepare.fit must be one of"),
        (("input", "prepare", "crop"), 0, r"prepare.crop must lie in \(0, 1\], found 0"),
        (("input", "prepare", "crop"), 1.5, "prepare.crop must lie in"),
    ],
    ids=lambda value: dotted(value) if isinstance(value, tuple) else ascii(value)[:20],
)  # fmt: skip
def test_an_invalid_value_is_refused(path: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(Damaged, match=words):
        Manifest.from_json(changed(path, value))


def test_all_missing_fields_are_named() -> None:
    manifest = copy.deepcopy(GOOD)
    del manifest["classes"], manifest["exits"]
    with pytest.raises(Damaged, match=r"bundle\.json: missing classes, exits"):
        Manifest.from_json(manifest)


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(SchemaTooNew, match=r"version 3 is newer than this mexit reads \(2\): upgrade mexit, or export"):
        Manifest.from_json(changed(("version",), 3))


def test_the_version_is_checked_before_the_fields() -> None:
    with pytest.raises(SchemaTooNew):
        Manifest.from_json({"format": "mexit-bundle", "version": 99, "all": "different"})


@pytest.mark.parametrize("value", [None, [], "x", 5, {}], ids=repr)
def test_other_json_is_damaged(value: Any) -> None:
    with pytest.raises(Damaged, match="expected format 'mexit-bundle', found"):
        Manifest.from_json(value)


def test_unknown_fields_are_ignored() -> None:
    assert Manifest.from_json({**GOOD, "future": 1}).name == "digits"

"""Opening a bundle checks every byte and every path before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mexit.core.atomic_io import sha256_bytes
from mexit.core.bundle import Bundle, resolve_inside
from mexit.errors import Damaged, NotFound, SchemaTooNew, Untrusted, UsageError

FILES = ["segments/fp32/1.onnx", "segments/fp32/2.onnx", "segments/fp32/3.onnx", "splits.npz"]


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def first_segment(manifest: dict[str, Any]) -> dict[str, Any]:
    segment: dict[str, Any] = manifest["variants"]["fp32"]["segments"][0]
    return segment


def test_an_opened_bundle_returns_the_checked_bytes(digits_bundle: Path) -> None:
    bundle = Bundle.open(str(digits_bundle))
    assert bundle.id == sha256_bytes((digits_bundle / "bundle.json").read_bytes())
    for k in (1, 2, 3):
        assert bundle.segment("fp32", k) == (digits_bundle / f"segments/fp32/{k}.onnx").read_bytes()
    assert bundle.content("splits.npz") == (digits_bundle / "splits.npz").read_bytes()


def test_the_static_network_is_derived_from_the_segments_and_checked(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    spec = bundle.manifest.variants["fp32"].static
    assert spec is not None
    assert not (bundle_copy / spec.file).exists()
    content = bundle.static("fp32")
    assert (sha256_bytes(content), len(content)) == (spec.sha256, spec.bytes)
    assert len(content) < sum(len(bundle.segment("fp32", k)) for k in (1, 2, 3))

    edit(bundle_copy, lambda manifest: manifest["variants"]["fp32"]["static"].update(sha256="0" * 64))
    with pytest.raises(Damaged, match=r"static\.onnx does not follow from the segments: export the bundle again"):
        Bundle.open(bundle_copy).static("fp32")


def test_the_bytes_stay_the_same_when_the_file_changes(bundle_copy: Path) -> None:
    before = (bundle_copy / FILES[0]).read_bytes()
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / FILES[0]).write_bytes(b"changed")
    assert bundle.segment("fp32", 1) == before


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first byte", "a middle byte", "last byte"])
def test_a_changed_bit_is_an_error_that_names_the_file(bundle_copy: Path, file: str, where: float) -> None:
    content = bytearray((bundle_copy / file).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (bundle_copy / file).write_bytes(content)
    with pytest.raises(Damaged, match=f"{file} was changed: its sha256 is not the recorded one"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", [-1, 1], ids=["cut short", "longer"])
def test_another_size_is_an_error_that_names_both(bundle_copy: Path, file: str, change: int) -> None:
    content = (bundle_copy / file).read_bytes()
    (bundle_copy / file).write_bytes(content[:-1] if change < 0 else content + b"\0")
    with pytest.raises(Damaged, match=rf"{file} has {len(content) + change} bytes.*{len(content)}[ :]"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(bundle_copy: Path, file: str) -> None:
    (bundle_copy / file).unlink()
    with pytest.raises(Damaged, match=rf"{file} does not exist, although bundle.json names it: copy or export"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_a_directory_or_pipe_is_not_read(bundle_copy: Path, kind: str) -> None:
    (bundle_copy / FILES[0]).unlink()
    os.mkdir(bundle_copy / FILES[0]) if kind == "directory" else os.mkfifo(bundle_copy / FILES[0])
    with pytest.raises(Damaged, match=f"{FILES[0]} is not a file"):
        Bundle.open(bundle_copy)


def test_a_missing_bundle_and_a_missing_manifest_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"bundle nowhere does not exist: make one with mexit export"):
        Bundle.open("nowhere")
    with pytest.raises(NotFound, match=r"bundle manifest .*bundle.json does not exist"):
        Bundle.open(tmp_path)


def test_a_damaged_manifest_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "bundle.json").write_bytes((bundle_copy / "bundle.json").read_bytes()[:-5])
    with pytest.raises(Damaged, match=r"bundle manifest .*bundle.json is not valid JSON"):
        Bundle.open(bundle_copy)


def test_a_newer_bundle_is_not_called_damaged(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda manifest: manifest.update(version=3))
    with pytest.raises(SchemaTooNew):
        Bundle.open(bundle_copy)


PATHS = {
    "absolute": "/etc/passwd",
    "parent": "../outside.onnx",
    "parent within": "segments/../../outside.onnx",
    "parent that returns": "segments/../segments/fp32/1.onnx",
    "nul": "segments/fp32/1.onnx\0.txt",
    "empty": "",
    "backslash": "..\\outside.onnx",
    "drive": "C:outside.onnx",
    "link out": "link/outside.onnx",
    "linked file": "linked.onnx",
}


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("role", ["segment", "splits", "single file"])
def test_a_path_out_of_the_bundle_is_refused(bundle_copy: Path, name: str, role: str) -> None:
    content = (bundle_copy / FILES[0]).read_bytes()
    (bundle_copy.parent / "outside.onnx").write_bytes(content)
    (bundle_copy / "link").symlink_to("..")
    (bundle_copy / "linked.onnx").symlink_to("../outside.onnx")
    spec = {"file": name, "sha256": sha256_bytes(content), "bytes": len(content)}

    def change(manifest: dict[str, Any]) -> None:
        if role == "single file":
            manifest["variants"]["fp32"]["single_file"] = spec
        else:
            (first_segment(manifest) if role == "segment" else manifest["splits"]["file"]).update(spec)

    edit(bundle_copy, change)
    with pytest.raises(Untrusted, match="leads out of the bundle"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("file", ["bundle.json", "segments"])
def test_a_link_out_of_the_bundle_is_refused(bundle_copy: Path, file: str) -> None:
    (bundle_copy / file).rename(bundle_copy.parent / "outside")
    (bundle_copy / file).symlink_to(bundle_copy.parent / "outside")
    with pytest.raises(Untrusted, match="leads out of the bundle"):
        Bundle.open(bundle_copy)


def test_links_within_a_bundle_and_to_a_bundle_are_followed(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / FILES[0]).rename(bundle_copy / "one.onnx")
    (bundle_copy / FILES[0]).symlink_to("../../one.onnx")
    (tmp_path / "link").symlink_to(bundle_copy)
    assert Bundle.open(tmp_path / "link").id == Bundle.open(bundle_copy).id


@pytest.mark.parametrize("name", ["a.onnx", "deep/er/a.onnx", "a..b", "...", ".hidden", "ä b"])
def test_other_paths_are_accepted(tmp_path: Path, name: str) -> None:
    assert resolve_inside(tmp_path, name) == tmp_path / name


def test_a_recorded_size_of_terabytes_is_an_error(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda manifest: first_segment(manifest).update(bytes=1 << 50))
    with pytest.raises(Damaged, match=rf"bytes, expected {1 << 50}"):
        Bundle.open(bundle_copy)


def test_an_existing_bundle_is_replaced_only_on_request(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UsageError, match="exists already: choose another name with --out, or add --replace"):
        bundle.write()
    bundle.write(replace=True)
    assert Bundle.open(bundle_copy).id == bundle.id


def test_a_written_bundle_equals_the_one_in_memory(digits_bundle: Path, tmp_path: Path) -> None:
    original = Bundle.open(digits_bundle)
    files = {spec.file: (digits_bundle / spec.file).read_bytes() for spec in original.manifest.files}
    Bundle.from_parts(tmp_path / "copy", original.manifest, files).write()
    assert Bundle.open(tmp_path / "copy").id == original.id
    with pytest.raises(ValueError, match="the manifest names"):
        Bundle.from_parts(tmp_path / "less", original.manifest, {})


@pytest.mark.parametrize("action", ["save a trace", "save policies"])
def test_a_linked_traces_folder_is_neither_written_nor_cleared(bundle_copy: Path, action: str) -> None:
    opened = Bundle.open(bundle_copy)
    policies = opened.policies()
    trace = opened.load_trace(policies.entries[0].trace)
    (bundle_copy / "traces").rename(bundle_copy / "kept")
    (bundle_copy.parent / "precious").mkdir()
    (bundle_copy.parent / "precious/data.npz").write_bytes(b"mine")
    (bundle_copy / "traces").symlink_to("../precious")
    with pytest.raises(Untrusted, match="leads out of the bundle"):
        opened.save_trace(trace) if action == "save a trace" else opened.save_policies(policies)
    assert [file.name for file in (bundle_copy.parent / "precious").iterdir()] == ["data.npz"]

"""Writes are complete or absent; reads fail with an error that names the file and the reason."""

from __future__ import annotations

import ctypes
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mexit.core.atomic_io import (
    CHUNK_BYTES,
    new_directory,
    parse_json,
    read_bytes,
    read_npz,
    sha256_bytes,
    sha256_file,
    write_bytes,
)
from mexit.errors import Damaged, MexitError, NotFound, TooLarge, UsageError

DEAD = 4_194_305  # above the largest process id of the kernel


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def put_directory(path: Path, content: str, *, replace: bool = False) -> None:
    with new_directory(path, replace=replace) as temporary:
        write_bytes(temporary / "deep" / "file", content.encode())


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_bytes(tmp_path / "deep" / "file", content)
        assert (tmp_path / "deep" / "file").read_bytes() == content
    assert names(tmp_path / "deep") == {"file"}


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()


def test_temporaries_of_dead_processes_are_removed(tmp_path: Path) -> None:
    alive = os.getppid()
    for name in (
        f".file.tmp-{DEAD}",
        f".file.tmp-{os.getpid()}",
        f".file.tmp-{alive}",
        ".file.tmp-x",
        ".other.tmp-1",
    ):
        (tmp_path / name).write_bytes(b"torn")
    (tmp_path / f".folder.tmp-{DEAD}" / "deep").mkdir(parents=True)
    write_bytes(tmp_path / "file", b"new")
    put_directory(tmp_path / "folder", "new")
    assert names(tmp_path) == {"file", "folder", f".file.tmp-{alive}", ".file.tmp-x", ".other.tmp-1"}


def test_wildcards_in_a_name_are_literal(tmp_path: Path) -> None:
    (tmp_path / f".ab.tmp-{DEAD}").write_bytes(b"of another file")
    write_bytes(tmp_path / "a[b]", b"1")
    write_bytes(tmp_path / "*", b"2")
    assert names(tmp_path) == {"a[b]", "*", f".ab.tmp-{DEAD}"}


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_directory(tmp_path / "bundle") as temporary:
        write_bytes(temporary / "file", b"x")
        assert not (tmp_path / "bundle").exists()
    assert names(tmp_path) == {"bundle"}
    assert names(tmp_path / "bundle") == {"file"}


def test_an_error_in_the_block_leaves_no_file(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with new_directory(tmp_path / "bundle") as temporary:
            write_bytes(temporary / "file", b"x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert names(tmp_path) == set()


def test_an_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    put_directory(tmp_path / "bundle", "old")
    with pytest.raises(UsageError, match="exists already: choose another name with --out, or add --replace"):
        put_directory(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle/deep/file").read_text() == "old"
    put_directory(tmp_path / "bundle", "new", replace=True)
    assert (tmp_path / "bundle/deep/file").read_text() == "new"
    assert names(tmp_path) == {"bundle"}


@pytest.mark.parametrize("kind", ["file", "link to a directory"])
def test_a_file_or_a_link_is_replaced_by_a_directory(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "bundle").write_text("a file")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/precious").write_text("kept")
        (tmp_path / "bundle").symlink_to(tmp_path / "elsewhere")
    put_directory(tmp_path / "bundle", "new", replace=True)
    assert (tmp_path / "bundle/deep/file").read_text() == "new"
    assert names(tmp_path) - {"elsewhere"} == {"bundle"}
    assert kind == "file" or (tmp_path / "elsewhere/precious").read_text() == "kept"


def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a system that cannot exchange two names."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


def test_without_an_exchange_of_names_two_renames_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_renameat2(monkeypatch)
    put_directory(tmp_path / "bundle", "old")
    put_directory(tmp_path / "bundle", "new", replace=True)
    assert (tmp_path / "bundle/deep/file").read_text() == "new"
    assert names(tmp_path) == {"bundle"}


def test_if_the_second_rename_fails_the_old_directory_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_renameat2(monkeypatch)
    put_directory(tmp_path / "bundle", "old")
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(MexitError, match="No space left on device; what was there before is untouched"):
        put_directory(tmp_path / "bundle", "new", replace=True)
    assert (tmp_path / "bundle/deep/file").read_text() == "old"
    assert names(tmp_path) == {"bundle"}


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    for write in (
        lambda: write_bytes(tmp_path / "file" / "x", b""),
        lambda: put_directory(tmp_path / "file/x", ""),
    ):
        with pytest.raises(MexitError, match=r"could not write .*file/x: "):
            write()
    assert names(tmp_path) == {"file"}


def test_a_failure_after_the_rename_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, calls = os.fsync, []

    def second_fails(file: int) -> None:  # the first is of the file, the second of its directory
        calls.append(file)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        sync(file)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(MexitError, match="was written, but may not survive a power failure: Input/output error"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_large_and_missing_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(Damaged, match=r"thing .*large has 11 bytes; at most 10 are expected"):
        read_bytes(tmp_path / "large", "thing", 10)
    with pytest.raises(TooLarge, match=r"image .*large has 11 bytes"):
        read_bytes(tmp_path / "large", "image", 10, too_large=TooLarge)
    for missing in (tmp_path / "missing", tmp_path / "large" / "below"):
        with pytest.raises(NotFound, match=f"thing {missing} does not exist"):
            read_bytes(missing, "thing", 10)
        with pytest.raises(NotFound, match="does not exist"):
            sha256_file(missing)


def test_pipes_devices_and_directories_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Damaged, match=f"thing {path} is not a file"):
            read_bytes(path, "thing", 10)


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(Damaged, match="cannot be read: Too many levels of symbolic links"):
        read_bytes(tmp_path / "circle", "thing", 10)


def test_a_file_has_the_hash_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(CHUNK_BYTES + 17)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == sha256_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[1,]", b'{"a": NaN}', b"[Infinity]", b"[-1e999]", b"[" * 100_000,
     b"[1" + b"0" * 30 + b"]", b"[1" + b"0" * 9999 + b"]", b'["\\ud800"]'],
    ids=["empty", "cut short", "binary", "comma", "nan", "infinity", "overflow", "deep", "huge", "longer", "half"],
)  # fmt: skip
def test_invalid_json_is_damaged(content: bytes) -> None:
    with pytest.raises(Damaged, match=r"settings runs/x/settings.json is not valid JSON \("):
        parse_json(content, Path("runs/x/settings.json"), "settings")


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_npz_arrays_are_read() -> None:
    arrays = read_npz(npz(a=np.arange(3), b=np.eye(2)), 1 << 20)
    assert arrays["a"].tolist() == [0, 1, 2]
    assert arrays["b"].dtype == np.float64


def test_pickles_in_an_npz_are_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz(npz(a=np.asarray([Hostile()], dtype=object)), 1 << 20)
    assert names(tmp_path) == set()


def test_an_npz_that_unpacks_to_too_much_is_refused() -> None:
    bomb = npz(a=np.zeros(1 << 22, np.uint8))
    assert len(bomb) < 1 << 14
    with pytest.raises(ValueError, match="it unpacks to 4194432 bytes; at most 1048576 are expected"):
        read_npz(bomb, 1 << 20)


def test_an_npz_header_that_announces_terabytes_is_refused() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"."):
        read_npz(buffer.getvalue(), 1 << 20)


def test_truncated_and_changed_npz_files_are_errors_or_the_same_arrays() -> None:
    good = npz(a=np.arange(40, dtype=np.int64))
    for i in range(len(good)):
        for bad in (good[:i], good[:i] + bytes([good[i] ^ 0x10]) + good[i + 1 :]):
            try:
                arrays = read_npz(bad, 1 << 20)
            except ValueError:
                continue
            assert "a" not in arrays or arrays["a"].tolist() == list(range(40))

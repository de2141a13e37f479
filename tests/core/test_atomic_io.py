"""Writing: the old one or the new one, never a torn one. Reading: a clear word on whatever is wrong."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mexit.core import atomic_io
from mexit.core.atomic_io import (
    new_directory,
    parse_json,
    read_bytes,
    read_npz,
    sha256_bytes,
    sha256_file,
    write_bytes,
)
from mexit.errors import Damaged, MexitError, NotFound, TooLarge, UsageError

NOBODY = 4_194_305  # above the kernel's largest process number


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


def test_leftovers_of_dead_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    alive = os.getppid()
    for name in (
        f".file.tmp-{NOBODY}",
        f".file.tmp-{os.getpid()}",
        f".file.tmp-{alive}",
        ".file.tmp-x",
        ".other.tmp-1",
    ):
        (tmp_path / name).write_bytes(b"torn")
    (tmp_path / f".folder.tmp-{NOBODY}" / "deep").mkdir(parents=True)
    write_bytes(tmp_path / "file", b"new")
    put_directory(tmp_path / "folder", "new")
    assert names(tmp_path) == {"file", "folder", f".file.tmp-{alive}", ".file.tmp-x", ".other.tmp-1"}


def test_a_name_with_wildcards_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / f".ab.tmp-{NOBODY}").write_bytes(b"another's")
    write_bytes(tmp_path / "a[b]", b"1")
    write_bytes(tmp_path / "*", b"2")
    assert names(tmp_path) == {"a[b]", "*", f".ab.tmp-{NOBODY}"}


def test_a_directory_is_there_only_when_the_block_ended(tmp_path: Path) -> None:
    with new_directory(tmp_path / "bundle") as temporary:
        write_bytes(temporary / "file", b"x")
        assert not (tmp_path / "bundle").exists()
    assert names(tmp_path) == {"bundle"}
    assert names(tmp_path / "bundle") == {"file"}


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
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
def test_replacing_something_else_leaves_no_rest(tmp_path: Path, kind: str) -> None:
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


def test_where_names_cannot_be_swapped_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "_exchange", lambda *_: False)
    put_directory(tmp_path / "bundle", "old")
    put_directory(tmp_path / "bundle", "new", replace=True)
    assert (tmp_path / "bundle/deep/file").read_text() == "new"
    assert names(tmp_path) == {"bundle"}


def test_if_the_second_rename_fails_the_old_one_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_io, "_exchange", lambda *_: False)
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


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    for write in (
        lambda: write_bytes(tmp_path / "file" / "x", b""),
        lambda: put_directory(tmp_path / "file/x", ""),
    ):
        with pytest.raises(MexitError, match=r"could not write .*file/x: "):
            write()
    assert names(tmp_path) == {"file"}


def test_after_the_rename_a_failure_does_not_claim_that_the_old_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_io, "_sync_directory", fail)
    with pytest.raises(MexitError, match="was written, but may not survive a power failure: Input/output error"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
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


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Damaged, match=f"thing {path} is not a file"):
            read_bytes(path, "thing", 10)


def test_a_link_in_a_circle_is_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(Damaged, match="cannot be read: Too many levels of symbolic links"):
        read_bytes(tmp_path / "circle", "thing", 10)


def test_a_file_hashes_like_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(atomic_io.CHUNK_BYTES + 17)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == sha256_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[1,]", b'{"a": NaN}', b"[Infinity]", b"[-1e999]", b"[" * 100_000,
     b"[1" + b"0" * 30 + b"]", b"[1" + b"0" * 9999 + b"]", b'["\\ud800"]'],
    ids=["empty", "cut short", "binary", "comma", "nan", "infinity", "overflow", "deep", "huge", "longer", "half"],
)  # fmt: skip
def test_what_is_no_json_is_damaged(content: bytes) -> None:
    with pytest.raises(Damaged, match=r"settings runs/x/settings.json is not valid JSON \("):
        parse_json(content, Path("runs/x/settings.json"), "settings")


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_npz_arrays_come_back() -> None:
    found = read_npz(npz(a=np.arange(3), b=np.eye(2)), 1 << 20)
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"].dtype == np.float64


def test_pickles_in_an_npz_are_refused(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz(npz(a=np.asarray([Mischief()], dtype=object)), 1 << 20)
    assert names(tmp_path) == set()


def test_an_npz_that_unpacks_to_more_than_expected_is_refused_unopened() -> None:
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


def test_every_cut_and_every_flipped_bit_of_an_npz_is_an_error_or_the_same_arrays() -> None:
    good = npz(a=np.arange(40, dtype=np.int64))
    for place in range(len(good)):
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :]):
            try:
                found = read_npz(bad, 1 << 20)
            except ValueError:
                continue
            assert "a" not in found or found["a"].tolist() == list(range(40))

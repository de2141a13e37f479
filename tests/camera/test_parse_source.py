"""Source strings: their kinds, the order of files, and names without credentials."""

from __future__ import annotations

from pathlib import Path

import pytest
from camera_media import write_images

from mexit.camera.parse_source import parse_source
from mexit.errors import NotFound, UsageError


@pytest.mark.parametrize(
    ("text", "kind", "live"),
    [
        ("rtsp://10.0.0.5/stream", "stream", True),
        ("rtmp://host/app/key", "stream", True),
        ("tcp://127.0.0.1:5000", "stream", True),
        ("udp://@:5000", "stream", True),
        ("http://host/video.mjpg", "stream", True),
        ("http://host:8080/live?camera=1", "stream", True),
        ("https://host/list.m3u8", "stream", True),
        ("https://host/clip.mp4", "download", False),
        ("https://host/clip.MP4?download=1", "download", False),
        ("http://host/snapshot.jpg", "download", False),
    ],
)
def test_urls(text: str, kind: str, live: bool) -> None:
    source = parse_source(text)
    assert (source.kind, source.live, source.address) == (kind, live, text)


@pytest.mark.parametrize("scheme", ["RTSP", "Rtsp", "HTTPS"])
def test_the_scheme_in_capitals(scheme: str) -> None:
    """FFmpeg knows small letters only; user, password and path keep their case."""
    source = parse_source(f"{scheme}://Me:GeHeim@10.0.0.5/Stream")
    assert source.address == f"{scheme.lower()}://Me:GeHeim@10.0.0.5/Stream"
    assert source.name == f"{scheme.lower()}://10.0.0.5/Stream"


@pytest.mark.parametrize("text", ["", "  ", "gopher://host/x", "rtsp://", "rtsp:///path", "http://[::1"])
def test_invalid_sources(text: str) -> None:
    with pytest.raises(UsageError):
        parse_source(text)


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"srtp:// is not one of rtsp://, .*https://"):
        parse_source("srtp://host")


def test_a_missing_camera() -> None:
    with pytest.raises(NotFound, match=r"camera 987 \(/dev/video987\) does not exist; present: "):
        parse_source("987")
    with pytest.raises(NotFound, match="camera 987"):
        parse_source("/dev/video987")


def test_images_of_a_folder_in_natural_order(tmp_path: Path) -> None:
    write_images(tmp_path, ["frame10.png", "frame2.png", "Frame1.png", "b.JPG"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "._frame2.png").write_text("a file of macOS")
    names = [path.name for path in parse_source(str(tmp_path)).files]
    assert names == ["Frame1.png", "b.JPG", "frame2.png", "frame10.png"]


def test_a_glob_matches_images_and_videos_only(tmp_path: Path) -> None:
    write_images(tmp_path / "a", ["2.png", "10.png"])
    write_images(tmp_path / "b", ["1.png"])
    (tmp_path / "a" / "clip.mp4").touch()
    (tmp_path / "a" / "notes.txt").touch()
    files = parse_source(f"{tmp_path}/**/*").files
    assert [str(path.relative_to(tmp_path)) for path in files] == ["a/2.png", "a/10.png", "a/clip.mp4", "b/1.png"]


def test_a_file_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    [path] = write_images(tmp_path, ["shot[1].png"])
    assert parse_source(str(path)).files == (path,)
    assert parse_source(path.as_uri()).files == (path,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.mp4", "does not exist: give a camera number"),
        ("*.png", "no image or video matches"),
        ("*.txt", r"no image or video matches .* \(1 other files match\)"),
        ("empty", "holds no images .* give a glob"),
        ("a" * 300, "cannot be read: File name too long"),
    ],
)
def test_missing_files(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(NotFound, match=message):
        parse_source(str(tmp_path / name))


def test_a_home_that_does_not_exist() -> None:
    with pytest.raises(NotFound, match=r"source ~no-such-user/a\.mp4 cannot be read"):
        parse_source("~no-such-user/a.mp4")


def test_a_source_does_not_show_its_address() -> None:
    source = parse_source("rtsp://admin:geheim@10.0.0.5/a")
    assert "geheim" not in repr(source)
    assert source.address == "rtsp://admin:geheim@10.0.0.5/a"
    with pytest.raises(UsageError) as error:
        parse_source("foo://admin:geheim@10.0.0.5/a")
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "rtsp:admin:geheim@10.0.0.5/a",
        "rtsp:/admin:geheim@10.0.0.5/a",
        "HTTP:admin:geheim@10.0.0.5/a",
        "admin:geheim@10.0.0.5/a",
        "admin:ge/heim@10.0.0.5:554/a",
        "rtsp://admin:geheim@/a",
        "rtspp://admin:geheim@10.0.0.5/a",
        "file://admin:geheim@10.0.0.5/a.mp4",
    ],
)
def test_a_mistyped_address_does_not_show_its_password(text: str) -> None:
    with pytest.raises((UsageError, NotFound)) as error:
        parse_source(text)
    assert "heim" not in str(error.value)


def test_a_file_name_with_a_colon_and_an_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b@2x.png", "rtsp:x.png"):
        [path] = write_images(tmp_path, [name])
        assert parse_source(name).files == (Path(path.name),)


def test_a_camera_by_another_name(tmp_path: Path) -> None:
    """As those of /dev/v4l/by-id: a link to a device file. Only the kind of file is known before it is opened."""
    link = tmp_path / "usb-Webcam_1-video-index0"
    link.symlink_to("/dev/null")
    for name in (str(link), "/dev/null"):
        source = parse_source(name)
        assert (source.kind, source.live, source.name, source.address) == ("device", True, name, name)


@pytest.mark.parametrize("name", ["/dev/v4l/by-id/usb-none", "/dev/v4l/by-path/pci-none"])
def test_a_missing_camera_by_another_name(name: str) -> None:
    with pytest.raises(NotFound, match=f"camera {name} does not exist; present: "):
        parse_source(name)

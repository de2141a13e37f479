"""What a web address gives is what its server says: a picture, a video that ends, or a live stream."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from camera_media import grey_frames, slow_runtime, write_images, write_video
from camera_senders import transport_stream
from PIL import Image
from web_server import MJPEG, Reply, web_server

from mexit.camera.frame import Counters
from mexit.camera.identify_source import identify_source
from mexit.camera.live_stream import LiveSettings
from mexit.camera.parse_source import parse_source
from mexit.camera.pipeline import classify_frames
from mexit.errors import MexitError, NotFound

TIMES = [i / 25 for i in range(30)]
SETTINGS = LiveSettings(first_delay_s=0.05, longest_delay_s=0.1)


@pytest.mark.parametrize(
    ("path", "suffix", "content_type", "chunked"),
    [
        ("/video?id=3", "mp4", "video/mp4", False),
        ("/video", "mkv", "", False),
        ("/clip.jpg", "mp4", "video/mp4", False),
        ("/record.cgi", "ts", "application/octet-stream", False),
        ("/video", "mp4", "video/mp4", True),
        ("/clip.mkv", "mkv", "video/x-matroska", True),
    ],
)
def test_a_video_that_ends(tmp_path: Path, path: str, suffix: str, content_type: str, chunked: bool) -> None:
    """Every frame is answered, and then the source is at its end."""
    video = write_video(tmp_path / f"a.{suffix}", grey_frames(30), TIMES, movflags="+faststart").read_bytes()

    def answer(reply: Reply) -> None:
        if chunked:
            reply.give_chunked(video, content_type)
        else:
            reply.give(video, **({"Content_Type": content_type} if content_type else {}))

    with web_server(answer) as server:
        results = [result for _, result in classify_frames(slow_runtime(), server.url + path)]
    assert [result.frame_index for result in results] == list(range(30))


def test_an_address_in_capitals(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", grey_frames(3), TIMES[:3]).read_bytes()
    with web_server(lambda reply: reply.give(video, Content_Type="video/mp4")) as server:
        assert len(list(classify_frames(slow_runtime(), f"{server.url.replace('http', 'HTTP')}/Clip.MP4"))) == 3


def test_a_list_of_parts_that_ends(tmp_path: Path) -> None:
    video = b"".join(transport_stream(grey_frames(30), 25))
    playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\npart.ts\n"

    def answer(reply: Reply) -> None:
        if reply.path == "/part.ts":
            reply.give(video, Content_Type="video/mp2t")
        else:
            text = playlist + ("#EXT-X-ENDLIST\n" if "ends" in reply.path else "")
            reply.give(text.encode(), Content_Type="application/vnd.apple.mpegurl")

    with web_server(answer) as server:
        assert len(list(classify_frames(slow_runtime(), f"{server.url}/ends.m3u8"))) == 30
        live = identify_source(parse_source(f"{server.url}/goes-on.m3u8"), SETTINGS)
    assert live.kind == "stream"


@pytest.mark.parametrize("path", ["/image.jpg", "/video.mjpg", "/clip.mp4", "/mjpg/video.cgi?resolution=640x480"])
def test_mjpeg_whatever_its_suffix(tmp_path: Path, path: str) -> None:
    [picture] = write_images(tmp_path, ["a.jpg"])
    with web_server(lambda reply: reply.give_mjpeg([picture.read_bytes()])) as server:
        assert identify_source(parse_source(server.url + path), SETTINGS).live
        answers = list(islice(classify_frames(slow_runtime(), server.url + path, live=SETTINGS), 3))
    assert [frame.shape for frame, _ in answers] == [(20, 30, 3)] * 3
    assert MJPEG.startswith("multipart/")


def test_a_stream_without_length_and_duration_is_read_again() -> None:
    video = b"".join(transport_stream(grey_frames(30), 25))
    counters = Counters()
    with web_server(lambda reply: reply.give_chunked(video, "video/mp2t")) as server:
        answers = classify_frames(
            slow_runtime(), f"{server.url}/live.ts", live=SETTINGS, counters=counters, on_event=lambda _: None
        )
        while counters.reconnects < 2:
            next(answers)
        answers.close()


@pytest.mark.parametrize("path", ["/snapshot", "/cgi-bin/snap.cgi?channel=1", "/picture.mp4"])
def test_a_picture_by_its_type(tmp_path: Path, path: str) -> None:
    [picture] = write_images(tmp_path, ["a.png"])
    inputs: list[object] = []

    def runtime(image: object, **options: object) -> list[object]:
        inputs.append(image)
        return slow_runtime()(image, **options)

    with web_server(lambda reply: reply.give(picture.read_bytes(), Content_Type="image/png")) as server:
        assert len(list(classify_frames(runtime, server.url + path))) == 1  # type: ignore[arg-type]
    assert inputs == [picture.read_bytes()]


def test_an_animated_picture(tmp_path: Path) -> None:
    first, *rest = [Image.new("L", (8, 8), 50 * i) for i in range(4)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    with web_server(lambda reply: reply.give((tmp_path / "a.gif").read_bytes(), Content_Type="image/gif")) as server:
        assert len(list(classify_frames(slow_runtime(), f"{server.url}/weather"))) == 4


@pytest.mark.parametrize("path", ["/live", "/a.jpg", "/a.mp4"])
def test_an_address_that_does_not_exist(path: str) -> None:
    with web_server(lambda reply: reply.give(status=404)) as server, pytest.raises(NotFound, match="does not exist"):
        classify_frames(slow_runtime(), server.url + path)


def test_a_server_that_is_not_ready() -> None:
    """A stream is tried again later, a file is an error."""
    with web_server(lambda reply: reply.give(status=503)) as server:
        assert identify_source(parse_source(f"{server.url}/live"), SETTINGS).kind == "stream"
        with pytest.raises(MexitError, match="Service Unavailable"):
            identify_source(parse_source(f"{server.url}/clip.mp4"), SETTINGS)


@pytest.mark.parametrize("name", ["a.png", "*.png"])
def test_files_are_not_looked_at(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, ["a.png"])
    source = parse_source(str(tmp_path / name))
    assert identify_source(source, SETTINGS) is source


def test_a_file_of_a_server_that_was_not_ready(tmp_path: Path) -> None:
    """It is read as a stream, and is at its end nevertheless."""
    video = write_video(tmp_path / "a.mp4", grey_frames(30), TIMES).read_bytes()
    counters = Counters()

    def answer(reply: Reply) -> None:
        if len(reply.seen) == 1:
            reply.give(status=503)
        else:
            reply.give(video, Content_Type="video/mp4")

    with web_server(answer) as server:
        answers = list(classify_frames(slow_runtime(), f"{server.url}/video", live=SETTINGS, counters=counters))
    assert answers
    assert (counters.arrived, counters.reconnects) == (30, 0)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/snap.jpg", "/video", "/live"])
def test_a_stop_signal_does_not_wait_for_the_server(tmp_path: Path, path: str) -> None:
    """The server announces a picture, a video or a stream, and sends nothing."""
    types = {"/snap.jpg": "image/jpeg", "/video": "video/mp4", "/live": MJPEG}
    finished: list[bool] = []

    def answer(reply: Reply) -> None:
        reply.send_response(200)
        reply.send_header("Content-Type", types[path])
        if path != "/live":
            reply.send_header("Content-Length", "1000")
        reply.end_headers()
        reply.over.wait(60)
        finished.append(True)

    with web_server(answer) as server:
        assert list(classify_frames(slow_runtime(), server.url + path, stopped=lambda: len(server.seen) == 2)) == []
        assert not finished

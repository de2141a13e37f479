"""Live sources on this machine: young answers from a stream that is too fast, reconnects, time-outs, passwords.

The age of an answered frame is taken from the sender's own clock, not from `captured_s`: it counts what lies in
socket buffers too.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from camera_media import grey_frames, slow_runtime
from camera_senders import RtspCamera, TcpCamera, UdpCamera, nal_units, transport_stream

from mexit.camera import live, video_reader
from mexit.camera.frame import Counters
from mexit.camera.live import LiveSettings, stream_options
from mexit.camera.pipeline import CameraPrediction, watch
from mexit.errors import BadInput, MexitError
from mexit.flows.camera import camera

FPS = 100
IMPATIENT = LiveSettings(open_timeout_s=5, read_timeout_s=1.5, connect_attempts=3, first_delay_s=0.05)
# One frame interval (10 ms), the transport (a frame leaves the MPEG-TS reader when the next begins), one answer
# (100 ms): 0.15 s measured. The rest is for a busy machine; without the rule the last frame is over 2 s old.
AGE_BOUND_S = 1.0


@pytest.fixture(scope="module")
def chunks() -> list[bytes]:
    return transport_stream(grey_frames(400), FPS)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 2
    while any(thread.name == "mexit-camera" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a reader thread is still alive"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [TcpCamera, UdpCamera])
def test_a_stream_ten_times_too_fast_is_answered_young(kind: type, chunks: list[bytes]) -> None:
    ages, results = [], []
    counters = Counters()
    with kind(chunks, FPS) as sender:
        answers = watch(slow_runtime(0.1), sender.address, live=IMPATIENT, counters=counters)
        for _, result in answers:
            assert result.time_s is not None
            ages.append(time.monotonic() - sender.sent[round(result.time_s * FPS)])
            results.append(result)
            if len(results) == 25:
                break
        answers.close()
    assert max(ages) < AGE_BOUND_S
    assert sum(ages[-5:]) < sum(ages[:5]) + 0.5  # they do not grow
    assert max(one.age_ms for one in results) < 1e3 * AGE_BOUND_S
    indices = [one.frame_index for one in results]
    assert indices == sorted(set(indices))
    assert [one.dropped for one in results] == [index - place for place, index in enumerate(indices)]
    assert counters.dropped >= results[-1].dropped > 150
    assert counters.undecodable == 0


def test_every_frame_of_a_live_stream_on_request(chunks: list[bytes]) -> None:
    with TcpCamera(chunks, FPS, lives=[60]) as sender:
        answers = watch(slow_runtime(0.02), sender.address, every_frame=True, live=IMPATIENT)
        results = [result for (_, result), _ in zip(answers, range(60), strict=False)]
        answers.close()
    assert [one.frame_index for one in results] == list(range(60))
    assert {one.dropped for one in results} == {0}


@pytest.mark.parametrize("stall", [False, True])
def test_a_stream_that_dies_and_comes_back(chunks: list[bytes], stall: bool) -> None:
    events: list[str] = []
    counters = Counters()
    results: list[CameraPrediction] = []
    with TcpCamera(chunks, FPS, lives=[50, 400], stall=stall) as sender:
        answers = watch(
            slow_runtime(0.01), sender.address, live=IMPATIENT, counters=counters, on_event=events.append
        )
        for _, result in answers:
            results.append(result)
            if counters.reconnects and len(results) > 60:
                break
        answers.close()
        assert sender.connections == 2
    assert counters.reconnects == 1
    why = "timed out" if stall else "the stream ended"
    assert f"lost ({why}); trying again in 0.0" in events[0]
    assert "back after" in events[1]
    assert len(events) == 2
    indices = [one.frame_index for one in results]
    assert indices == sorted(set(indices))


def test_waiting_times_double_with_jitter_up_to_a_bound(chunks: list[bytes]) -> None:
    settings = LiveSettings(read_timeout_s=1, first_delay_s=0.02, longest_delay_s=0.1, give_up_s=0.6)
    events: list[str] = []
    sender = TcpCamera(chunks, FPS, lives=[30])
    with sender:
        answers = watch(slow_runtime(), sender.address, live=settings, on_event=events.append)
        next(answers)
        sender.over.set()
        sender.unblock()  # the camera is switched off for good
        with pytest.raises(MexitError, match=r"no picture for \d\.\d s \(Connection refused\); given up"):
            list(answers)
    delays = [float(event.rpartition(" in ")[2].removesuffix(" s")) for event in events]
    assert 4 < len(delays) < 30
    assert max(delays) <= 0.1


def test_a_camera_that_is_off_is_named_after_some_attempts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    events: list[str] = []
    answers = watch(slow_runtime(), f"rtsp://me:geheim@127.0.0.1:{port}/x", live=IMPATIENT, on_event=events.append)
    with pytest.raises(MexitError) as caught:
        next(answers)
    assert f"rtsp://***@127.0.0.1:{port}/x: no connection after 3 attempts (Connection refused)" in str(
        caught.value
    )
    assert len(events) == 2
    assert "no connection yet, attempt 1 (Connection refused); trying again in" in events[0]
    assert "geheim" not in repr(caught.value) + str(events)


def test_a_camera_that_accepts_and_says_nothing_times_out() -> None:
    settings = LiveSettings(open_timeout_s=0.3, connect_attempts=2, first_delay_s=0.01)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(MexitError, match=r"no connection after 2 attempts \(timed out\)"):
            list(watch(slow_runtime(), f"tcp://127.0.0.1:{server.getsockname()[1]}", live=settings))
    assert time.monotonic() - began < 3


def test_sound_alone_is_refused_at_once() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("mp2", rate=48_000, layout="mono")
        for i in range(100):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48_000, i * 1152
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with TcpCamera([buffer.getvalue()], FPS) as sender, pytest.raises(BadInput, match="holds no video stream"):
        list(watch(slow_runtime(), sender.address, live=IMPATIENT))


def test_a_stream_without_a_picture_in_it_is_given_up(
    chunks: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "decode_packet", lambda *_: iter(()))
    settings = LiveSettings(picture_timeout_s=0.3, connect_attempts=2, first_delay_s=0.01)
    with TcpCamera(chunks, FPS) as sender:
        answers = watch(slow_runtime(), sender.address, live=settings)
        with pytest.raises(MexitError, match=r"no connection after 2 attempts \(no picture for 0\.3 s\)"):
            next(answers)


def test_closing_closes_the_connection(chunks: list[bytes]) -> None:
    with TcpCamera(chunks, FPS) as sender:
        answers = watch(slow_runtime(), sender.address, live=IMPATIENT)
        next(answers)
        answers.close()
        assert not any(thread.name == "mexit-camera" for thread in threading.enumerate())
        assert sender.closed_by_client.wait(2)


def test_stop_is_obeyed_while_no_camera_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    patient = LiveSettings(first_delay_s=20, longest_delay_s=20)
    answers = watch(
        slow_runtime(), f"tcp://127.0.0.1:{port}", live=patient, stopped=lambda: time.monotonic() - began > 0.3
    )
    assert list(answers) == []
    assert time.monotonic() - began < 2


def test_decoding_that_is_too_slow_skips_to_stay_young(
    chunks: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_decode(*args: object) -> Iterator[object]:
        time.sleep(0.025)  # 40 frames a second, of a camera that sends 100
        yield from video_reader.decode_packet(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(live, "decode_packet", slow_decode)
    settings = LiveSettings(open_timeout_s=5, read_timeout_s=1.5, behind_s=0.3)
    ages = []
    counters = Counters()
    with TcpCamera(chunks, FPS) as sender:
        answers = watch(slow_runtime(), sender.address, live=settings, counters=counters)
        for _, result in answers:
            assert result.time_s is not None
            ages.append(time.monotonic() - sender.sent[round(result.time_s * FPS)])
            if result.time_s > 3.5:
                break
        answers.close()
    assert counters.skipped > 50
    assert max(ages[len(ages) // 2 :]) < 2  # without skipping they would reach 5 s
    assert counters.undecodable == 0  # decoding starts again at key frames only


@pytest.fixture(scope="module")
def units() -> list[list[bytes]]:
    return nal_units(grey_frames(300), FPS)


def test_rtsp_over_tcp_with_a_password_that_nobody_sees(
    units: list[list[bytes]], digits_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    seen: list[CameraPrediction] = []
    with RtspCamera(units, FPS, "admin:geheim") as sender:
        address = f"rtsp://admin:geheim@127.0.0.1:{sender.port}/live"
        report = camera(
            digits_bundle,
            source=address,
            budget="low",
            jsonl=tmp_path / "a.jsonl",
            limit=10,
            on_result=seen.append,
            on_event=events.append,
        )
    assert all("RTP/AVP/TCP" in transport for transport in sender.transports)
    assert report.frames == len(seen) == 10
    lines = (tmp_path / "a.jsonl").read_text()
    assert json.loads(lines.splitlines()[0])["source"] == f"rtsp://***@127.0.0.1:{sender.port}/live"
    assert report.source == f"rtsp://***@127.0.0.1:{sender.port}/live"
    assert "geheim" not in lines + repr(report) + repr(seen) + str(events) + caplog.text


def test_a_wrong_password_is_not_tried_again(
    units: list[list[bytes]], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with RtspCamera(units, FPS, "admin:right") as sender:
        address = f"rtsp://admin:geheim@127.0.0.1:{sender.port}/live"
        with pytest.raises(MexitError, match=r"401 Unauthorized .*: check the user and the password") as caught:
            list(watch(slow_runtime(), address, live=IMPATIENT))
        assert sender.refused == 2  # without a password, and with the wrong one
    shown = "".join(capfd.readouterr()) + caplog.text + repr(caught.value)
    assert "geheim" not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_losses_are_logged_where_nobody_listens(chunks: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    with TcpCamera(chunks, FPS, lives=[20, 400]) as sender:
        answers = watch(slow_runtime(), sender.address, live=IMPATIENT)
        for _, result in answers:
            if result.frame_index > 40:
                break
        answers.close()
    assert [record.name for record in caplog.records] == ["mexit.camera"] * 2
    assert "trying again" in caplog.text


def test_rtsp_gets_its_options() -> None:
    settings = LiveSettings(read_timeout_s=2.5)
    options = stream_options("rtsp://host/x", settings)
    assert options["rtsp_transport"] == "tcp"
    assert options["timeout"] == "2500000"
    assert "rtsp_transport" not in stream_options("udp://@:5000", settings)

"""Live sources on this machine: the newest frame, reconnects, time-outs and passwords."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from camera_media import grey_frames, slow_runtime
from camera_senders import RtspCamera, TcpCamera, UdpCamera, nal_units, transport_stream

from mexit.camera.decode import decode_packet
from mexit.camera.frame import Counters, Frame
from mexit.camera.latest_frame import read_in_thread
from mexit.camera.live_stream import Decode, DecoderLag, LiveReader, LiveSettings, stream_options
from mexit.camera.parse_source import Source
from mexit.camera.pipeline import classify_frames
from mexit.camera.prediction import CameraPrediction
from mexit.camera.steady import SteadySettings
from mexit.camera.triggers import TriggerSettings
from mexit.errors import BadInput, MexitError
from mexit.flows.camera import CameraOptions, run_camera

FPS = 100
EVERY_FRAME_RUNS = SteadySettings(trigger=TriggerSettings(reuse=False))
IMPATIENT = LiveSettings(open_timeout_s=5, read_timeout_s=1.5, connect_attempts=3, first_delay_s=0.05)


@pytest.fixture(scope="module")
def chunks() -> list[bytes]:
    return transport_stream(grey_frames(400), FPS)


@pytest.fixture(autouse=True)
def _no_thread_remains() -> Iterator[None]:
    yield
    end_s = time.monotonic() + 10
    while any(thread.name == "mexit-camera" for thread in threading.enumerate()):
        assert time.monotonic() < end_s, "a reader thread is still alive"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TcpCamera, UdpCamera])
def test_the_newest_frame_of_a_fast_stream(kind: type, chunks: list[bytes]) -> None:
    """At 100 frames and at most 10 answers per second, each answer is about one of the frames sent last.

    Without the rule, the last answer would be about frame 24, and 225 frames late. The lag is counted at the
    sender, so it includes what is in socket buffers.
    """
    lags, results = [], []
    counters = Counters()
    with kind(chunks, FPS) as sender:
        answers = classify_frames(
            slow_runtime(0.1), sender.address, live=IMPATIENT, counters=counters, steady=EVERY_FRAME_RUNS
        )
        for _, result in answers:
            assert result.time_s is not None
            lags.append(len(sender.sent) - 1 - round(result.time_s * FPS))
            results.append(result)
            if len(results) == 25:
                break
        answers.close()
    assert max(lags) < 150
    indices = [result.frame_index for result in results]
    assert indices == sorted(set(indices))
    assert [result.dropped for result in results] == [index - i for i, index in enumerate(indices)]
    assert counters.dropped >= results[-1].dropped > 150
    assert counters.undecodable == 0


def test_every_frame_of_a_live_stream_on_request(chunks: list[bytes]) -> None:
    with TcpCamera(chunks, FPS, lives=[60]) as sender:
        answers = classify_frames(slow_runtime(0.02), sender.address, every_frame=True, live=IMPATIENT)
        results = [result for (_, result), _ in zip(answers, range(60), strict=False)]
        answers.close()
    assert [result.frame_index for result in results] == list(range(60))
    assert {result.dropped for result in results} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("stall", [False, True])
def test_a_reconnect(chunks: list[bytes], stall: bool) -> None:
    events: list[str] = []
    counters = Counters()
    results: list[CameraPrediction] = []
    with TcpCamera(chunks, FPS, lives=[50, 400], stall=stall) as sender:
        answers = classify_frames(
            slow_runtime(0.01), sender.address, live=IMPATIENT, counters=counters, on_event=events.append
        )
        for _, result in answers:
            results.append(result)
            if counters.reconnects and len(results) > 60:
                break
        answers.close()
        assert sender.connections == 2
    assert counters.reconnects == 1
    cause = "timed out" if stall else "the stream ended"
    assert f"lost ({cause}); trying again in 0.0" in events[0]
    assert "back after" in events[1]
    assert len(events) == 2
    indices = [result.frame_index for result in results]
    assert indices == sorted(set(indices))


def test_delays_between_attempts_are_bounded(chunks: list[bytes]) -> None:
    settings = LiveSettings(read_timeout_s=1, first_delay_s=0.02, longest_delay_s=0.1, give_up_s=0.6)
    events: list[str] = []
    sender = TcpCamera(chunks, FPS, lives=[30])
    with sender:
        answers = classify_frames(slow_runtime(), sender.address, live=settings, on_event=events.append)
        next(answers)
        sender.over.set()
        sender.unblock()  # the camera is switched off
        with pytest.raises(MexitError, match=r"no picture for \d\.\d s \(Connection refused\); given up"):
            list(answers)
    delays = [float(event.rpartition(" in ")[2].removesuffix(" s")) for event in events]
    assert len(delays) > 2
    assert max(delays) <= 0.1


def test_a_camera_that_is_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    events: list[str] = []
    answers = classify_frames(
        slow_runtime(), f"rtsp://me:geheim@127.0.0.1:{port}/x", live=IMPATIENT, on_event=events.append
    )
    with pytest.raises(MexitError) as error:
        next(answers)
    assert f"rtsp://127.0.0.1:{port}/x: no connection after 3 attempts (Connection refused)" in str(error.value)
    assert len(events) == 2
    assert "no connection yet, attempt 1 (Connection refused); trying again in" in events[0]
    assert "geheim" not in repr(error.value) + str(events)


def test_a_silent_camera_times_out() -> None:
    settings = LiveSettings(open_timeout_s=0.3, connect_attempts=2, first_delay_s=0.01)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(MexitError, match=r"no connection after 2 attempts \(timed out\)"),
    ):
        list(classify_frames(slow_runtime(), f"tcp://127.0.0.1:{server.getsockname()[1]}", live=settings))


def test_audio_alone_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("mp2", rate=48_000, layout="mono")
        for i in range(100):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48_000, i * 1152
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with TcpCamera([buffer.getvalue()], FPS) as sender, pytest.raises(BadInput, match="holds no video stream"):
        list(classify_frames(slow_runtime(), sender.address, live=IMPATIENT))


def live_frames(address: str, settings: LiveSettings, counters: Counters, decode: Decode) -> Iterator[Frame]:
    """The newest frames of a stream with a decoder of the test."""
    stop = threading.Event()
    source = Source("stream", address, address)
    reader = LiveReader(source, settings, counters, stop, lambda _: None, catch_up=True, decode=decode)
    return read_in_thread(reader.frames(), stop, counters, lambda: False, every_frame=False)


def test_a_stream_without_a_decodable_frame_is_given_up(chunks: list[bytes]) -> None:
    settings = LiveSettings(picture_timeout_s=0.3, connect_attempts=2, first_delay_s=0.01)
    with TcpCamera(chunks, FPS) as sender:
        frames = live_frames(sender.address, settings, Counters(), lambda *_: iter(()))
        with pytest.raises(MexitError, match=r"no connection after 2 attempts \(no picture for 0\.3 s\)"):
            next(frames)


def test_closing_closes_the_connection(chunks: list[bytes]) -> None:
    with TcpCamera(chunks, FPS) as sender:
        answers = classify_frames(slow_runtime(), sender.address, live=IMPATIENT)
        next(answers)
        answers.close()
        assert not any(thread.name == "mexit-camera" for thread in threading.enumerate())
        assert sender.closed_by_client.wait(2)


def test_a_stop_request_ends_the_delay_before_an_attempt() -> None:
    """The delay of 5 minutes would exceed the time-out of any test."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start_s = time.monotonic()
    patient = LiveSettings(first_delay_s=300, longest_delay_s=300)
    answers = classify_frames(
        slow_runtime(), f"tcp://127.0.0.1:{port}", live=patient, stopped=lambda: time.monotonic() - start_s > 0.3
    )
    assert list(answers) == []


@pytest.mark.slow
def test_slow_decoding_skips_frames(chunks: list[bytes]) -> None:
    """Decoding takes 25 ms per frame, and a frame comes every 10 ms."""

    def slow_decode(packet: Any, name: str, counters: Counters, captured_s: float) -> Iterator[Frame]:
        time.sleep(0.025)
        yield from decode_packet(packet, name, counters, captured_s)

    settings = LiveSettings(open_timeout_s=5, read_timeout_s=1.5, behind_s=0.3)
    counters = Counters()
    with TcpCamera(chunks, FPS) as sender:
        for frame in live_frames(sender.address, settings, counters, slow_decode):
            assert frame.time_s is not None
            if frame.time_s > 3.5:
                break
    assert counters.skipped > 50
    assert counters.undecodable == 0  # decoding starts again at key frames only


class FakeReads:
    """Reads of a stream on a simulated clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._lag = DecoderLag(behind_s=1.0)

    def read(self, wait_s: float, decode_s: float, is_key: bool = False) -> bool:
        """Read a packet after `wait_s` and decode it in `decode_s` seconds; returns whether it is skipped."""
        requested_s, self.now_s = self.now_s, self.now_s + wait_s
        skips = self._lag.skips(requested_s, self.now_s, is_key)
        self.now_s += 0.0 if skips else decode_s
        return skips


def test_a_reader_that_waits_for_packets_skips_none() -> None:
    reads = FakeReads()
    assert not any(reads.read(0.01, 0.03, is_key=i % 10 == 0) for i in range(500))


def test_a_reader_at_120_frames_per_second_with_short_waits_skips_none() -> None:
    reads = FakeReads()
    assert not any(reads.read(0.004, 0.004) for i in range(2000))


def test_a_reader_that_never_waits_skips_up_to_the_next_wait_and_key_frame() -> None:
    reads = FakeReads()
    assert not any(reads.read(0.0001, 0.05) for _ in range(20))
    assert reads.now_s > 1.0
    assert all(reads.read(0.0001, 0.05) for _ in range(10))
    assert reads.read(0.03, 0.05)  # the reader waited, but this is no key frame
    assert reads.read(0.03, 0.05)
    assert not reads.read(0.03, 0.05, is_key=True)
    assert not reads.read(0.03, 0.05)


def test_a_source_without_waits_still_gives_frames() -> None:
    reads = FakeReads()
    decoded = [not reads.read(0.0001, 0.05, is_key=i % 100 == 0) for i in range(60_000)]
    assert sum(decoded[1000:]) > 20


@pytest.fixture(scope="module")
def units() -> list[list[bytes]]:
    return nal_units(grey_frames(300), FPS)


def test_rtsp_over_tcp_shows_no_password(
    units: list[list[bytes]], digits_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    results: list[CameraPrediction] = []
    with RtspCamera(units, FPS, "admin:geheim") as sender:
        address = f"rtsp://admin:geheim@127.0.0.1:{sender.port}/live"
        report = run_camera(
            digits_bundle,
            address,
            CameraOptions(jsonl=tmp_path / "a.jsonl", limit=10),
            on_result=results.append,
            on_event=events.append,
        )
    assert all("RTP/AVP/TCP" in transport for transport in sender.transports)
    assert report.frames == len(results) == 10
    lines = (tmp_path / "a.jsonl").read_text()
    assert json.loads(lines.splitlines()[0])["source"] == f"rtsp://127.0.0.1:{sender.port}/live"
    assert report.source == f"rtsp://127.0.0.1:{sender.port}/live"
    assert "geheim" not in lines + repr(report) + repr(results) + str(events) + caplog.text


def test_rtsp_with_digest(units: list[list[bytes]]) -> None:
    with RtspCamera(units, FPS, "admin:ge heim", digest=True) as sender:
        address = f"rtsp://admin:ge%20heim@127.0.0.1:{sender.port}/live"
        with closing(classify_frames(slow_runtime(), address, live=IMPATIENT)) as frames:
            assert next(frames)[1].source == f"rtsp://127.0.0.1:{sender.port}/live"
    assert sender.refused == 1  # without a password


def test_a_stream_that_changes_its_size() -> None:
    chunks = [chunk for size in ((48, 64), (96, 64)) for chunk in transport_stream(grey_frames(40, size), FPS)]
    with TcpCamera(chunks, FPS) as sender:
        frames = classify_frames(slow_runtime(), sender.address, live=IMPATIENT)
        with closing(frames):
            shapes = [next(frames)[0].shape]
            while shapes[-1] == (48, 64, 3):
                shapes.append(next(frames)[0].shape)
        assert sender.connections == 1
    assert shapes[-1] == (96, 64, 3)


def test_rtsp_over_udp_where_tcp_is_refused(units: list[list[bytes]]) -> None:
    with RtspCamera(units, FPS, udp=True) as sender:
        frames = classify_frames(slow_runtime(), f"rtsp://127.0.0.1:{sender.port}/live", live=IMPATIENT)
        with closing(frames):
            answers = [next(frames)[1] for _ in range(5)]
    assert ["TCP" in transport for transport in sender.transports] == [True, False]
    assert answers[-1].frame_index >= 4


def test_a_wrong_password_is_not_tried_again(
    units: list[list[bytes]], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with RtspCamera(units, FPS, "admin:right") as sender:
        address = f"rtsp://admin:geheim@127.0.0.1:{sender.port}/live"
        with pytest.raises(MexitError, match=r"401 Unauthorized .*: check the user and the password") as error:
            list(classify_frames(slow_runtime(), address, live=IMPATIENT))
        assert sender.refused == 2  # without a password, and with the wrong one
    output = "".join(capfd.readouterr()) + caplog.text + repr(error.value)
    assert "geheim" not in output
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_losses_are_logged_by_default(chunks: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    with TcpCamera(chunks, FPS, lives=[20, 400]) as sender:
        answers = classify_frames(slow_runtime(), sender.address, live=IMPATIENT)
        for _, result in answers:
            if result.frame_index > 40:
                break
        answers.close()
    assert [record.name for record in caplog.records] == ["mexit.camera"] * 2
    assert "trying again" in caplog.text


def test_rtsp_options() -> None:
    settings = LiveSettings(read_timeout_s=2.5)
    options = stream_options("rtsp://host/x", settings)
    assert (options["rtsp_transport"], options["rtsp_flags"]) == ("tcp+udp", "prefer_tcp")
    assert options["timeout"] == "2500000"
    assert stream_options("rtsps://host/x", settings)["rtsp_transport"] == "tcp"  # UDP would not be encrypted
    assert "rtsp_transport" not in stream_options("udp://@:5000", settings)

"""A rate-limited camera: the newest frame is dropped without tokens; if every frame counts, frames wait."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from camera_media import grey_frames, write_images, write_video

from mexit import Runtime
from mexit.camera.frame import Counters
from mexit.commands.camera import show_camera
from mexit.flows.camera import CameraOptions, run_camera
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.rate_limiter import RateLimit, RateLimiter, RateLimits


def rate_limited(bundle: Path, rate: int, burst: int) -> Runtime:
    opened = Runtime.open(bundle, "full")
    rate_limiter = RateLimiter(opened.bundle.manifest.cumulative_macs, RateLimits(client=RateLimit(rate, burst)))
    return Runtime(opened.bundle, OrtBackend(opened.bundle), "full", rate_limiter=rate_limiter)


@pytest.fixture(scope="module")
def full(digits_bundle: Path) -> int:
    """The cost of the full network, MACs."""
    return Runtime.open(digits_bundle, "full").bundle.manifest.cumulative_macs[-1]


def test_newest_frames_without_tokens_are_dropped(digits_bundle: Path, full: int, tmp_path: Path) -> None:
    """Two seconds of video; the tokens are one image at the start and one per second."""
    video = write_video(tmp_path / "a.mp4", grey_frames(50), [i / 25 for i in range(50)])
    runtime, counters, start_s = rate_limited(digits_bundle, full, full), Counters(), time.monotonic()
    results = [result for _, result in runtime.camera(str(video), every_frame=False, counters=counters)]
    seconds = time.monotonic() - start_s
    assert counters.refused > 0
    assert counters.dropped == counters.refused + counters.replaced
    assert len(results) + counters.dropped == 50
    assert sum(result.macs for result in results) <= full + full * seconds
    assert [result.dropped for result in results] == [result.frame_index - i for i, result in enumerate(results)]
    assert runtime.rate_limiter is not None
    assert runtime.rate_limiter.state().overloaded == counters.refused


def test_frames_wait_if_every_frame_counts(digits_bundle: Path, full: int, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(6)])
    runtime, counters, start_s = rate_limited(digits_bundle, 8 * full, full), Counters(), time.monotonic()
    answers = runtime.camera(str(tmp_path / "images"), counters=counters, receipts=True)
    results = [result for _, result in answers]
    seconds = time.monotonic() - start_s
    macs = sum(result.macs for result in results)
    assert len(results) == 6
    assert counters.dropped == 0
    assert macs <= full + 8 * full * seconds
    assert sum(result.receipt_json()["macs"] for result in results if result.receipt) == macs


def test_a_source_without_tokens_is_not_damaged(digits_bundle: Path, full: int, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.png", "b.png"])
    runtime, counters = rate_limited(digits_bundle, 1, full), Counters()
    client = f"camera {tmp_path / 'images'}"
    runtime.answer_tensor(runtime.prepare(grey_frames(1)), client=client)
    results = list(runtime.camera(str(tmp_path / "images"), deadline_ms=10.0, counters=counters))
    assert (results, counters.refused, counters.undecodable) == ([], 2, 0)


def test_the_report_counts_refused_frames(
    digits_bundle: Path, full: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(12)])
    report = run_camera(
        digits_bundle,
        str(tmp_path / "images"),
        CameraOptions(budget="full", deadline_ms=5.0, rate=full // 100, burst=2 * full),
    )
    assert report.refused > 0
    assert report.refused == report.dropped == 12 - report.frames
    show_camera(report)
    rows = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert {"dropped for newer ones 0", f"dropped by the rate limiter {report.refused}"} <= set(rows)

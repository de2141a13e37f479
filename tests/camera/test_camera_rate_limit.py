"""A rate-limited camera: newest frames are dropped rather than waited for; where every frame counts, they wait."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from camera_media import grey_frames, write_images, write_video

from mexit import Runtime
from mexit.camera.frame import Counters
from mexit.commands.report import show_camera
from mexit.flows.camera import camera
from mexit.runtime.backends.ort import OrtBackend
from mexit.runtime.rate_limiter import RateLimit, RateLimiter, RateLimits


def rate_limited(bundle: Path, rate: int, burst: int) -> Runtime:
    opened = Runtime.open(bundle, "full")
    rate_limiter = RateLimiter(opened.bundle.manifest.cumulative_macs, RateLimits(client=RateLimit(rate, burst)))
    return Runtime(opened.bundle, OrtBackend(opened.bundle), "full", rate_limiter=rate_limiter)


@pytest.fixture(scope="module")
def full(digits_bundle: Path) -> int:
    return Runtime.open(digits_bundle, "full").bundle.manifest.cumulative_macs[-1]


def test_newest_frames_without_tokens_are_dropped_and_counted(
    digits_bundle: Path, full: int, tmp_path: Path
) -> None:
    """Two seconds at 25 frames a second, tokens for one whole image at first and one a second: no delay."""
    video = write_video(tmp_path / "a.mp4", grey_frames(50), [i / 25 for i in range(50)])
    runtime, counters, began = rate_limited(digits_bundle, full, full), Counters(), time.monotonic()
    found = [one for _, one in runtime.camera(str(video), every_frame=False, counters=counters)]
    assert 1.9 < time.monotonic() - began < 8
    assert counters.refused > 10
    assert counters.dropped == counters.refused + counters.replaced
    assert len(found) + counters.dropped == 50
    assert sum(one.macs for one in found) <= full + full * (time.monotonic() - began)
    assert all(one.frame_index == place + one.dropped for place, one in enumerate(found))
    assert max(one.age_ms for one in found) < 1000
    assert runtime.rate_limiter is not None
    assert runtime.rate_limiter.state().overloaded == counters.refused


def test_where_every_frame_counts_frames_wait(digits_bundle: Path, full: int, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(6)])
    runtime, counters, began = rate_limited(digits_bundle, 8 * full, full), Counters(), time.monotonic()
    found = [one for _, one in runtime.camera(str(tmp_path / "images"), counters=counters, receipts=True)]
    assert len(found) == 6
    assert counters.dropped == 0
    assert sum(one.macs for one in found) <= full + 8 * full * (time.monotonic() - began)
    assert sum(one.receipt_json()["macs"] for one in found if one.receipt) == sum(one.macs for one in found)


def test_a_source_of_which_every_frame_was_refused_is_no_damaged_one(
    digits_bundle: Path, full: int, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", ["a.png", "b.png"])
    runtime, counters = rate_limited(digits_bundle, 1, full), Counters()
    client = f"camera {tmp_path / 'images'}"
    runtime.answer_tensor(runtime.prepare(grey_frames(1)), client=client)
    found = list(runtime.camera(str(tmp_path / "images"), deadline_ms=10.0, counters=counters))
    assert (found, counters.refused, counters.undecodable) == ([], 2, 0)


def test_the_flow_reports_what_the_rate_limiter_refused(
    digits_bundle: Path, full: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(12)])
    report = camera(
        digits_bundle,
        source=str(tmp_path / "images"),
        budget="full",
        deadline_ms=5.0,
        rate=full // 100,
        burst=2 * full,
    )
    assert report.refused > 0
    assert report.refused == report.dropped == 12 - report.frames
    show_camera(report)
    rows = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert {"dropped for newer ones 0", f"dropped by the rate limiter {report.refused}"} <= set(rows)

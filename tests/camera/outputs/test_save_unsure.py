"""Pictures of unsure answers: what is saved, how often, and what happens when it cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from camera_media import camera_prediction, file_limit, write_images
from PIL import Image

from mexit.camera.outputs.save_unsure import SaveUnsure
from mexit.camera.prediction import CameraPrediction
from mexit.camera.region import Region
from mexit.flows.camera import CameraOptions, run_camera

START = datetime(2026, 1, 31, 23, 59, 59, 500_000, timezone.utc)


def unsure(i: int, captured_s: float = 0.0) -> CameraPrediction:
    answer = camera_prediction(captured_s=captured_s, label=None, index=None, reason="unsure")
    return replace(answer, frame_index=i, confidence=0.25)


def noise(i: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)


def output(folder: Path, notes: list[str] | None = None, *, live: bool = False, **settings: float) -> SaveUnsure:
    times = iter(START + timedelta(seconds=i) for i in range(1000))
    report = [].append if notes is None else notes.append
    return SaveUnsure(folder, "Front door", live=live, on_event=report, now=lambda: next(times), **settings)


@pytest.mark.parametrize("live", [False, True])
def test_unsure_answers_alone_are_saved(tmp_path: Path, live: bool) -> None:
    saver = output(tmp_path / "new", live=live)
    saver.write(noise(0), camera_prediction())
    assert not (tmp_path / "new").exists()
    saver.write(noise(1), unsure(7))
    assert saver.close() == tmp_path / "new"
    stem = tmp_path / "new" / "20260131T235959.500Z-front_door-00000007"
    assert sorted(stem.parent.iterdir()) == [stem.with_name(stem.name + suffix) for suffix in (".json", ".png")]
    np.testing.assert_array_equal(np.asarray(Image.open(f"{stem}.png")), noise(1))
    answer = json.loads(Path(f"{stem}.json").read_text())
    assert (answer["camera"], answer["label"], answer["reason"]) == ("gate", None, "unsure")
    assert (answer["confidence"], answer["time"]) == (0.25, "2026-01-31T23:59:59.500+00:00")
    assert saver.lost == 0


def test_the_region_is_saved_as_the_network_saw_it(tmp_path: Path) -> None:
    saver = SaveUnsure(tmp_path, "gate", live=False, region=Region(0.5, 0, 0.5, 0.25), on_event=print)
    saver.write(noise(1), unsure(7))
    saver.close()
    [path] = tmp_path.glob("*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), noise(1)[:10, 20:])


def test_a_live_camera_gives_a_picture_per_second(tmp_path: Path) -> None:
    saver = output(tmp_path, live=True, interval_s=1.0)
    for i in range(5):
        saver.write(noise(i), unsure(i, captured_s=i * 0.4))
    saver.close()
    assert [path.stem[-1] for path in sorted(tmp_path.glob("*.png"))] == ["0", "3"]
    assert saver.lost == 0


def test_a_file_gives_every_picture_and_the_quota_removes_the_oldest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    saver = output(tmp_path, quota_mb=0.02)
    for i in range(12):
        saver.write(noise(i), unsure(i))
    saver.close()
    saved = sorted(path.stem[-2:] for path in tmp_path.glob("*.png"))
    assert 2 <= len(saved) <= 4
    assert saved == [f"{i:02}" for i in range(12)][-len(saved) :]
    assert sum(path.stat().st_size for path in tmp_path.glob("2026*")) <= 20_000
    assert (tmp_path / "notes.txt").exists()
    again = output(tmp_path, quota_mb=0.02)
    again.write(noise(12), unsure(12))
    assert sum(path.stat().st_size for path in tmp_path.glob("2026*")) <= 20_000


def test_a_picture_that_cannot_be_written_is_lost_and_reported_once(tmp_path: Path) -> None:
    notes: list[str] = []
    saver = output(tmp_path / "a" / "b", notes)
    (tmp_path / "a").write_text("a file")
    for i in range(3):
        saver.write(noise(i), unsure(i))
    assert (saver.close(), saver.lost) == (None, 3)
    [note] = notes
    assert note.startswith("a picture of an unsure answer is not saved: could not write")


def test_a_picture_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    saver = output(tmp_path)
    with file_limit(2000):  # more than the answer, less than the picture
        saver.write(noise(0), unsure(0))
    assert (saver.close(), saver.lost, list(tmp_path.iterdir())) == (None, 1, [])


def test_a_bundle_that_is_never_unsure_is_reported(digits_bundle: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "frames", ["0.png"])
    notes: list[str] = []
    options = CameraOptions(save_unsure=tmp_path / "unsure")
    report = run_camera(digits_bundle, str(tmp_path / "frames"), options, on_event=notes.append)
    assert any("no picture will be saved, because no answer of this bundle is unsure" in note for note in notes)
    assert report.outputs == ()
    report = run_camera(digits_bundle, str(tmp_path / "frames"), CameraOptions(), on_event=notes.append)
    assert sum("no picture will be saved" in note for note in notes) == 1


def test_a_run_saves_the_pictures_that_it_was_unsure_about(reject_bundle: Path, test_digits, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, pixels in enumerate(test_digits[0][:40]):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    report = run_camera(reject_bundle, str(folder), CameraOptions(save_unsure=tmp_path / "unsure"))
    pictures = sorted((tmp_path / "unsure").glob("*.png"))
    assert len(pictures) == report.unsure > 0
    assert report.outputs == (tmp_path / "unsure",)
    assert report.lost == {}
    for picture in pictures:
        number = int(picture.stem.rpartition("-")[2])
        np.testing.assert_array_equal(np.asarray(Image.open(picture))[..., 0], test_digits[0][number].squeeze())

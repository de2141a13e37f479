"""Settings of outputs, checked before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
from mexit.camera.outputs.open_outputs import FileSettings, open_files, open_messages
from mexit.camera.overlay import Overlay
from mexit.errors import UsageError

OVERLAY = Overlay((1, 2, 3), (250, 600, 1000))


def test_every_setting_opens_its_output_and_writes_nothing(tmp_path: Path) -> None:
    settings = FileSettings(
        out=tmp_path / "a.mp4",
        segment_s=60.0,
        jsonl=tmp_path / "a.jsonl",
        events=tmp_path / "b.jsonl",
        save_unsure=tmp_path / "unsure",
    )
    settings.check()
    outputs = open_files(settings, "gate", OVERLAY, live=True, on_event=print)
    assert [output.name for output in outputs] == ["jsonl", "events", "video", "unsure"]
    assert [output.close() for output in outputs] == [None] * 4
    assert [output.lost for output in outputs] == [0] * 4
    assert list(tmp_path.iterdir()) == []
    assert open_files(FileSettings(), "gate", OVERLAY, live=True, on_event=print) == []


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(UsageError, match="a is a file: --save-unsure expects a folder"):
        FileSettings(save_unsure=tmp_path / "a").check()
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        FileSettings(events=tmp_path).check()


def test_messages() -> None:
    pytest.importorskip("paho.mqtt", reason="needs the extra mqtt")
    outputs = open_messages(
        MqttSettings("mqtt://127.0.0.1:1"), WebhookSettings("http://127.0.0.1:1"), ["gate"], "digits", on_event=print
    )
    assert [output.name for output in outputs] == ["mqtt", "webhook"]
    assert [output.close() for output in outputs] == [None, None]
    assert open_messages(None, None, ["gate"], "digits", on_event=print) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FileSettings(jsonl=Path("a"), events=Path("a")), "--jsonl and --events cannot both be written to a"),
        (FileSettings(segment_s=60.0), "--segment divides the video of --out: add --out NAME.mp4"),
        (FileSettings(out=Path("a.mp4"), out_mb=60.0), "--out-mb removes the oldest segments: add --segment SECONDS"),
        (FileSettings(jsonl_mb=1.0), "--jsonl-mb rotates the files of --jsonl and --events: add one of them"),
    ],
)
def test_settings_that_do_not_fit(settings: FileSettings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings.check()

"""Passwords of addresses are never shown, in whatever way a command fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import av
import pytest
from command_line import program, typed

from mexit.commands import output

ADDRESS = "rtsp://admin:geheim@10.0.0.5/stream"


@pytest.mark.parametrize("error", [av.ConnectionRefusedError, av.TimeoutError, av.PermissionError])
def test_an_error_of_pyav_that_no_code_expected(error: type, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text and its file name hold the address."""
    cause = error(111, "Connection refused", ADDRESS)
    assert "geheim" in str(cause)
    output.system_error(cause)
    output.RichProgress().note(f"lost: {cause}")
    output.error(str(cause))
    shown = capsys.readouterr().err
    assert "geheim" not in shown
    assert shown.count("10.0.0.5") == 3


LINES = (
    "camera {bundle} --source http://admin:geheim@127.0.0.1:9/a.png",
    "camera {bundle} --source http://admin:geheim@127.0.0.1:9/a.mp4 --json",
    "camera {bundle} --source admin:geheim@127.0.0.1:9/a.mp4",
    "run {bundle} http://admin:geheim@127.0.0.1:9/a.png",
    "run {bundle} https://127.0.0.1:9/a.png?user=admin&password=geheim",
    "train --data folder:https://admin:geheim@127.0.0.1/pictures",
    "camera {bundle} rtsp://admin:geheim@127.0.0.1/stream --source 0",
    "camera {bundle} --source 0 --limit rtsp://admin:geheim@127.0.0.1/stream",
    "rtsp://admin:geheim@127.0.0.1/stream",
)


@pytest.mark.parametrize("line", LINES)
def test_commands(line: str, digits_bundle: Path) -> None:
    done = typed(*line.format(bundle=digits_bundle).split())
    assert done.exit_code != 0
    assert done.stderr.strip()
    assert "geheim" not in done.output


def test_a_command_in_a_process_of_its_own(digits_bundle: Path) -> None:
    done = program(*LINES[0].format(bundle=digits_bundle).split())
    assert done.returncode != 0
    assert done.stderr.strip()
    assert "geheim" not in done.stdout + done.stderr


def test_results_and_log(digits_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name of the source in answers, counts and messages."""
    from mexit.camera.live_stream import LiveSettings
    from mexit.camera.pipeline import classify_frames
    from mexit.errors import MexitError

    settings = LiveSettings(open_timeout_s=0.5, connect_attempts=2, first_delay_s=0.01)
    address = "rtsp://admin:geheim@127.0.0.1:9/stream?token=geheim"
    with caplog.at_level(logging.DEBUG), pytest.raises(MexitError, match="no connection after 2 attempts") as error:
        list(classify_frames(lambda *_, **__: [], address, live=settings))
    assert "127.0.0.1:9" in caplog.text
    assert "geheim" not in json.dumps([caplog.text, str(error.value), repr(error.value)])

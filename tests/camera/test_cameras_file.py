"""The file of cameras: what it gives, and errors with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from mexit.camera.cameras_file import CameraSettings, cameras_of_sources, read_cameras_file
from mexit.camera.region import Region
from mexit.camera.steady import SteadySettings
from mexit.camera.triggers import TriggerSettings
from mexit.errors import MexitError, NotFound, UsageError

GATE = """\
[[camera]]
name = "gate"
source = "rtsp://user:secret@10.0.0.5/stream"
"""
EVERYTHING = """\
rate = "500M/s"
burst = 1_000_000
backend = "ort"
threads = 2
cost = "macs"
budget = "medium"

[mqtt]
url = "mqtt://user:password@host:1883"
discovery = "homeassistant"

[webhook]
url = "https://example.com/hook"
events = ["label-changed", "unsure"]
timeout_s = 3
retries = 0

[[camera]]
name = "gate"
source = "rtsp://user:secret@10.0.0.5/stream"
budget = "low"
region = [0, 0.5, 0.5, 0.5]
run = "interval"
interval_s = 1.5
reuse = false
votes = 5
hold = 3
jsonl = "gate.jsonl"

[[camera]]
name = "Front door"
source = "http://10.0.0.6/video"
region = [
    100, 0,
    640, 480,
]
run = "motion"
out = "door.mp4"
segment_s = 600
save_unsure = "unsure"
"""


def written(folder: Path, content: str) -> Path:
    path = folder / "cameras.toml"
    path.write_text(content)
    return path


def test_every_key(tmp_path: Path) -> None:
    file = read_cameras_file(written(tmp_path, EVERYTHING))
    assert (file.rate, file.burst, file.backend, file.threads, file.cost) == ("500M", "1000000", "ort", 2, "macs")
    assert (file.budget, file.profile) == ("medium", None)
    assert file.mqtt is not None
    assert (file.mqtt.url, file.mqtt.topic) == ("mqtt://user:password@host:1883", "mexit")
    assert file.mqtt.discovery == "homeassistant"
    assert file.webhook is not None
    assert (file.webhook.events, file.webhook.timeout_s, file.webhook.retries) == (("label-changed", "unsure"), 3.0, 0)
    gate, door = file.cameras
    assert (gate.name, gate.budget, gate.jsonl) == ("gate", "low", Path("gate.jsonl"))
    trigger = TriggerSettings("interval", interval_s=1.5, reuse=False)
    assert gate.steady == SteadySettings(Region(0, 0.5, 0.5, 0.5), trigger, votes=5, hold=3)
    assert (door.name, door.segment_s) == ("Front door", 600)
    assert door.steady == SteadySettings(Region(100, 0, 640, 480), TriggerSettings("motion"))
    assert (door.out, door.save_unsure, door.budget) == (Path("door.mp4"), Path("unsure"), None)


def test_a_key_that_is_left_out_has_its_default(tmp_path: Path) -> None:
    file = read_cameras_file(written(tmp_path, GATE))
    assert file.cameras == (CameraSettings(name="gate", source="rtsp://user:secret@10.0.0.5/stream"),)
    assert (file.rate, file.mqtt, file.webhook) == (None, None, None)


def test_no_password_in_the_text_of_settings(tmp_path: Path) -> None:
    shown = repr(read_cameras_file(written(tmp_path, EVERYTHING)))
    assert "secret" not in shown
    assert "password" not in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("region = [0, 0, 2]", "4: camera 'gate': region: found [0, 0, 2]; expected [x, y, width, height]"),
        ("region = [0.6, 0, 0.5, 1]", "region: region 0.6,0,0.5,1 ends outside the picture"),
        ("region = [0, 0, 0, 10]", "region: region 0,0,0,10 is empty"),
        ("regoin = [0, 0, 1, 1]", "4: camera 'gate': unknown key 'regoin'; the nearest known one is 'region'"),
        ("qqqq = 1", "4: camera 'gate': unknown key 'qqqq'; expected one of name, source, budget"),
        ("votes = 0", "4: camera 'gate': votes: found 0; expected a whole number of at least 1"),
        ("votes = true", "votes: found True; expected a whole number"),
        ("interval_s = -1", "interval_s: found -1; expected a number above 0"),
        ("interval_s = nan", "interval_s: found nan; expected a number above 0"),
        ("motion = 2", "motion: found 2; expected a share from 0 to below 1"),
        ("motion = 1.0", "4: camera 'gate': motion: found 1.0; expected a share from 0 to below 1"),
        ("interval_s = " + "9" * 400, "and at most 1000000000"),
        ("region = [" + "9" * 400 + ", 0, 1, 1]", "4: camera 'gate': region: found [999"),
        ("interval_s = " + "9" * 5000, ": no valid TOML: Exceeds the limit"),
        ("votes = " + "9" * 30, "expected a whole number of at least 1 and at most 10000"),
        ("jsonl = '~no-such-user/a'", "4: camera 'gate': jsonl: found '~no-such-user/a'; expected a path that this"),
        ("jsonl = 'loop'", "4: camera 'gate': jsonl: found 'loop'; expected a path that this system can use"),
        ('jsonl = "a\\u0000b"', "expected a path that this system can use"),
        ("jsonl = '" + "a" * 5000 + "'", "expected a path that this system can use"),
        ("[[camera]]\nname = '..'\nsource = 'rtsp://h/s'", "5: camera '..': name: found '..'; expected 1 to 64"),
        ("[mqtt]\nurl = 'mqtt://u:secret@h'\ntopic = 'a/#'", "6: mqtt: topic: 'a/#' is no topic to publish to"),
        ("[mqtt]\nurl = 'mqtt://u:secret@h'\ndiscovery = '+'", "6: mqtt: discovery: '+' is no topic"),
        ("[mqtt]\nurl = 'mqtt://u:secret@h/a'", "5: mqtt: url: the address of the MQTT broker is not complete"),
        (
            "[[camera]]\nname = 'Gate'\nsource = 'rtsp://h/s'\n[mqtt]\nurl = 'mqtt://h'",
            "5: name: cameras 'gate' and 'Gate' have the same name in topics and files, gate: rename one",
        ),
        ("[webhook]\nurl = 'http://h'\ntimeout_s = 1e7", "6: webhook: timeout_s: found 10000000.0; expected"),
        ("reuse = 1", "reuse: found 1; expected true or false"),
        ("run = 'always'", "run: found 'always'; expected one of every-frame, motion, interval"),
        ("budget = 'lowest'", "budget: 'lowest' is not a budget"),
        ("out = 'a.avi'", "out: found 'a.avi'; expected a path that ends in .mp4"),
        ("jsonl = ''", "jsonl: found ''; expected a text in quotes"),
        ("segment_s = 5", "4: camera 'gate': segment_s: there is no out; expected both or none"),
        ("jsonl = '.'", "4: camera 'gate': jsonl: . is no file; expected a file"),
        ("a b = 1", "4: no valid TOML: Expected '=' after a key in a key/value pair"),
        ("votes = 3\nvotes = 4", "5: no valid TOML: Cannot overwrite a value"),
        ("jsonl = 'open", ": no valid TOML: Expected"),
        ("\n[[camera]]\nname = 'gate'\nsource = 'rtsp://h/s'", "6: camera 'gate': name: another camera has it"),
        ("[[camera]]\nsource = 'rtsp://h/s'", "4: camera 2: name is missing"),
        ("[[camera]]\nname = 'a/b'\nsource = 'rtsp://h/s'", "5: camera 'a/b': name: found 'a/b'; expected 1 to 64"),
        ("[[camera]]\nname = 'b'", "4: camera 'b': source is missing"),
        ("[[camera]]\nname = 'b'\nsource = 'absent.mp4'", "6: camera 'b': source: source absent.mp4 does not exist"),
        ("[[camera]]\nname = 'b'\nsource = 'gopher://h'", "6: camera 'b': source: 'gopher://h' is no source"),
        ("[mqtt]\nurl = 'https://host'", "5: mqtt: url: no address; expected mqtt://HOST or mqtts://HOST"),
        ("[mqtt]\ntopic = 'a'", "4: mqtt: url is missing"),
        ("[webhook]\nurl = 'http://h'\nevents = ['click']", "6: webhook: events: found 'click'; expected one"),
        ("[webhook]\nurl = 'http://h:port'", "5: webhook: url: no address; expected http://HOST or https://HOST"),
        ("[webhok]\nurl = 'http://h'", "4: unknown key 'webhok'; the nearest known one is 'webhook'"),
        (
            "jsonl = 'a'\n[[camera]]\nname = 'b'\nsource = 'rtsp://h/s'\njsonl = './a'",
            "8: camera 'b': jsonl: a is also an output of camera 'gate'; expected another path",
        ),
        (
            "jsonl = 'a'\njsonl_mb = 1\n[[camera]]\nname = 'b'\nsource = 'rtsp://h/s'\njsonl = './a.12'",
            "9: camera 'b': jsonl: a.12 is a name of rotated lines of camera 'gate'; expected another path",
        ),
    ],
)
def test_an_error_names_file_line_and_key(tmp_path: Path, change: str, message: str) -> None:
    (Path.cwd() / "loop").symlink_to("loop")
    path = written(tmp_path, GATE + change + "\n")
    with pytest.raises(MexitError) as caught:
        read_cameras_file(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:")
    assert message in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rate = 'fast'\n" + GATE, "1: rate: found 'fast'; expected a number of MACs such as 800k, 40M/s"),
        ("\n# rates\nrate = '5M'\nthreads = 'two'\n" + GATE, "4: threads: found 'two'; expected a whole number"),
        ("cost = 'money'\n" + GATE, "1: cost: found 'money'; expected one of time, macs"),
        ("rate = '5M'\n", "1: no camera; expected at least one table [[camera]]"),
        ("camera = 1\n", "1: no camera; expected at least one table [[camera]]"),
        ("a = " + "[" * 5000 + "]" * 5000 + "\n" + GATE, ": no valid TOML: "),
        ("mqtt = 1\n" + GATE, "1: mqtt: found a value; expected a table [mqtt]"),
        ("mqtt.url = 'nowhere'\n" + GATE, "1: mqtt: url: no address"),
        ("camera = [{ name = 'a', source = '' }]\n", "1: camera 'a': source: found ''; expected a text in quotes"),
    ],
)
def test_an_error_outside_a_camera(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_cameras_file(written(tmp_path, content))
    assert message in str(caught.value)


def test_an_error_shows_no_password(tmp_path: Path) -> None:
    for source in ("gopher://user:secret@host/", "rtsp:/user:secret@host", "rtsp://user:secret@"):
        with pytest.raises(MexitError) as caught:
            read_cameras_file(written(tmp_path, f"[[camera]]\nname = 'a'\nsource = '{source}'\n"))
        assert "secret" not in str(caught.value)
    with pytest.raises(UsageError) as url_error:
        read_cameras_file(written(tmp_path, GATE + "[mqtt]\nurl = 'user:secret@host'\n"))
    assert "secret" not in str(url_error.value)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"absent\.toml does not exist"):
        read_cameras_file(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="has more than 1000000 bytes"):
        read_cameras_file(Path("/dev/zero"))
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"a\.toml cannot be read: it is not UTF-8"):
        read_cameras_file(tmp_path / "a.toml")


def test_the_mark_and_the_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(("\ufeff" + GATE.replace("\n", "\r\n")).encode())
    assert [camera.name for camera in read_cameras_file(path).cameras] == ["gate"]
    path.write_bytes(("\ufeff" + GATE.replace("\n", "\r\n") + "votes = 0\r\n").encode())
    with pytest.raises(UsageError, match=r":4: camera 'gate': votes"):
        read_cameras_file(path)


def test_the_source_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    content = "[[camera]]\nname = 'a'\nsource = 'a.mp4'\nout = './a.mp4'\n"
    with pytest.raises(UsageError, match=r":4: camera 'a': out: a\.mp4 is the source; expected another file"):
        read_cameras_file(written(tmp_path, content))


def test_sources_name_their_cameras(tmp_path: Path) -> None:
    sources = ["rtsp://user:secret@10.0.0.5:554/a", "rtsp://10.0.0.5:554/a", "rtsp://10.0.0.5:554/b"]
    cameras = cameras_of_sources(sources, deadline_ms=5.0)
    assert [camera.name for camera in cameras] == ["10.0.0.5-554-a", "10.0.0.5-554-a 2", "10.0.0.5-554-b"]
    assert [camera.source for camera in cameras] == sources
    assert all(camera.deadline_ms == 5.0 for camera in cameras)
    with pytest.raises(NotFound):
        cameras_of_sources(["absent.mp4"])

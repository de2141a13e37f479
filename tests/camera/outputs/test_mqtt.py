"""MQTT: addresses, messages that never wait, and a real broker that is stopped, killed and refuses passwords."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from broker import Broker, needs_broker, subscribed, wait_until  # skips without paho-mqtt
from camera_media import camera_prediction, grey_frames
from web_server import certificate_file

from mexit.camera.events import CameraEvent
from mexit.camera.outputs.background_sender import QUEUE_SIZE
from mexit.camera.outputs.message_settings import MqttSettings
from mexit.camera.outputs.mqtt import Mqtt
from mexit.camera.outputs.mqtt_address import parse_broker
from mexit.core.redact import redact_text
from mexit.errors import UsageError

FRAME = grey_frames(1)[0]
LOST = CameraEvent("gate", "camera-lost", 1.0, None, "zero", 0.0)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.kill()


def connect(broker: Broker, notes: list[str] | None = None, **changes: object) -> Mqtt:
    settings = MqttSettings(f"mqtt://127.0.0.1:{broker.port}", interval_s=0.0)
    return Mqtt(
        replace(settings, **changes), ["gate", "hall"], "digits", on_event=[].append if notes is None else notes.append
    )


def test_addresses() -> None:
    address = parse_broker("mqtts://me:p%40ss%2F@[fe80::1]")
    assert (address.host, address.port, address.tls) == ("fe80::1", 8883, True)
    assert (address.user, address.password) == ("me", "p@ss/")
    assert address.name == "mqtts://[fe80::1]:8883"
    assert parse_broker("mqtt://host/").port == 1883


@pytest.mark.parametrize(
    "url",
    ["secret", "http://a:secret@b", "mqtt://", "mqtt://a:secret@b/t", "mqtt://a:secret@b:x", "mqtt://a:se/cret@b"],
)
def test_a_bad_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError, match="expected mqtt://HOST:1883") as caught:
        parse_broker(url)
    assert "cret" not in str(caught.value)
    assert redact_text(str(caught.value)) == str(caught.value)  # what a terminal shows is all of it


@pytest.mark.parametrize("topic", ["a/+/b", "#", "/a", "a/", "$SYS", "", "a\nb", "a" * 70_000])
def test_a_bad_topic_is_refused(topic: str) -> None:
    with pytest.raises(UsageError, match="topic"):
        Mqtt(MqttSettings("mqtt://127.0.0.1:1", topic), ["gate"], "digits", on_event=print)


def test_settings_are_shown_without_the_password() -> None:
    assert "secret" not in repr(MqttSettings("mqtt://me:secret@host"))
    assert "secret" not in repr(parse_broker("mqtt://me:secret@host"))


def test_a_broker_that_never_answers_holds_up_nothing_and_losses_are_counted() -> None:
    """It accepts connections and says nothing; a test that waits for it would not end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = MqttSettings(f"mqtt://127.0.0.1:{server.getsockname()[1]}", discovery="", interval_s=0.0)
        output = Mqtt(settings, ["gate"], "digits", on_event=print)
        for i in range(2 * QUEUE_SIZE):
            output.write(FRAME, camera_prediction(i / 10))
            output.event(LOST)
        # Two states and one message in delivery have their places; newer states replace waiting ones.
        assert QUEUE_SIZE <= output.lost <= QUEUE_SIZE + 4
        output.close()
        assert 2 * QUEUE_SIZE <= output.lost <= 2 * QUEUE_SIZE + 4
        assert not output.connected


def test_a_program_ends_while_the_broker_never_answers() -> None:
    """The encrypted connection is being made when the program ends."""
    script = (
        "import sys, time\n"
        "from mexit.camera.outputs.message_settings import MqttSettings\n"
        "from mexit.camera.outputs.mqtt import Mqtt\n"
        "output = Mqtt(MqttSettings(sys.argv[1]), ['gate'], 'digits', on_event=print)\n"
        "sys.stdin.readline()\n"
        "output.close()\n"
        "print('closed', flush=True)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"mqtts://127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", script, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        connection, _ = server.accept()
        connection.recv(1)  # of the client's greeting
        output, _ = process.communicate("\n", timeout=10)  # the client's own time-out is 15 s
        connection.close()
    assert (output, process.returncode) == ("closed\n", 0)


@pytest.mark.long
@needs_broker
def test_states_are_retained_and_events_are_not(broker: Broker) -> None:
    output = connect(broker)
    wait_until(lambda: output.connected)  # so that the event is the last message
    with subscribed(broker) as early:
        output.write(FRAME, camera_prediction(0.0, label="größer"))
        output.event(CameraEvent("gate", "label-changed", 12.5, "größer", None, 0.0))
        wait_until(lambda: early.texts("mexit/gate/event"))
        [event] = map(json.loads, early.texts("mexit/gate/event"))
        assert event == {
            "event_type": "label-changed",
            "camera": "gate",
            "kind": "label-changed",
            "time_s": 12.5,
            "label": "größer",
            "previous": None,
            "seconds": 0.0,
        }
        with subscribed(broker) as late:
            wait_until(lambda: len(late.messages) >= 2 * 8 + 3)  # discovery, state and two times the status
            assert json.loads(late.texts("mexit/gate/state")[-1])["label"] == "größer"
            assert late.texts("mexit/gate/status") == ["online"]
            assert late.texts("mexit/gate/event") == []
            assert len([topic for topic, _, _ in late.messages if topic.startswith("homeassistant/")]) == 2 * 8
            assert all(retained for _, _, retained in late.messages)
        output.close()
        early.wait_for("mexit/status", "offline")
    assert output.lost == 0


@pytest.mark.long
@needs_broker
def test_an_unchanged_label_is_published_once_per_interval(broker: Broker) -> None:
    output = connect(broker, interval_s=3600.0)
    wait_until(lambda: output.connected)
    with subscribed(broker) as subscriber:
        for i, label in enumerate(["zero", "zero", "zero", None, None, "one", "one", "zero"]):
            output.write(FRAME, camera_prediction(0.0, label=label))
            output.event(replace(LOST, kind="unsure"))
            wait_until(lambda i=i: len(subscriber.texts("mexit/gate/event")) == i + 1)  # comes after the state
        labels = [json.loads(text)["label"] for text in subscriber.texts("mexit/gate/state")]
    output.close()
    assert labels == ["zero", None, "one", "zero"]


@pytest.mark.long
@needs_broker
def test_the_broker_says_when_the_program_is_lost(broker: Broker) -> None:
    script = (
        "import sys, time\n"
        "from mexit.camera.outputs.message_settings import MqttSettings\n"
        "from mexit.camera.outputs.mqtt import Mqtt\n"
        "Mqtt(MqttSettings(sys.argv[1]), ['gate'], 'digits', on_event=print)\n"
        "time.sleep(60)\n"
    )
    with subscribed(broker) as subscriber:
        process = subprocess.Popen([sys.executable, "-c", script, f"mqtt://127.0.0.1:{broker.port}"])
        subscriber.wait_for("mexit/status", "online")
        process.kill()
        process.wait()
        subscriber.wait_for("mexit/status", "offline")


@pytest.mark.long
@needs_broker
def test_a_broker_that_was_restarted_gets_everything_again(broker: Broker) -> None:
    notes: list[str] = []
    output = connect(broker, notes)
    output.write(FRAME, camera_prediction(0.0))
    with subscribed(broker) as subscriber:
        wait_until(lambda: subscriber.texts("mexit/gate/state") and subscriber.texts("mexit/status"))
        wait_until(lambda: len([topic for topic, _, _ in subscriber.messages if "homeassistant/" in topic]) >= 2 * 8)
    broker.kill()
    wait_until(lambda: not output.connected)
    output.event(LOST)  # waits
    broker.start()
    with subscribed(broker) as subscriber:
        subscriber.wait_for("mexit/status", "online")
        subscriber.wait_for("mexit/gate/status", "lost")
        wait_until(lambda: subscriber.texts("mexit/gate/event") and subscriber.texts("mexit/gate/state"))
        wait_until(lambda: len([topic for topic, _, _ in subscriber.messages if "homeassistant/" in topic]) >= 2 * 8)
    output.close()
    assert output.lost == 0
    assert notes[0] == f"mqtt://127.0.0.1:{broker.port} is connected"
    assert any("is tried again" in note for note in notes)


@pytest.mark.long
@needs_broker
def test_a_stopped_broker_delays_no_camera_and_gets_what_waited(broker: Broker) -> None:
    output = connect(broker)
    wait_until(lambda: output.connected)
    with subscribed(broker) as subscriber:
        subscriber.wait_for("mexit/status", "online")
        wait_until(lambda: len([topic for topic, _, _ in subscriber.messages if "homeassistant/" in topic]) >= 2 * 8)
        broker.pause()
        events = [replace(LOST, kind="unsure", time_s=float(i)) for i in range(QUEUE_SIZE + 500)]
        for event in events:
            output.event(event)
        assert 499 <= output.lost <= 500  # one is being delivered
        broker.resume()
        kept = len(events) - output.lost
        wait_until(lambda: len(set(subscriber.texts("mexit/gate/event"))) == kept)
        last = json.loads(subscriber.texts("mexit/gate/event")[-1])
        assert last["time_s"] == len(events) - 1
    output.close()


@pytest.mark.long
@needs_broker
def test_a_wrong_password_is_reported_without_it(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    passwords.chmod(0o644)
    broker = Broker(tmp_path, f"password_file {passwords}")
    broker.start()
    notes: list[str] = []
    refused = threading.Event()
    output = Mqtt(
        MqttSettings(f"mqtt://me:secret@127.0.0.1:{broker.port}"),
        ["gate"],
        "digits",
        on_event=lambda note: (notes.append(note), refused.set()),
    )
    assert refused.wait(60)
    output.close()
    broker.kill()
    assert "refuses the connection" in notes[0]
    assert notes[0].endswith("check the user and the password")
    assert "secret" not in " ".join(notes)


@pytest.mark.long
@needs_broker
def test_a_certificate_has_to_be_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = certificate_file(tmp_path)
    broker = Broker(tmp_path, f"certfile {certificate}", f"keyfile {certificate}")
    broker.start()
    notes: list[str] = []
    settings = MqttSettings(f"mqtts://127.0.0.1:{broker.port}")
    output = Mqtt(settings, ["gate"], "digits", on_event=notes.append)
    wait_until(lambda: notes)
    assert not output.connected
    output.close()
    [note] = notes
    assert note.startswith(f"mqtts://127.0.0.1:{broker.port} cannot be reached and is tried again: its certificate is")
    assert note.endswith("name a file with it in the variable SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    output = Mqtt(settings, ["gate"], "digits", on_event=notes.append)
    wait_until(lambda: output.connected)
    output.close()
    broker.kill()
    assert output.lost == 0

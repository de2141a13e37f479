"""A live camera while its broker stops and its webhook blocks for a minute: no frame is delayed, losses are counted."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from broker import Broker, needs_broker, subscribed, wait_until  # skips without paho-mqtt
from PIL import Image
from web_server import Reply, web_server

from mexit.camera.outputs.message_settings import MqttSettings, WebhookSettings
from mexit.camera.prediction import CameraPrediction
from mexit.flows.camera import CameraOptions, run_camera

FPS = 10
STOPPED_S = 60.0
MOST_AGE_S = 2.0  # the webhook would delay frames by 5 s, the broker by a minute


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.kron(pixels.squeeze(), np.ones((8, 8), np.uint8))).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


@pytest.mark.long
@needs_broker
def test_no_frame_is_delayed(digits_bundle: Path, test_digits, tmp_path: Path) -> None:
    images, labels = test_digits
    one, two = (jpeg(images[np.flatnonzero(labels == label)[0]]) for label in (0, 1))
    pictures = [one] * (2 * FPS) + [two] * (2 * FPS)  # the label changes every two seconds
    answering = threading.Event()
    accepted: list[str] = []

    def camera_and_webhook(reply: Reply) -> None:
        if reply.command == "GET":
            reply.give_mjpeg(pictures, 1 / FPS)
        elif answering.is_set():
            reply.give()
            accepted.append(json.loads(reply.body)["id"])
        else:
            answering.wait(2 * STOPPED_S)
            reply.connection.close()

    broker = Broker(tmp_path)
    broker.start()
    broker.pause()
    resume = threading.Timer(STOPPED_S, lambda: (broker.resume(), answering.set()))
    results: list[CameraPrediction] = []
    with web_server(camera_and_webhook) as server:
        options = CameraOptions(
            limit=int(FPS * (STOPPED_S + 15)),
            events=tmp_path / "events.jsonl",
            mqtt=MqttSettings(f"mqtt://127.0.0.1:{broker.port}", interval_s=1.0),
            webhook=WebhookSettings(f"{server.url}/hook", timeout_s=5.0, retries=1),
        )
        resume.start()
        report = run_camera(digits_bundle, f"{server.url}/camera", options, on_result=results.append)
    with subscribed(broker) as subscriber:
        wait_until(lambda: subscriber.texts("mexit/status") and len(subscriber.messages) >= 8)
        states = [json.loads(text) for topic, text, _ in subscriber.messages if topic.endswith("/state")]
        assert subscriber.texts("mexit/status") == ["offline"]
    broker.kill()
    assert max(result.age_ms for result in results) < 1e3 * MOST_AGE_S
    indices = np.array([result.frame_index for result in results])
    assert np.diff(indices).max() < FPS * MOST_AGE_S  # the camera sends while a receiver holds up the answers
    last = results[-1]
    assert report.frames + last.dropped + report.undecodable == last.frame_index + 1
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(events) > STOPPED_S / 4
    assert len(set(accepted)) + report.lost["webhook"] == len(events)
    assert len(accepted) > 0
    assert report.lost["webhook"] >= 4
    assert "mqtt" not in report.lost  # a thousand messages wait for an hour at this rate
    assert last.frame_index - states[-1]["frame_index"] <= 2 * FPS

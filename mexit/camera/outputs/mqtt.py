"""Publishes answers and events of cameras to an MQTT broker, with discovery by Home Assistant.

States are retained, so a program that subscribes later gets the newest one. The broker marks the program as offline
when it is lost (last will). Messages have quality of service 1: one counts as delivered once the broker has
acknowledged it, and is sent again after a lost connection.

The client is paho-mqtt, whose network thread is a daemon. Clients for asyncio connect in a thread that Python waits for
at its end, so a broker that accepts connections and never answers would hold up the end of the program.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mexit.camera.events import CameraEvent
from mexit.camera.frame import RGB, OnEvent
from mexit.camera.outputs.background_sender import BackgroundSender
from mexit.camera.outputs.home_assistant import discovery_messages
from mexit.camera.outputs.message_settings import MqttSettings
from mexit.camera.outputs.mqtt_address import check_topic, parse_broker
from mexit.camera.outputs.mqtt_messages import OFFLINE, ONLINE, Topics, state_message
from mexit.camera.outputs.output_names import camera_slugs
from mexit.camera.prediction import CameraPrediction
from mexit.camera.web import network_reason, tls_context
from mexit.core.printable import json_text
from mexit.errors import UsageError, requires_extra

with requires_extra("mqtt", "Publishing to an MQTT broker"):
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

_KEEP_ALIVE_S = 15  # the broker reports a lost program after 1.5 times as long
_MAX_RETRY_S = 30
_POLL_S = 0.1
_CAMERA_STATES = {"camera-lost": "lost", "camera-frozen": "frozen", "camera-back": ONLINE}


@dataclass(frozen=True)
class Message:
    """One message: its topic, its content and whether the broker keeps it for later subscribers."""

    topic: str
    content: str
    retain: bool


class Mqtt:
    """Publishes states and events of several cameras over one connection, in threads of its own.

    Topics below `MqttSettings.topic`: `status` (online, offline), `CAMERA/status` (online, lost, frozen),
    `CAMERA/state` (JSON, retained) and `CAMERA/event` (JSON, not retained).
    """

    name = "mqtt"

    def __init__(self, settings: MqttSettings, cameras: Sequence[str], model: str, *, on_event: OnEvent) -> None:
        """Start to connect; a broker that cannot be reached is tried again until `close`.

        Args:
            settings: address and topics.
            cameras: names of all cameras.
            model: name of the bundle, shown by Home Assistant.
            on_event: called in another thread with a message when the connection is made, refused or lost.

        Raises:
            UsageError: the address or a topic is not valid, or two cameras have the same name in topics.
        """
        self._address = parse_broker(settings.url)
        for topic in (settings.topic, settings.discovery):
            check_topic(topic)
        if not settings.topic:
            raise UsageError("the topic is empty: write a word such as mexit")
        self._interval_s, self._on_event = settings.interval_s, on_event
        self._topics = {name: Topics(settings.topic, slug) for name, slug in camera_slugs(cameras).items()}
        self._status = f"{settings.topic}/status"
        self._sent: dict[str, tuple[float, str | None]] = {}  # time and label of each camera's last state
        self._camera_states: dict[str, str] = {}
        self._retained: dict[str, Message] = {}
        self._changed = threading.Condition()  # guards `_retained`, `_acknowledged` and `_connected`
        self._acknowledged: set[int] = set()
        self._connected = False
        self._last_note = ""
        self._sender: BackgroundSender[Message] = BackgroundSender("mexit-mqtt", self._deliver)
        if settings.discovery:
            for name, topics in self._topics.items():
                for topic, content in discovery_messages(settings.discovery, topics, name, model).items():
                    self._retain(topic, json_text(content, ascii_only=False))
        self._retain(self._status, ONLINE)
        self._client = self._new_client()
        self._client.connect_async(self._address.host, self._address.port, _KEEP_ALIVE_S)
        self._client.loop_start()

    @property
    def lost(self) -> int:
        """Messages that the broker did not get."""
        return self._sender.lost

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection."""
        return self._connected

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Publish the answer as the camera's state if its steady label changed or the interval is over."""
        del frame
        camera, now_s = prediction.camera, time.monotonic()
        if self._camera_states.get(camera) not in (ONLINE, "frozen"):
            self._set_camera_state(camera, ONLINE)
        last_s, last_label = self._sent.get(camera, (float("-inf"), None))
        if prediction.steady == last_label and now_s - last_s < self._interval_s:
            return
        self._sent[camera] = (now_s, prediction.steady)
        self._retain(self._topics[camera].state, json_text(state_message(prediction), ascii_only=False))

    def event(self, event: CameraEvent) -> None:
        """Publish the event, and the state of the camera if it is lost, frozen or back."""
        if event.kind in _CAMERA_STATES:
            self._set_camera_state(event.camera, _CAMERA_STATES[event.kind])
        content = json_text({"event_type": event.kind, **event.to_json()}, ascii_only=False)
        self._sender.put(Message(self._topics[event.camera].event, content, retain=False))

    def close(self) -> Path | None:
        """Publish that the program is offline, and disconnect; what cannot be delivered at once is lost."""
        self._retain(self._status, OFFLINE)
        self._sender.close()
        self._client.disconnect()  # its thread ends by itself; a connection that is being made would hold up a join
        return None

    def _set_camera_state(self, camera: str, state: str) -> None:
        self._camera_states[camera] = state
        self._retain(self._topics[camera].camera, state)

    def _retain(self, topic: str, content: str) -> None:
        message = Message(topic, content, retain=True)
        with self._changed:  # also while it is put, so that no older one takes its place
            self._retained[topic] = message
            self._sender.put(message, key=topic)

    def _new_client(self) -> Client:
        address = self._address
        # With the same name for each connection, the broker ends the old one, and its will, before it accepts the next.
        client = Client(CallbackAPIVersion.VERSION2, client_id=f"mexit-{uuid.uuid4().hex[:12]}")
        client.username_pw_set(address.user, address.password)
        if address.tls:
            client.tls_set_context(tls_context(insecure=False))
        client.will_set(self._status, OFFLINE, qos=1, retain=True)
        client.reconnect_delay_set(1, _MAX_RETRY_S)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        return client

    def _deliver(self, message: Message) -> bool:
        """Publish a message and wait for the broker's acknowledgement, over several connections if need be."""
        while not self._connected:
            if self._sender.stopping.wait(_POLL_S):
                return False
        info = self._client.publish(message.topic, message.content, qos=1, retain=message.retain)
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            return False  # without a connection the client sends it after the next one is made
        with self._changed:
            while info.mid not in self._acknowledged:
                self._changed.wait(_POLL_S)
                if self._sender.stopping.is_set():
                    return info.mid in self._acknowledged
            self._acknowledged.remove(info.mid)
        return True

    def _on_publish(self, client: Any, userdata: Any, mid: int, *_: Any) -> None:
        del client, userdata
        with self._changed:
            self._acknowledged.add(mid)
            self._changed.notify_all()

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: Any, *_: Any) -> None:
        """Publish all retained messages again, since a broker may have lost them and its will has set `offline`."""
        del client, userdata, flags
        if reason.is_failure:
            hint = ": check the user and the password" if "uthor" in str(reason) or "user name" in str(reason) else ""
            self._note(f"{self._address.name} refuses the connection ({reason}){hint}")
            return
        with self._changed:
            self._connected = True
            for message in self._retained.values():
                self._sender.put(message, key=message.topic)
        self._note(f"{self._address.name} is connected")

    def _on_connect_fail(self, client: Any, userdata: Any) -> None:
        del client, userdata
        error = sys.exc_info()[1]  # paho-mqtt calls this while it handles the error
        self._note(
            f"{self._address.name} cannot be reached and is tried again: {network_reason(error or 'no connection')}"
        )

    def _on_disconnect(self, client: Any, userdata: Any, flags: Any, reason: Any, *_: Any) -> None:
        del client, userdata, flags
        if self._connected and reason.is_failure:
            self._note(f"{self._address.name} is lost and is tried again")
        self._connected = False

    def _note(self, text: str) -> None:
        """Report a change of the connection, but no attempt that fails like the one before."""
        if text != self._last_note:
            self._last_note = text
            self._on_event(text)

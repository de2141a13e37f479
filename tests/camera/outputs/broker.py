"""A real MQTT broker (mosquitto) for tests, and a subscriber that keeps what it receives."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

mqtt = pytest.importorskip("paho.mqtt.client", reason="needs the extra mqtt")
MOSQUITTO = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")
needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto: apt-get install mosquitto")
PATIENCE_S = 60.0


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition; fail after a minute."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true"
        time.sleep(0.01)


class Broker:
    """A mosquitto process, started with `start`; one started again has forgotten everything."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        anonymous = not any(setting.startswith("password_file") for setting in settings)
        # As another user, which root becomes without this, it could not read files of the test.
        lines = ["user root", f"listener {self.port} 127.0.0.1", f"allow_anonymous {str(anonymous).lower()}", *settings]
        self._config.write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        self._process = subprocess.Popen([MOSQUITTO, "-c", self._config], stderr=subprocess.DEVNULL)
        wait_until(self._accepts)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop the process; connections stay open and get no answer."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a stopped process go on."""
        self._process.send_signal(signal.SIGCONT)

    def _accepts(self) -> bool:
        assert self._process.poll() is None, "mosquitto ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


class Subscriber:
    """Collects all messages: topic, text, and whether it was retained before the subscription."""

    def __init__(self, port: int) -> None:
        self.messages: list[tuple[str, str, bool]] = []
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_message = lambda _, __, message: self.messages.append(
            (message.topic, message.payload.decode(), message.retain)
        )
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def texts(self, topic: str) -> list[str]:
        """The texts of a topic, in order."""
        return [text for name, text, _ in self.messages if name == topic]

    def wait_for(self, topic: str, text: str) -> None:
        """Wait until the last text of a topic is this one."""
        wait_until(lambda: self.texts(topic)[-1:] == [text])

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def subscribed(broker: Broker) -> Iterator[Subscriber]:
    """A subscriber to everything."""
    subscriber = Subscriber(broker.port)
    try:
        yield subscriber
    finally:
        subscriber.close()

"""Without paho-mqtt, publishing names the extra, and everything else works."""

from __future__ import annotations

import sys

import pytest

from mexit.camera.outputs.message_settings import MqttSettings
from mexit.camera.outputs.open_outputs import open_messages
from mexit.errors import MissingExtra


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("paho") or name == "mexit.camera.outputs.mqtt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "paho", None)
    with pytest.raises(MissingExtra, match=r"MQTT broker needs the package .*pip install 'mexit\[mqtt\]'"):
        open_messages(MqttSettings("mqtt://127.0.0.1"), None, ["gate"], "digits", on_event=print)

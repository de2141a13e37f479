"""Messages to Home Assistant: valid by the models of ha-mqtt-discoverable, and templates that show the state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from camera_media import camera_prediction

from mexit.camera.outputs.home_assistant import discovery_messages
from mexit.camera.outputs.mqtt_messages import Topics, state_message

models = pytest.importorskip("ha_mqtt_discoverable", reason="needs ha-mqtt-discoverable")
sensors = pytest.importorskip("ha_mqtt_discoverable.sensors", reason="needs ha-mqtt-discoverable")
jinja2 = pytest.importorskip("jinja2", reason="needs jinja2")

# Fields of the documentation that the models lack: https://www.home-assistant.io/integrations/mqtt/
BEYOND_THE_MODELS = {
    "sensor": {"state_topic", "availability", "availability_mode", "origin"},
    "binary_sensor": {"state_topic", "availability", "availability_mode", "origin", "value_template"},
    "event": {"state_topic", "availability", "origin", "event_types"},
}
MODELS = {"sensor": sensors.SensorInfo, "binary_sensor": sensors.BinarySensorInfo, "event": models.EntityInfo}


def messages(camera: str = "gate", slug: str = "gate") -> dict[str, dict[str, Any]]:
    return discovery_messages("homeassistant", Topics("mexit/box", slug), camera, "digits")


def parsed(topic: str) -> tuple[str, str]:
    """Component and key of a discovery topic; Home Assistant accepts letters, digits, dashes and underscores."""
    prefix, component, node, key, last = topic.split("/")
    assert (prefix, last) == ("homeassistant", "config")
    assert all(char.isascii() and (char.isalnum() or char in "_-") for char in node + key)
    return component, key


def test_every_message_is_valid_by_the_models() -> None:
    for topic, content in messages().items():
        component, _ = parsed(topic)
        beyond = BEYOND_THE_MODELS[component]
        fields = {name: value for name, value in content.items() if name not in beyond}
        entity = MODELS[component].model_validate({**fields, "component": component}, strict=True, extra="forbid")
        assert entity.device.identifiers == ["mexit_box_gate"]
        assert content["state_topic"].startswith("mexit/box/gate/")


def test_the_models_refuse_a_message_with_a_mistake() -> None:
    """A control: strict validation finds a wrong type, an unknown field and a missing identifier."""
    content = next(content for topic, content in messages().items() if parsed(topic) == ("sensor", "label"))
    fields = {name: value for name, value in content.items() if name not in BEYOND_THE_MODELS["sensor"]}
    device = {"name": "gate"}
    for mistake in ({"icon": 3}, {"unit": "%"}, {"device": device}, {"unique_id": None}):
        with pytest.raises(ValueError, match="validation error"):
            sensors.SensorInfo.model_validate({**fields, **mistake}, strict=True, extra="forbid")


def test_entities_of_all_cameras_have_ids_of_their_own() -> None:
    contents = [*messages().values(), *messages("hall", "hall").values()]
    assert len({content["unique_id"] for content in contents}) == len(contents) == 16
    assert {content["device"]["name"] for content in contents} == {"gate", "hall"}


def shown(key: str, value: str | dict[str, Any]) -> str:
    """What Home Assistant shows for an entity when this value is published."""
    content = next(content for topic, content in messages().items() if parsed(topic)[1] == key)
    return jinja2.Template(content["value_template"]).render(value=value, value_json=value)


def test_templates_show_the_state() -> None:
    sure = state_message(camera_prediction())
    unsure = state_message(replace(camera_prediction(), steady=None, label=None, reason="unsure"))
    assert {key: shown(key, sure) for key in ("label", "confidence", "unsure", "exit", "cost", "age")} == {
        "label": "zero",
        "confidence": "90.0",
        "unsure": "OFF",
        "exit": "1",
        "cost": "25.0",
        "age": "1.0",
    }
    assert (shown("label", unsure), shown("unsure", unsure)) == ("None", "ON")  # Home Assistant shows None as unknown
    assert [shown("pictures", state) for state in ("online", "lost", "frozen")] == ["online", "offline", "offline"]

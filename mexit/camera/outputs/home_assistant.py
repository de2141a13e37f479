"""Messages that describe cameras to Home Assistant (MQTT discovery).

Each camera is a device with these entities: the label, its confidence, whether the answer is unsure, whether the
camera delivers pictures, its events, and for diagnosis the exit, the share of the full cost and the age of answers.
Source: https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mexit.camera.outputs.message_settings import EVENT_KINDS
from mexit.camera.outputs.mqtt_messages import OFFLINE, ONLINE, Topics
from mexit.core.versions import VERSION

_AVAILABLE = f"{{{{ '{ONLINE}' if value == '{ONLINE}' else '{OFFLINE}' }}}}"  # a lost or frozen camera is not
# Component and fields of each entity; `key` of the state is what it shows.
_ENTITIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "label": ("sensor", {"name": "Label", "icon": "mdi:tag", "value_template": "{{ value_json.label }}"}),
    "confidence": (
        "sensor",
        {
            "name": "Confidence",
            "icon": "mdi:percent",
            "unit_of_measurement": "%",
            "state_class": "measurement",
            "suggested_display_precision": 0,
            "value_template": "{{ (100 * value_json.confidence) | round(1) }}",
        },
    ),
    "unsure": (
        "binary_sensor",
        {
            "name": "Unsure",
            "icon": "mdi:help-circle",
            "payload_on": "ON",
            "payload_off": "OFF",
            "value_template": "{{ 'ON' if value_json.unsure else 'OFF' }}",
        },
    ),
    "exit": (
        "sensor",
        {
            "name": "Exit",
            "icon": "mdi:location-exit",
            "entity_category": "diagnostic",
            "enabled_by_default": False,
            "value_template": "{{ value_json.exit }}",
        },
    ),
    "cost": (
        "sensor",
        {
            "name": "Share of full cost",
            "icon": "mdi:speedometer",
            "unit_of_measurement": "%",
            "state_class": "measurement",
            "entity_category": "diagnostic",
            "enabled_by_default": False,
            "suggested_display_precision": 0,
            "value_template": "{{ (100 * value_json.cost) | round(1) }}",
        },
    ),
    "age": (
        "sensor",
        {
            "name": "Age of answers",
            "device_class": "duration",
            "unit_of_measurement": "ms",
            "state_class": "measurement",
            "entity_category": "diagnostic",
            "enabled_by_default": False,
            "suggested_display_precision": 0,
            "value_template": "{{ value_json.age_ms }}",
        },
    ),
}


def discovery_messages(prefix: str, topics: Topics, camera: str, model: str) -> dict[str, dict[str, Any]]:
    """The messages for one camera, to be published as JSON and retained.

    Args:
        prefix: beginning of the topics that Home Assistant reads; its default is "homeassistant".
        topics: topics of the camera.
        camera: name of the camera, shown as the name of the device.
        model: name of the bundle.

    Returns:
        Topic to content of each message.
    """
    node = f"{topics.root.replace('/', '_')}_{topics.slug}"
    common: dict[str, Any] = {
        "device": {
            "identifiers": [node],
            "name": camera,
            "manufacturer": "mexit",
            "model": model,
            "sw_version": VERSION,
        },
        "origin": {"name": "mexit", "sw_version": VERSION},
        "qos": 1,
    }
    program = {"topic": topics.program}
    answering = {
        "availability": [program, {"topic": topics.camera, "value_template": _AVAILABLE}],
        "availability_mode": "all",
    }
    entities: dict[str, tuple[str, dict[str, Any]]] = {
        key: (component, {"state_topic": topics.state, **fields, **answering})
        for key, (component, fields) in _ENTITIES.items()
    }
    entities["pictures"] = (
        "binary_sensor",
        {
            "name": "Pictures",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": topics.camera,
            "payload_on": ONLINE,
            "payload_off": OFFLINE,
            "value_template": _AVAILABLE,
            "availability": [program],
        },
    )
    entities["event"] = (
        "event",
        {
            "name": "Event",
            "icon": "mdi:bell",
            "state_topic": topics.event,
            "event_types": list(EVENT_KINDS),
            "availability": [program],
        },
    )
    return {
        f"{prefix}/{component}/{node}/{key}/config": {**fields, "unique_id": f"{node}_{key}", **common}
        for key, (component, fields) in entities.items()
    }

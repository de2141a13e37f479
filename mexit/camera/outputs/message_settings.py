"""Where messages of cameras go: settings of MQTT and of webhooks, which need no optional package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from mexit.camera.events import EventKind

EVENT_KINDS: tuple[str, ...] = get_args(EventKind)


@dataclass(frozen=True)
class MqttSettings:
    """Where messages go.

    Attributes:
        url: `mqtt://user:password@host:1883`, or `mqtts://` for TLS.
        topic: beginning of all topics; programs that share a broker need different ones.
        discovery: beginning of the topics that Home Assistant reads; empty = it gets no messages.
        interval_s: time after which the state of a camera is published although its label has not changed, seconds.
    """

    url: str = field(repr=False)
    topic: str = "mexit"
    discovery: str = "homeassistant"
    interval_s: float = 5.0


@dataclass(frozen=True)
class WebhookSettings:
    """Where events go.

    Attributes:
        url: http or https, possibly with user and password; never shown beyond the host, since paths hold secrets too.
        events: kinds of events to send, of `EVENT_KINDS`.
        timeout_s: for each step of the network, seconds.
        retries: further attempts after a failed one, with growing pauses.
    """

    url: str = field(repr=False)
    events: tuple[str, ...] = EVENT_KINDS
    timeout_s: float = 10.0
    retries: int = 4

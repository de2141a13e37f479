"""Addresses and topics of an MQTT broker: what is valid."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from mexit.errors import UsageError

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_EXPECTED = (
    "expected mqtt://HOST:1883, or mqtts://HOST:8883 for TLS; USER:PASSWORD@ goes before the host, with @ in a "
    "password written as %40 and / as %2F"
)
_WILDCARDS = frozenset("+#")
_LONGEST_TOPIC = 1000  # bytes; the protocol ends at 65,535 for the topic of a camera, which begins with this one


@dataclass(frozen=True)
class MqttAddress:
    """A parsed address of a broker.

    Attributes:
        host, port: of the broker.
        tls: whether the connection is encrypted.
        user, password: None if the address has none.
    """

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None = field(repr=False)

    @property
    def name(self) -> str:
        """The address without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' if self.tls else ''}://{host}:{self.port}"


def parse_broker(url: str) -> MqttAddress:
    """Parse the address of a broker. Raises `UsageError`, whose message holds no password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:
        raise UsageError(f"the address of the MQTT broker cannot be read: {_EXPECTED}") from None
    if parts.scheme not in _PORTS or not host or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError(f"the address of the MQTT broker is not complete, or has a path: {_EXPECTED}")
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    return MqttAddress(host, port or _PORTS[parts.scheme], parts.scheme == "mqtts", user, password)


def check_topic(topic: str) -> None:
    """Check the beginning of topics. Raises `UsageError` for one that a broker would refuse."""
    if _WILDCARDS & set(topic) or topic.startswith(("/", "$")) or topic.endswith("/") or not topic.isprintable():
        raise UsageError(f"'{topic}' is no topic to publish to: write words with / between them, such as mexit/hall")
    if len(topic.encode()) > _LONGEST_TOPIC:
        raise UsageError(f"the topic has {len(topic.encode())} bytes; expected at most {_LONGEST_TOPIC}")

"""Posts events of cameras to a web server."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from mexit.camera.events import CameraEvent
from mexit.camera.frame import RGB, OnEvent
from mexit.camera.outputs.background_sender import BackgroundSender
from mexit.camera.outputs.message_settings import EVENT_KINDS, WebhookSettings
from mexit.camera.prediction import CameraPrediction
from mexit.camera.web import REQUEST_ERRORS, network_reason, post_json
from mexit.core.printable import json_text
from mexit.errors import UsageError

_TRY_AGAIN = frozenset({408, 425, 429})  # and every status from 500 on
_HINTS = {401: ": check the user and the password", 403: ": check the address, the user and the password"}
DELAY_S = 1.0
_MAX_DELAY_S = 60.0


class Webhook:
    """Sends each event as a JSON object by POST, in a thread of its own.

    An attempt that fails because of the network or the server (408, 425, 429, 5xx) is repeated after 1, 2, 4, ... s,
    or after the time that the server asks for. Another status is final, redirects included. The object's `id` is the
    same in every attempt.
    """

    name = "webhook"

    def __init__(self, settings: WebhookSettings, *, on_event: OnEvent, delay_s: float = DELAY_S) -> None:
        """Start the thread; connect with the first event.

        Args:
            settings: address, kinds of events and attempts.
            on_event: called in another thread with a message when an event is lost.
            delay_s: pause before the second attempt, seconds; it doubles for each further one.

        Raises:
            UsageError: the address or a kind of events is not valid.
        """
        self._settings, self._on_event, self._delay_s = settings, on_event, delay_s
        self._host = _host(settings.url)
        for kind in settings.events:
            if kind not in EVENT_KINDS:
                raise UsageError(f"webhook: '{kind}' is no event: expected {', '.join(EVENT_KINDS)}")
        if not settings.timeout_s > 0 or settings.retries < 0:
            raise UsageError("webhook: expected a timeout above 0 s and at least 0 retries")
        self._last_failure = ""
        self._sender: BackgroundSender[bytes] = BackgroundSender("mexit-webhook", self._deliver)

    @property
    def lost(self) -> int:
        """Events that the server did not accept."""
        return self._sender.lost

    def write(self, frame: RGB, prediction: CameraPrediction) -> None:
        """Ignore the frame; a webhook gets events alone."""

    def event(self, event: CameraEvent) -> None:
        """Send the event if its kind is one of those in the settings."""
        if event.kind in self._settings.events:
            self._sender.put(json_text({"id": str(uuid.uuid4()), **event.to_json()}, ascii_only=False).encode())

    def close(self) -> Path | None:
        """Stop; events that cannot be sent at once are lost."""
        self._sender.close()
        return None

    def _deliver(self, body: bytes) -> bool:
        delay_s = self._delay_s
        for attempt in range(self._settings.retries + 1):
            try:
                post_json(self._settings.url, body, self._settings.timeout_s)
            except REQUEST_ERRORS as error:
                wait_s = _retry_after_s(error, delay_s)
                failure = _describe(error)
            else:
                self._last_failure = ""
                return True
            if wait_s is None or attempt == self._settings.retries or self._sender.stopping.wait(wait_s):
                break
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
        self._report(failure)
        return False

    def _report(self, failure: str) -> None:
        """Report a lost event, but not the same cause again."""
        if failure != self._last_failure:
            self._last_failure = failure
            self._on_event(f"webhook {self._host}: an event is lost: {failure}")


def _retry_after_s(error: Exception, delay_s: float) -> float | None:
    """Seconds to wait before the next attempt; None if a further attempt is no use."""
    if isinstance(error, HTTPError):
        with error:  # holds the connection
            if error.code not in _TRY_AGAIN and error.code < 500:
                return None
            asked = error.headers.get("Retry-After", "")
            if asked.isdecimal():
                return min(float(asked), _MAX_DELAY_S)
    elif isinstance(error, ValueError):  # an address that urllib cannot use
        return None
    return delay_s * random.uniform(0.75, 1.25)  # several programs must not try at the same moment


def _describe(error: Exception) -> str:
    """Why an attempt failed, without the address."""
    if not isinstance(error, HTTPError):
        return network_reason(error.reason if isinstance(error, URLError) else error)
    hint = _HINTS.get(error.code, "")
    if 300 <= error.code < 400:
        hint = ": redirects are not followed, name the last address"
    return f"the server answers {error.code} {error.reason}{hint}"


def _host(url: str) -> str:
    """Scheme and host of an address. Raises `UsageError`, whose message holds nothing secret."""
    expected = "expected https://HOST/PATH or http://HOST:PORT/PATH; USER:PASSWORD@ goes before the host"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"the address of the webhook cannot be read: {expected}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"the address of the webhook is not complete: {expected}")
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "")

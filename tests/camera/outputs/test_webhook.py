"""Webhooks: attempts, final answers, a server that never answers, and nothing secret in messages."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from camera_media import camera_prediction, grey_frames
from web_server import Reply, web_server

from mexit.camera.events import CameraEvent
from mexit.camera.outputs.background_sender import QUEUE_SIZE
from mexit.camera.outputs.message_settings import EVENT_KINDS, WebhookSettings
from mexit.camera.outputs.webhook import Webhook
from mexit.errors import UsageError

CHANGED = CameraEvent("gate", "label-changed", 12.5, "größer", "zero", 3.0)


def sent(
    url: str, events: list[CameraEvent], *, until: Callable[[], bool] = lambda: True, **settings: object
) -> tuple[Webhook, list[str]]:
    """Send events and close; returns the webhook and its messages."""
    notes: list[str] = []
    webhook = Webhook(replace(WebhookSettings(url), **settings), on_event=notes.append, delay_s=0.001)
    for event in events:
        webhook.event(event)
    done = threading.Event()
    while not until():
        done.wait(0.005)
    webhook.close()
    return webhook, notes


def answers(*replies: Callable[[Reply], object]) -> Callable[[Reply], object]:
    """Answer the n-th request with the n-th reply, and further ones with the last."""
    return lambda reply: replies[min(len(reply.seen), len(replies)) - 1](reply)


def test_an_event_is_posted_as_json() -> None:
    with web_server(lambda reply: reply.give(status=204)) as server:
        webhook, notes = sent(f"{server.url}/hook?token=1", [CHANGED], until=lambda: bool(server.seen))
        [request] = server.seen
    assert (request.command, request.path, request.headers["Content-Type"]) == (
        "POST",
        "/hook?token=1",
        "application/json",
    )
    body = json.loads(request.body)
    assert len(body.pop("id")) == 36
    assert body == CHANGED.to_json()
    assert (webhook.lost, notes) == (0, [])


def test_frames_and_other_kinds_of_events_are_not_sent() -> None:
    with web_server(lambda reply: reply.give()) as server:
        webhook = Webhook(WebhookSettings(server.url, events=("unsure",)), on_event=print)
        webhook.write(grey_frames(1)[0], camera_prediction())
        for kind in EVENT_KINDS:
            webhook.event(replace(CHANGED, kind=kind))
        webhook.close()
        assert [json.loads(request.body)["kind"] for request in server.seen] == ["unsure"]


def test_a_password_is_sent_when_the_server_asks() -> None:
    def answer(reply: Reply) -> None:
        known = reply.headers["Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()
        reply.give(status=200 if known else 401, challenges=() if known else ('Basic realm="x"',))

    with web_server(answer) as server:
        webhook, _ = sent(server.with_user("me:p%40ss"), [CHANGED], until=lambda: len(server.seen) == 2)
    assert webhook.lost == 0


def test_a_busy_server_is_tried_again_with_the_same_id() -> None:
    busy = answers(
        lambda reply: reply.give(status=503, Retry_After="0"),
        lambda reply: reply.give(status=500, Retry_After="\xb2"),  # a digit, and no number
        lambda reply: reply.connection.close(),
        lambda reply: reply.give(),
    )
    with web_server(busy) as server:
        webhook, notes = sent(server.url, [CHANGED], until=lambda: len(server.seen) == 4)
        bodies = [request.body for request in server.seen]
    assert len(set(bodies)) == 1
    assert (webhook.lost, notes) == (0, [])


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "the server answers 404 Not Found"),
        (403, "the server answers 403 Forbidden: check the address, the user and the password"),
        (302, "the server answers 302 Found: redirects are not followed, name the last address"),
        (307, "the server answers 307 Temporary Redirect: redirects are not followed, name the last address"),
    ],
)
def test_a_final_answer_costs_the_event_and_is_reported_once(status: int, message: str) -> None:
    with web_server(lambda reply: reply.give(status=status, Location="/else")) as server:
        url = server.with_user("me:geheim") + "/geheim?key=geheim"
        webhook, notes = sent(url, [CHANGED, CHANGED], until=lambda: len(server.seen) == 2)
        assert [request.command for request in server.seen] == ["POST", "POST"]
        assert len({request.body for request in server.seen}) == 2
    assert webhook.lost == 2
    assert notes == [f"webhook {server.url}: an event is lost: {message}"]


def test_attempts_end() -> None:
    with web_server(lambda reply: reply.give(status=503)) as server:
        webhook, _ = sent(server.url, [CHANGED], until=lambda: len(server.seen) == 3, retries=2)
    assert len(server.seen) == 3
    assert webhook.lost == 1


def test_a_certificate_that_is_not_valid_is_named(tmp_path: Path) -> None:
    notes: list[str] = []
    reported = threading.Event()
    with web_server(lambda reply: reply.give(), tls_folder=tmp_path) as server:
        settings = WebhookSettings(server.url, retries=0)
        webhook = Webhook(settings, on_event=lambda note: (notes.append(note), reported.set()))
        webhook.event(CHANGED)
        assert reported.wait(60)
        webhook.close()
        assert not server.seen
    assert "its certificate is not accepted (self-signed certificate): name a file with it" in notes[0]
    assert "insecure" not in notes[0]
    assert webhook.lost == 1


def test_a_server_that_never_answers_delays_no_camera_and_losses_are_counted() -> None:
    release, entered = threading.Event(), threading.Event()

    def answer(reply: Reply) -> None:
        entered.set()
        release.wait(60)
        reply.give()

    with web_server(answer) as server:
        webhook = Webhook(WebhookSettings(server.url), on_event=print)
        webhook.event(CHANGED)
        assert entered.wait(60)
        for _ in range(QUEUE_SIZE + 500):
            webhook.event(CHANGED)
        assert webhook.lost == 500
        webhook.close()
        assert webhook.lost == QUEUE_SIZE + 501
        release.set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (WebhookSettings("ftp://a:geheim@b/c"), "expected https://HOST/PATH"),
        (WebhookSettings("https://:geheim@/c"), "expected https://HOST/PATH"),
        (WebhookSettings("https://b:geheim/c"), "expected https://HOST/PATH"),
        (WebhookSettings("https://b", events=("label",)), "'label' is no event: expected label-changed, unsure"),
        (WebhookSettings("https://b", timeout_s=0.0), "expected a timeout above 0 s"),
        (WebhookSettings("https://b", retries=-1), "at least 0 retries"),
    ],
)
def test_bad_settings(settings: WebhookSettings, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Webhook(settings, on_event=print)
    assert "geheim" not in str(caught.value) + repr(settings)

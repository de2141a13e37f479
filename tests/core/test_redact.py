"""No user and no password is left in an address or in a text that holds one."""

from __future__ import annotations

import pytest

from mexit.core.redact import redact, redact_text

SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "ftp", "srt", "mqtt")
SECRETS = (
    "geheim",
    "ge heim",
    'ge"heim',
    "ge'heim",
    "ge@heim",
    "ge/heim",
    "ge?heim",
    "ge#heim",
    "12/34",
    "ge:heim",
    "ge%40heim",
)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://admin:geheim@10.0.0.5:554/a", "rtsp://10.0.0.5:554/a"),
        ("rtsp://geheim@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://admin:ge@heim@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://admin:ge/heim@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://admin:ge?heim@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://admin:12/34@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://ge/heim@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://first.last:12/34@10.0.0.5/a", "rtsp://10.0.0.5/a"),
        ("rtsp://admin:geheim@[fe80::1]:554/a", "rtsp://[fe80::1]:554/a"),
        ("http://10.0.0.5/a@2x/cam", "http://10.0.0.5/a@2x/cam"),
        ("http://[fe80::1]:80/a@2x", "http://[fe80::1]:80/a@2x"),
        ("http://h/v?user=geheim&password=geheim&channel=1", "http://h/v"),
        ("rtsp://h/user=geheim_password=geheim_channel=1_s.sdp", "rtsp://h/"),
        ("rtsp://h/live/user=geheim&password=geheim", "rtsp://h/live/"),
        ("https://h/live?token=geheim#x", "https://h/live"),
        ("udp://@:5000", "udp://:5000"),
        ("udp://:5000", "udp://:5000"),
    ],
)
def test_names_hold_no_credentials(url: str, name: str) -> None:
    assert redact(url) == name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("secret", SECRETS)
def test_every_scheme_and_every_password(scheme: str, secret: str) -> None:
    for url in (f"{scheme}://user:{secret}@10.0.0.5:80/x", f"{scheme}://user:{secret}@cam.local/x"):
        assert redact(url) in (f"{scheme}://10.0.0.5:80/x", f"{scheme}://cam.local/x")
        shown = redact_text(f"[Errno 111] Connection refused: '{url}'; 3 attempts")
        assert secret not in shown
        assert "Connection refused" in shown
        assert "; 3 attempts" in shown


@pytest.mark.parametrize(
    "text",
    [
        "no address@here",
        "image http://10.0.0.5/a@2x.png does not exist",
        "serving at http://127.0.0.1:8000: write to me@example.org",
        "give rtsp://HOST[:PORT]/PATH",
        "choose a key= value",
        "folder:/data/a@b.png",
        "C:/data/a@b.png",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("address", ["http:/admin:geheim@10.0.0.5/a.png", "image rtsp:/geheim@cam/live"])
def test_addresses_that_became_paths(address: str) -> None:
    """`pathlib` drops one of the two slashes."""
    assert "geheim" not in redact_text(address)


def test_parameters_of_addresses() -> None:
    shown = redact_text("cannot open http://cam/v.cgi?user=admin&password=geheim&channel=1: timed out")
    assert shown == "cannot open http://cam/v.cgi?user=...&password=...&channel=1: timed out"

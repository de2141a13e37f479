"""Messages to systemd, received by a socket as systemd's: of the class, and of real servers."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from servers import Server, launch, start

from mexit.serving.systemd_notify import SystemdNotify

UNIT = Path(__file__).parents[2] / "examples" / "mexit.service"
ALIVE, STOPPING = "WATCHDOG=1", "STOPPING=1"


class Systemd:
    """A socket that receives what a service sends to systemd."""

    def __init__(self, name: str) -> None:
        """Listen at a path, or at @NAME."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.environment = {"NOTIFY_SOCKET": name}

    def next(self, within_s: float = 30.0) -> str:
        """The next message; "" if none comes in time."""
        self.socket.settimeout(within_s)
        try:
            return self.socket.recv(4096).decode()
        except TimeoutError:
            return ""

    def waiting(self) -> list[str]:
        """The messages that have come."""
        return list(iter(lambda: self.next(0.01), ""))


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    name = f"@mexit-{secrets.token_hex(8)}" if request.param == "abstract" else str(tmp_path / "notify")
    one = Systemd(name)
    with one.socket:
        yield one


def test_each_message(systemd: Systemd) -> None:
    notify = SystemdNotify(systemd.environment)
    notify.ready("http://127.0.0.1:8000")
    notify.alive()  # no watchdog
    notify.stopping()
    assert systemd.waiting() == [
        "READY=1\nSTATUS=serving at http://127.0.0.1:8000",
        "STOPPING=1\nSTATUS=answering the requests in flight",
    ]
    assert notify.watchdog_s is None


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid() + 1)}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_watches_one_process(
    systemd: Systemd, variables: dict[str, str], watchdog_s: float | None
) -> None:
    notify = SystemdNotify({**systemd.environment, **variables})
    assert notify.watchdog_s == watchdog_s
    notify.alive()
    notify.alive()  # a quarter of the time has not passed
    assert systemd.waiting() == ([ALIVE] if watchdog_s else [])


def test_a_quarter_of_the_time_lies_between_two_messages(systemd: Systemd) -> None:
    notify = SystemdNotify({**systemd.environment, "WATCHDOG_USEC": "200000"})
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + 0.5:
        notify.alive()
        time.sleep(0.001)
    elapsed_s = time.monotonic() - begin_s
    assert 2 <= len(systemd.waiting()) <= 1 + elapsed_s / 0.05


def test_a_process_without_systemd_sends_nothing() -> None:
    for environment in (None, {}, {"WATCHDOG_USEC": "1000000"}):
        notify = SystemdNotify(environment)
        notify.ready("http://127.0.0.1:8000")
        notify.alive()
        notify.stopping()
        assert notify.watchdog_s is None


def test_a_socket_that_cannot_be_used_is_logged_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SystemdNotify({"NOTIFY_SOCKET": "vsock:2:1234"}).ready("url")
    assert caplog.messages == [
        "NOTIFY_SOCKET: expected a path or @NAME, found 'vsock:2:1234': systemd gets no messages"
    ]
    caplog.clear()
    SystemdNotify({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("url")
    [message] = caplog.messages
    assert message.startswith("READY=1 cannot be sent to NOTIFY_SOCKET (")


@contextlib.contextmanager
def service(
    systemd: Systemd, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, watchdog_s: float, workers: int
) -> Iterator[Server]:
    """A server that finds systemd's socket and a watchdog in its environment, from the moment of READY=1."""
    for name, value in {**systemd.environment, "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}.items():
        monkeypatch.setenv(name, value)
    log = folder / "server.log"
    with launch(bundle, log, workers=workers) as process:
        try:
            first = systemd.next(60.0)
            assert first.startswith("READY=1\nSTATUS=serving at http://127.0.0.1:"), first + log.read_text()
            yield Server(process, first.rpartition(" ")[2], log)
        finally:
            process.kill()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("systemd", ["abstract"], indirect=True)
def test_a_server_is_ready_alive_and_stops(
    systemd: Systemd, mixed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """READY=1 comes first and once, and a request that is sent at this moment is answered."""
    with service(systemd, mixed_bundle, tmp_path, monkeypatch, 1.0, workers) as server:
        assert server.json("GET", "/v2/health/ready") == (200, {"ready": True})
        assert [systemd.next() for _ in range(3)] == [ALIVE] * 3
        assert server.stop() == 0
        last = [message for message in systemd.waiting() if message != ALIVE]
        assert [message.partition("\n")[0] for message in last] == [STOPPING]


@pytest.mark.parametrize("systemd", ["path"], indirect=True)
def test_no_message_before_requests_are_accepted(
    systemd: Systemd, mixed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cannot start sends nothing."""
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.environment["NOTIFY_SOCKET"])
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    with pytest.raises(AssertionError), start(mixed_bundle, tmp_path, workers=1, budget="1"):
        pass
    assert systemd.waiting() == []


@pytest.mark.slow
@pytest.mark.parametrize("systemd", ["path"], indirect=True)
def test_the_watchdog_hears_nothing_while_a_worker_does_not_answer(
    systemd: Systemd, mixed_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two workers stands still; the supervisor runs on, and so does the other worker."""
    with service(systemd, mixed_bundle, tmp_path, monkeypatch, 2.0, 2) as server:
        assert systemd.next() == ALIVE
        children = (Path(f"/proc/{server.process.pid}/task/{server.process.pid}") / "children").read_text()
        stopped = int(children.split()[0])
        os.kill(stopped, signal.SIGSTOP)
        until_silence = iter(lambda: systemd.next(1.5), "")  # three times the usual interval without a message
        assert len(list(islice(until_silence, 6))) <= 4
        os.kill(stopped, signal.SIGCONT)
        assert systemd.next() == ALIVE
        assert server.stop() == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_of_the_examples_is_valid_and_hardened(tmp_path: Path) -> None:
    """systemd knows every option; the programs of the unit are replaced by ones that exist here."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/mexit/bin/mexit", sys.executable))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    rated = subprocess.run(command, capture_output=True, text=True, check=False)  # 20: exposure of at most 2.0 of 10
    assert rated.returncode == 0, rated.stdout[-500:] + rated.stderr

"""Starts the server as users do, in a process of its own, and speaks HTTP to it.

`start` is the one place that knows how a server is started.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys
from pathlib import Path
{prelude}
from mexit.flows.serve import serve
options = json.loads(sys.argv[1])
serve(Path(options.pop("bundle")), ready=lambda url: print(url, flush=True), **options)
"""
DEFAULTS = {"budget": "medium", "host": "127.0.0.1", "port": 0, "token": None}
LINE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@dataclass
class Server:
    """A running server.

    Attributes:
        url: as it announced itself.
        errors: what it wrote to standard error.
    """

    process: subprocess.Popen[str]
    url: str
    errors_file: Path

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def errors(self) -> str:
        return self.errors_file.read_text()

    def connect(self, timeout: float = 30.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers (names in lower case), body."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The same for JSON both ways: status and value."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.ask(method, path, content, headers)
        return status, json.loads(answer)

    def series(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that bear the given labels."""
        total = 0.0
        for found, text, value in LINE.findall(self.ask("GET", "/metrics")[2].decode()):
            own = dict(re.findall(r'(\w+)="([^"]*)"', text))
            if found == name and labels.items() <= own.items():
                total += float(value)
        return total

    def peak_bytes(self) -> int:
        """The most memory it ever held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def stop(self, sent: signal.Signals = signal.SIGTERM, within_s: float = 20.0) -> int:
        """Signal it and wait for its exit code."""
        self.process.send_signal(sent)
        return self.process.wait(within_s)


def launch(bundle: Path, errors_file: Path, *, prelude: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start the process without waiting for anything."""
    program = PROGRAM.format(prelude=prelude)
    arguments = json.dumps({**DEFAULTS, **options, "bundle": str(bundle)})
    with errors_file.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", program, arguments], stdout=subprocess.PIPE, stderr=errors, text=True
        )


@contextmanager
def start(bundle: Path, directory: Path, *, prelude: str = "", **options: Any) -> Iterator[Server]:
    """A server that listens; killed in the end if a test left it running.

    Args:
        bundle: what it serves.
        directory: for its log.
        prelude: Python that runs first, for tests that need a slower or smaller server.
        options: of `serve`.
    """
    errors_file = directory / f"server-{time.monotonic_ns()}.log"
    process = launch(bundle, errors_file, prelude=prelude, **options)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), errors_file.read_text()
        yield Server(process, url, errors_file)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def refused(bundle: Path, directory: Path, **options: Any) -> str:
    """What a server that does not start says: the last line of its standard error."""
    errors_file = directory / f"refused-{time.monotonic_ns()}.log"
    with launch(bundle, errors_file, **options) as process:
        assert process.stdout is not None
        announced = process.stdout.readline()
        process.kill()
    assert not announced, f"it started at {announced}"
    return errors_file.read_text().strip().splitlines()[-1]

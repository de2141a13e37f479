"""Servers under test, and an HTTP client for them.

`start` runs a server in a process of its own, as users do. `serve_runtime` runs one in a thread of this process,
for tests that bring their own runtime, such as one whose engine stands still or fails.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit import Bundle, Runtime
from mexit.runtime.backends.base import HostCarried
from mexit.serving import http as routes
from mexit.serving import uvicorn_server
from mexit.serving.grpc_server import GrpcServer
from mexit.serving.limits import Limits
from mexit.serving.middleware import Tokens
from mexit.serving.model_folder import ModelFolder
from mexit.serving.repository import ModelRepository
from mexit.serving.server_state import ServerState

INFER = "/v2/models/digits/infer"
PROGRAM = """
import json, sys
from pathlib import Path
from mexit.flows.serve import ServeOptions, serve_bundle
from mexit.serving.limits import Limits
bundle, options, limits = json.loads(sys.argv[1])
options |= {name: Path(options[name]) for name in ("token_file", "tls_cert", "tls_key", "cameras") if name in options}
ready = lambda url: print(url, flush=True)
serve_bundle(Path(bundle), ServeOptions(**options), limits=Limits(**limits), ready=ready)
"""
_METRIC = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Client:
    """Requests to a server at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def connect(self, timeout: float = 30.0, source: str = "") -> http.client.HTTPConnection:
        """A connection, from another address of this machine if `source` is given."""
        source_address = (source, 0) if source else None
        return http.client.HTTPConnection(self.address, timeout=timeout, source_address=source_address)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, source: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request on its own connection; return status, headers with lower-case names, and body."""
        connection = self.connect(source=source)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Send a JSON request; return status and parsed response."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.ask(method, path, content, headers)
        return status, json.loads(answer)

    def series(self, metric: str, **labels: str) -> float:
        """The sum of a metric's series that have the given labels."""
        total = 0.0
        for name, text, value in _METRIC.findall(self.ask("GET", "/metrics")[2].decode()):
            if name == metric and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', text)).items():
                total += float(value)
        return total


class Server(Client):
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        super().__init__(url)
        self.process = process
        self._log = log

    @property
    def errors(self) -> str:
        """What the server wrote to standard error."""
        return self._log.read_text()

    def peak_bytes(self) -> int:
        """The largest resident memory so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def stop(self, stop_signal: signal.Signals = signal.SIGTERM, within_s: float = 20.0) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(stop_signal)
        return self.process.wait(within_s)


def launch(
    bundle: Path,
    log: Path,
    limits: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start the process and return at once. `limits` and `options` are fields of `Limits` and `ServeOptions`."""
    variables = {**os.environ, **(environment or {})}
    arguments = json.dumps([str(bundle), {"budget": "medium", "port": 0, **options}, limits or {}])
    with log.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, arguments], stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
        )


@contextmanager
def start(bundle: Path, directory: Path, limits: dict[str, Any] | None = None, **options: Any) -> Iterator[Server]:
    """A listening server, killed at the end.

    Args:
        bundle: the bundle to serve.
        directory: for the log.
        limits: fields of `Limits`.
        options: fields of `ServeOptions`; by default the budget is "medium" and the port a free one.
    """
    log = directory / f"server-{time.monotonic_ns()}.log"
    process = launch(bundle, log, limits, **options)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, log.read_text()
        yield Server(process, url, log)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def workers_of(server: Server) -> list[int]:
    """Process ids of a server's workers."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def serving_workers(server: Server) -> list[int]:
    """Process ids of the workers that get connections."""
    workers = workers_of(server)
    # A connection goes to the worker with the fewest, so it takes as many as are open to reach the busiest one.
    number = len(workers) + sum(len(client_ports(server, pid)) for pid in workers)
    connections = [server.connect() for _ in range(number)]
    for connection in connections:
        connection.request("GET", "/v2/health/live")
        connection.getresponse().read()
    ports = {connection.sock.getsockname()[1] for connection in connections}
    serving = [pid for pid in workers_of(server) if ports & client_ports(server, pid)]
    for connection in connections:
        connection.close()
    return serving


def client_ports(server: Server, pid: int) -> set[int]:
    """Ports of the clients whose connections a worker has."""
    try:
        links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except FileNotFoundError:  # the process, or a file, is gone
        return set()
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [row for row in rows if int(row[1].partition(":")[2], 16) == server.port and f"socket:[{row[9]}]" in links]
    return {int(row[2].partition(":")[2], 16) for row in mine}


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refused(bundle: Path, directory: Path, **options: Any) -> str:
    """The last line on standard error of a server that does not start."""
    log = directory / f"refused-{time.monotonic_ns()}.log"
    with launch(bundle, log, **options) as process:
        assert process.stdout is not None
        announced = process.stdout.readline()
        process.kill()
    assert not announced, f"it started at {announced}"
    return log.read_text().strip().splitlines()[-1]


@contextmanager
def serve_runtime(
    runtime: Runtime,
    limits: Limits | None = None,
    *,
    tokens: tuple[str, ...] = (),
    batching: str = "off",
    send_buffer: int = 0,
    bound: tuple[socket.socket, ...] = (),
    grpc_port: int | None = None,
) -> Iterator[Client]:
    """A server in a thread.

    Args:
        runtime: the runtime to serve.
        limits: of the server; by default no request runs in the event loop, which a hook may block.
        tokens: bearer tokens.
        batching: "off" or "continuous".
        send_buffer: of connections, bytes; 0 for the system's default.
        bound: sockets to serve on; by default a free port of 127.0.0.1.
        grpc_port: port of gRPC.
    """
    state = ServerState(
        limits or Limits(short_s=0), threads=runtime.threads, rate_limiter=runtime.rate_limiter, batching=batching
    )
    repository = ModelRepository(state, ModelFolder(runtime.bundle.path), lambda _: runtime)
    repository.load_all()
    bound = bound or uvicorn_server.bind("127.0.0.1", 0, has_token=bool(tokens))
    if send_buffer:
        bound[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    urls: queue.Queue[str] = queue.Queue()
    known = Tokens(tokens, tokens[:1])
    app = routes.build_app(repository, known)
    beside = None if grpc_port is None else GrpcServer(repository, known, [f"127.0.0.1:{grpc_port}"])
    thread = threading.Thread(target=uvicorn_server.run, args=(app, state, bound, urls.put, beside))
    thread.start()
    try:
        yield Client(urls.get(timeout=20))
    finally:
        state.stopping = True
        thread.join(20)
        repository.close()
        assert not thread.is_alive()


class HookBackend:
    """A network of 3 segments that always answers class 0; segment 1 first calls a hook with its images."""

    engine = "hook"
    precision = "fp32"
    variant = "fp32"
    static = None

    def __init__(self, hook: Callable[[NDArray[np.float32]], None]) -> None:
        self.segments = (HookSegment(hook), HookSegment(), HookSegment())

    def carry(self, images: NDArray[np.float32]) -> HostCarried:
        return HostCarried([images])


class HookSegment:
    def __init__(self, hook: Callable[[NDArray[np.float32]], None] | None = None) -> None:
        self._hook = hook

    def run(self, carried: HostCarried) -> tuple[HostCarried, NDArray[np.float32]]:
        if self._hook is not None:
            self._hook(carried.arrays[0])
        logits = np.zeros((carried.rows, 10), np.float32)
        logits[:, 0] = 10.0
        return carried, logits


def hook_runtime(bundle: Path, hook: Callable[[NDArray[np.float32]], None]) -> Runtime:
    """A runtime with the budget `full` whose segment 1 calls a hook with its images."""
    return Runtime(Bundle.open(bundle), HookBackend(hook), "full")


def infer_body(images: NDArray[np.float32], **parameters: object) -> bytes:
    """An inference request for images (B, 1, 8, 8), as JSON."""
    entry = {"name": "input", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [entry], "parameters": parameters}).encode()


def outputs_of(answer: Any) -> dict[str, list[Any]]:
    """The data of a JSON response's outputs, by name."""
    return {entry["name"]: entry["data"] for entry in answer["outputs"]}


def wait_until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for a condition; fails after `within_s` seconds."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "the condition never became true"
        time.sleep(0.01)

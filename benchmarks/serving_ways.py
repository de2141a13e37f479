"""What a request costs in one process, in worker processes and on Ray Serve: python serving_ways.py BUNDLE.

Needs mexit[cpu,ray]. Requests with one image each, on connections that stay open; the ways take turns. Processor time
is that of the server and of all processes it started, so other programs on the machine hardly change it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from page import table, write_page

from mexit import Bundle

PORT, IDLE_S = 18600, 10.0
RAY = ["--ray", "--min-replicas", "2", "--max-replicas", "2"]
# Ray's proxy in C, and fewer threads in a replica: docs.ray.io, "high throughput".
FASTER = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one process": (["--workers", "0"], {}),
    "two worker processes": (["--workers", "2"], {}),
    "Ray Serve, two replicas": (RAY, {}),
    "the same with HAProxy": (RAY, FASTER),
}


@contextmanager
def served(bundle: Path, port: int, options: list[str], variables: dict[str, str]) -> Iterator[int]:
    """A server; its process id."""
    command = [sys.executable, "-m", "mexit", "serve", str(bundle), "--port", str(port), "--cost", "macs"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", **variables}
    with subprocess.Popen(
        [*command, "--threads", "1", *options], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, "the server did not start"
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def tree(root: int) -> list[list[str]]:
    """The fields of /proc/PID/stat from the state on, and the id, of a process and of all that it started."""
    rows = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            rows[int(file.parent.name)] = file.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
    found = {root}
    while more := {pid for pid, row in rows.items() if int(row[1]) in found} - found:
        found |= more
    return [rows[pid] for pid in found if pid in rows]


def cpu_s(root: int) -> float:
    """Processor seconds of the processes of a server so far."""
    return sum(int(row[11]) + int(row[12]) for row in tree(root)) / os.sysconf("SC_CLK_TCK")


def memory_mb(root: int) -> float:
    """Resident memory of the processes of a server; pages that they share count in each."""
    return sum(int(row[21]) for row in tree(root)) * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(port: int, path: str, body: tuple[bytes, bytes], clients: int, count: int) -> tuple[float, float]:
    """Milliseconds of the median request, and requests per second, of `clients` connections with `count` requests."""
    latencies: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(count):
            start = time.perf_counter()
            connection.request("POST", path, b"".join(body), {"Inference-Header-Content-Length": str(len(body[0]))})
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            latencies.append(time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(latencies) * 1e3, len(latencies) / (time.perf_counter() - start)


def main() -> None:
    """Measure all ways, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=500, help="of each connection in a round")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    manifest = Bundle.open(chosen.bundle).manifest
    path, shape = f"/v2/models/{manifest.name}/infer", [1, *manifest.input.shape]
    image = np.random.default_rng(0).random(shape, np.float32).tobytes()
    tensor = {"name": "input", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(image)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    rows = []
    with ExitStack() as stack:
        servers = {
            way: (PORT + k, stack.enter_context(served(chosen.bundle, PORT + k, *how)))
            for k, (way, how) in enumerate(WAYS.items())
        }
        idle = {way: cpu_s(pid) for way, (_, pid) in servers.items()}
        time.sleep(IDLE_S)
        idle = {way: (cpu_s(pid) - idle[way]) / IDLE_S for way, (_, pid) in servers.items()}
        for clients in (1, 4):
            measured: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
            for turn in range(chosen.rounds + 1):
                for way, (port, pid) in servers.items():
                    begin, start = cpu_s(pid), time.perf_counter()
                    ms, per_s = load(port, path, (head, image), clients, chosen.requests)
                    used = cpu_s(pid) - begin - idle[way] * (time.perf_counter() - start)
                    if turn:  # the first one warms up
                        measured[way].append((ms, per_s, used / (clients * chosen.requests) * 1e3))
            for way, rounds in measured.items():
                ms, per_s, used = (statistics.median(column) for column in zip(*rounds, strict=True))
                rows.append([way, clients, f"{used:.2f}", f"{ms:.2f}", f"{per_s:.0f}"])
        begun = [[way, f"{idle[way]:.3f}", f"{memory_mb(pid):.0f}"] for way, (_, pid) in servers.items()]
    columns = ["way", "connections", "processor ms a request", "median ms", "requests/s"]
    note = (
        f"`{manifest.name}`, one image a request, budget low, one thread an engine; {chosen.rounds} rounds of "
        f"{chosen.requests} requests a connection, medians. Processor time is that of all processes of the server less "
        f"that of an idle one. Load average of the machine at the end: {os.getloadavg()[0]:.1f}; it changes the last "
        "two columns. The client runs on the same machine."
    )
    idle_table = table(["way", "processors in use while idle", "MB resident"], begun)
    write_page(
        "serving_ways",
        f"{os.cpu_count()}-core-cpu",
        "What a request costs, by way of serving",
        [note, table(columns, rows), idle_table],
    )


if __name__ == "__main__":
    main()

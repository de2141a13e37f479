"""Measure how resident memory of the server grows with the number of requests, as it is and with a planted leak.

    python benchmarks/server_memory.py BUNDLE [REQUESTS]

16 connections send requests one after the other: raw and JSON tensors of 1 to 8 random images, encoded images, and
requests that are refused (no JSON, a wrong shape, a damaged image, an unknown model and route, a damaged compressed
body). One of 200 requests is for the metrics. The memory of all processes of the server is read every 1,000 requests.
The check is that of `memory_slope.py`: over the second half, the 99 % upper bound of the slope must lie under its limit
in bytes per request. The server runs in one process, in two worker processes, and in one process that leaks 16 bytes
per tensor request, which the check must detect. The default is one million requests each.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import multiprocessing as mp
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from memory_slope import LIMIT_BYTES, MEASURED, PLANTED_BYTES, SAMPLE_EVERY, measured
from overload import Connection, Reply
from page import table, write_page
from PIL import Image

from mexit import Bundle
from mexit.flows.serve import ServeOptions, serve_bundle
from mexit.serving import oip

CONNECTIONS, METRICS_EVERY = 16, 200
CASES = (("one process", 0, 0), ("two worker processes", 2, 0), ("one process that leaks", 0, PLANTED_BYTES))


def requests_of(bundle: Path) -> list[bytes]:
    """Requests of all kinds."""
    spec, name = Bundle.open(bundle).manifest.input, bundle.name
    rng, infer = np.random.default_rng(0), f"/v2/models/{name}/infer"

    def request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def tensor(rows: int) -> bytes:
        images = rng.random((rows, *spec.shape), np.float32).round(3)
        entry = {"name": spec.name, "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
        return json.dumps({"inputs": [entry]}).encode()

    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(stream, "PNG")
    row = rng.random(spec.shape, np.float32).tobytes()
    length = "Inference-Header-Content-Length: 0"
    good = [request(infer, row, length) for _ in range(8)]
    good += [request(infer, tensor(rows)) for rows in (1, 2, 4, 8)]
    good += [request(f"/v1/classify?budget={budget}", stream.getvalue()) for budget in ("low", "full")]
    bad = [
        request(infer, b"{"),
        request(infer, row[:-4], length),
        request(infer, b"no gzip", "Content-Encoding: gzip"),
        request("/v1/classify", stream.getvalue()[:-9]),
        request("/v2/models/unknown/infer", row, length),
        request("/v3", b"", method="GET"),
    ]
    mixed = list(itertools.islice(itertools.cycle([*good, *bad]), METRICS_EVERY - 1))
    return [*mixed, request("/metrics", b"", method="GET")]


def _serve(bundle: Path, workers: int, leak_bytes: int, out: Any) -> None:
    leak, write = bytearray(), oip.write_response

    def write_and_leak(*arguments: Any) -> Any:
        leak.extend(bytes(leak_bytes))
        return write(*arguments)

    if leak_bytes:
        oip.write_response = write_and_leak
    options = ServeOptions(port=0, workers=workers, threads=1)
    serve_bundle(bundle, options, ready=lambda url: out.put(int(url.rpartition(":")[2])))


@contextmanager
def served(bundle: Path, workers: int, leak_bytes: int) -> Iterator[tuple[int, list[int]]]:
    """Run a server; yields its port and the ids of its processes."""
    context = mp.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_serve, args=(bundle, workers, leak_bytes, out))
    process.start()
    try:
        port = out.get(timeout=60)
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        yield port, [process.pid or 0, *(int(pid) for task in tasks for pid in (task / "children").read_text().split())]
    finally:
        process.terminate()
        process.join()


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of processes together, without what they share."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(1024 * int(text.partition("\nPss:")[2].split()[0]) for text in texts)


async def send(port: int, contents: list[bytes], total: int, pids: list[int]) -> dict[str, Any]:
    """Send requests and return the samples, the statuses and the duration."""
    counts, resident, statuses = [0], [resident_bytes(pids)], Counter[int]()
    numbers, done = itertools.count(), asyncio.Event()
    begin_s = time.perf_counter()

    def handle(connection: Connection, reply: Reply) -> None:
        statuses[reply.status] += 1
        answered = statuses.total()
        if answered % SAMPLE_EVERY == 0:
            counts.append(answered)
            resident.append(resident_bytes(pids))
        if (number := next(numbers)) < total:
            connection.send(contents[number % len(contents)], 0.0)
        elif answered >= total:
            done.set()

    for _ in range(CONNECTIONS):
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(handle), "127.0.0.1", port
        )
        connection.send(contents[next(numbers) % len(contents)], 0.0)
    await done.wait()
    seconds = time.perf_counter() - begin_s
    return {"counts": counts, "resident": resident, "statuses": dict(statuses), "seconds": seconds}


def work(bundle: Path, total: int, workers: int, leak_bytes: int) -> None:
    """Measure one case and print it as JSON. Runs in its own process."""
    with served(bundle, workers, leak_bytes) as (port, pids):
        print(json.dumps(uvloop.run(send(port, requests_of(bundle), total, pids))))


def main(bundle: Path, total: int) -> None:
    """Measure and write the page; exit with 1 if a check fails."""
    rows, passed = [], []
    for name, workers, leak_bytes in CASES:
        arguments = [str(bundle), str(total), str(workers), str(leak_bytes)]
        run, growth, cells = measured([sys.executable, __file__, "--work", *arguments])
        passed.append(growth.passed != bool(leak_bytes))
        statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(run["statuses"].items()))
        rows.append([name, f"{run['counts'][-1]:,}", statuses, *cells])
    columns = ["server", "requests", "statuses", *MEASURED]
    write_page(
        "server_memory",
        "2-core-cpu",
        f"Resident memory of the server over {total:,} requests",
        [
            f"Bundle `{bundle.name}`, {CONNECTIONS} connections. Memory is the proportional set size of all processes. "
            f"Slope in bytes per request over the second half, limit {LIMIT_BYTES:g}; bound as on the page of "
            "`memory_slope.py`.",
            table(columns, rows),
            f"Passed: {all(passed)} (the planted leak of {PLANTED_BYTES} bytes per tensor request must be flagged, the "
            "others must not).",
        ],
    )
    sys.exit(not all(passed))


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)

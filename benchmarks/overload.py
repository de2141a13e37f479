"""Measure goodput and refusals of the server at several times its capacity.

    python benchmarks/overload.py NETWORK:ROWS... [--factors 1 2 5] [--seconds 8] [--rounds 5]

NETWORK has random weights; a request holds ROWS images as raw bytes and has the budget full, so that all requests cost
the same. One worker process answers; server and client run on different processors.

The capacity is the requests per second that 8 connections get answered if each one sends the next request after the
answer. Then requests arrive at random times (Poisson, open loop) at a multiple of the capacity. Goodput is the answers
with status 200 per second. The server refuses requests (503) beyond its limit of waiting ones. A refusal counts from
the sending of its request, an answer from its due time. The client is one process: its share of a processor is on the
page, because at 100 % it would be too slow to tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from overhead_networks import export
from page import table, write_page
from rate_limiter import processors

from mexit import Bundle
from mexit.flows.serve import ServeOptions, serve_bundle

CONNECTIONS, CLOSED_LOOP = 256, 8
WANTED, REFUSAL_MS = 0.9, 10.0  # goodput as a share of the capacity; duration of a refusal
WARM_UP_S = 1.0


@dataclass(frozen=True)
class Reply:
    """An answer: its status of HTTP, and when its request was due, sent and answered, by `time.perf_counter`."""

    status: int
    due_s: float
    sent_s: float
    end_s: float


class Connection(asyncio.Protocol):
    """A connection of HTTP/1.1 with one request at a time."""

    def __init__(self, on_reply: Callable[[Connection, Reply], None]) -> None:
        self._on_reply, self._received = on_reply, b""
        self._times = 0.0, 0.0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, content: bytes, due_s: float) -> None:
        """Send a request."""
        self._times, self._received = (due_s, time.perf_counter()), b""
        self.transport.write(content)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]):
            self._on_reply(self, Reply(int(head[9:12]), *self._times, time.perf_counter()))


class Client:
    """Connections to a server; requests wait for a free one."""

    def __init__(self, content: bytes) -> None:
        """`content` is the bytes of each request."""
        self._content = content
        self._free: list[Connection] = []
        self._waiting: deque[float] = deque()
        self._count, self._again_until_s = 0, 0.0
        self.replies: list[Reply] = []

    async def connect(self, port: int, count: int) -> None:
        """Open connections."""
        loop = asyncio.get_running_loop()
        for _ in range(count):
            _, connection = await loop.create_connection(lambda: Connection(self._handle), "127.0.0.1", port)
            self._free.append(connection)
        self._count += count

    async def closed_loop(self, seconds: float) -> list[Reply]:
        """Every connection sends its next request after the answer to the last one."""
        self._again_until_s = time.perf_counter() + seconds
        for _ in range(len(self._free)):
            self._send(time.perf_counter())
        await asyncio.sleep(seconds)
        return await self._rest()

    async def open_loop(self, rate: float, seconds: float, seed: int) -> list[Reply]:
        """Requests at random times, `rate` per second."""
        gaps_s = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
        begin_s = time.perf_counter()
        for due_s in (begin_s + np.cumsum(gaps_s)).tolist():
            while (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            self._send(due_s)
        return await self._rest()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._free:
            connection.transport.close()

    async def _rest(self) -> list[Reply]:
        """The replies, once all requests are answered."""
        while self._waiting or len(self._free) < self._count:
            await asyncio.sleep(0.01)
        replies, self.replies = self.replies, []
        return replies

    def _send(self, due_s: float) -> None:
        if self._free:
            self._free.pop().send(self._content, due_s)
        else:
            self._waiting.append(due_s)

    def _handle(self, connection: Connection, reply: Reply) -> None:
        self.replies.append(reply)
        self._free.append(connection)
        if self._waiting:
            self._send(self._waiting.popleft())
        elif reply.end_s < self._again_until_s:
            self._send(reply.end_s)


@dataclass(frozen=True)
class Figures:
    """Measurements of one period.

    Attributes:
        goodput: answers with status 200 per second.
        refused: answers with status 503 per second.
        other: answers with another status.
        refusal_ms: duration of each refusal, milliseconds.
        answer_ms: duration of each answer with status 200, milliseconds.
        client: share of a processor that the client used.
    """

    goodput: float
    refused: float
    other: int
    refusal_ms: list[float]
    answer_ms: list[float]
    client: float


def figures(replies: Sequence[Reply], seconds: float, client_s: float) -> Figures:
    """The figures of a period of `seconds`, without its first `WARM_UP_S` and what was answered after it."""
    begin_s = min(reply.due_s for reply in replies)
    start_s, end_s = begin_s + WARM_UP_S, begin_s + seconds
    counted = [reply for reply in replies if start_s <= reply.end_s < end_s]
    good = [1e3 * (reply.end_s - reply.due_s) for reply in counted if reply.status == 200]
    refused = [1e3 * (reply.end_s - reply.sent_s) for reply in counted if reply.status == 503]
    length_s = end_s - start_s
    other = sum(reply.status not in (200, 503) for reply in replies)
    return Figures(len(good) / length_s, len(refused) / length_s, other, refused, good, client_s / seconds)


def request_bytes(bundle: Path, rows: int) -> bytes:
    """An inference request for random images."""
    spec, name = Bundle.open(bundle).manifest.input, bundle.name
    images = np.random.default_rng(0).random((rows, *spec.shape), np.float32)
    tensor = {"name": spec.name, "shape": list(images.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": images.nbytes}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]}).encode()
    lines = (
        f"POST /v2/models/{name}/infer HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(head) + images.nbytes}",
        f"Inference-Header-Content-Length: {len(head)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + head + images.tobytes()


def _serve(bundle: Path, usable: set[int], out: Any) -> None:
    os.sched_setaffinity(0, usable)
    options = ServeOptions(budget="full", port=0, workers=1, threads=1)
    serve_bundle(bundle, options, ready=lambda url: out.put(int(url.rpartition(":")[2])))


@contextmanager
def served(bundle: Path) -> Iterator[int]:
    """Run a server in another process; yields its port. This process keeps off the processors of the server."""
    usable, own = os.sched_getaffinity(0), processors(of_server=False)
    out = mp.get_context("spawn").Queue()
    process = mp.get_context("spawn").Process(target=_serve, args=(bundle, usable - own, out))
    process.start()
    os.sched_setaffinity(0, own)
    try:
        yield out.get(timeout=60)
    finally:
        os.sched_setaffinity(0, usable)
        process.terminate()
        process.join()


async def measure(
    port: int, content: bytes, connections: int, rate: float | None, seconds: float, seed: int
) -> Figures:
    """A period in a closed loop, or at a rate of requests per second in an open one."""
    client, before_s = Client(content), time.process_time()
    await client.connect(port, connections)
    replies = await (client.closed_loop(seconds) if rate is None else client.open_loop(rate, seconds, seed))
    client.close()
    return figures(replies, seconds, time.process_time() - before_s)


def measure_all(
    port: int, content: bytes, factors: Sequence[float], seconds: float, rounds: int
) -> tuple[list[float], dict[float, list[tuple[float, Figures]]]]:
    """The capacities, and for each factor the share of the capacity of the same round and the figures."""
    capacities: list[float] = []
    results: dict[float, list[tuple[float, Figures]]] = {factor: [] for factor in factors}
    for seed in range(rounds):
        capacities.append(uvloop.run(measure(port, content, CLOSED_LOOP, None, seconds, 0)).goodput)
        for factor in factors:
            rate = factor * capacities[-1]
            found = uvloop.run(measure(port, content, CONNECTIONS, rate, seconds, seed))
            results[factor].append((found.goodput / capacities[-1], found))
    return capacities, results


def row(case: str, factor: float, found: Sequence[tuple[float, Figures]]) -> list[object]:
    """A line of the table."""
    shares = sorted(share for share, _ in found)
    refusals = np.array([one for _, figures in found for one in figures.refusal_ms] or [0.0])
    answers = np.array([one for _, figures in found for one in figures.answer_ms] or [np.inf])
    p50, p99, p999 = np.quantile(refusals, (0.5, 0.99, 0.999))
    return [
        case,
        f"{factor:g}",
        f"{statistics.median(shares):.3f} ({shares[0]:.3f} to {shares[-1]:.3f})",
        f"{statistics.median(figures.refused for _, figures in found):.0f}",
        f"{p50:.2f} / {p99:.2f} / {p999:.2f} / {refusals.max():.2f}",
        " / ".join(f"{one:.1f}" for one in np.quantile(answers, (0.5, 0.99))),
        sum(figures.other for _, figures in found),
        f"{100 * max(figures.client for _, figures in found):.0f} %",
    ]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="NETWORK:ROWS")
    parser.add_argument("--factors", nargs="+", type=float, default=[1, 2, 5])
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("this program needs two processors: one for the server and one for the client")
    rows: list[list[object]] = []
    verdicts: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            network, _, count = case.partition(":")
            bundle = Path(folder) / network
            if not bundle.exists():
                export(network, Path(folder)).bundle.write()
            content = request_bytes(bundle, int(count or 1))
            with served(bundle) as port:
                capacities, results = measure_all(port, content, options.factors, options.seconds, options.rounds)
            capacity = statistics.median(capacities)
            name = f"{network}, {count or 1} images, {len(content) / 1024:.0f} KiB, {1e3 / capacity:.2f} ms"
            rows += [row(name, factor, found) for factor, found in results.items()]
            share = statistics.median(share for share, _ in results[max(results)])
            late = np.quantile([one for _, found in results[max(results)] for one in found.refusal_ms] or [0.0], 0.99)
            held = share >= WANTED and late <= REFUSAL_MS
            verdicts.append(f"{name}: {'held' if held else 'NOT held'}")
    columns = [
        "case, time per answer", "times the capacity", "goodput / capacity: median (range)", "refusals/s",
        "refusal p50 / p99 / p99.9 / max, ms", "answer p50 / p99, ms", "other statuses", "client's processor",
    ]  # fmt: skip
    write_page(
        "overload",
        f"{os.cpu_count()}-core-cpu",
        "Goodput and refusals under overload",
        [
            f"One worker process on {len(processors(of_server=True))} processor, the client on another; closed loop of "
            f"{CLOSED_LOOP} connections, open loop of {CONNECTIONS}; {options.rounds} rounds of {options.seconds:g} s.",
            table(columns, rows),
            f"Goodput of at least {WANTED:.0%} of the capacity and 99 % of the refusals within {REFUSAL_MS:g} ms, at "
            f"{max(options.factors):g} times the capacity:",
            "\n".join(f"- {verdict}" for verdict in verdicts),
        ],
    )


if __name__ == "__main__":
    main()

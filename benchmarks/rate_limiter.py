"""Measure clean clients beside a slowdown attacker, with and without the rate limiter.

    python benchmarks/rate_limiter.py BUNDLE [SECONDS]

A server and clients with different addresses. Each client is an open loop: requests are due at fixed times, whether or
not earlier ones were answered, and latency counts from the due time. The clean clients need 20 % of the capacity of the
server. The attacker sends DeepSloth images (`attacks.slowdown`) for ten times the capacity. The rates are 80 % of the
capacity for all clients together and 40 % for each client.

A refusal is quick and a refused client retries at once, so a rate-limited attacker sends many more requests than an
unlimited one. On shared processors, sending and refusing these requests would reduce the capacity of
the server. Server and clients therefore run on different processors, clients prepare their requests in advance, and
the capacity, in MACs per second, is measured while the attackers are active. The page shows the processor time of both.

Accuracy and latency are those of the clean clients. A request is late if it was refused or answered after the deadline.
The run of the bundle must exist below the current folder, because the attack needs its gradients.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing as mp
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from page import table, write_page

from mexit import Runtime
from mexit.data import registry
from mexit.data.splits import Splits
from mexit.flows.serve import ServeOptions, serve_bundle

BUDGET, DEADLINE_MS = "medium", 200.0
CLEAN, CLEAN_LOAD, ATTACK_LOAD = 4, 0.2, 10.0
OVERALL, EACH = 0.8, 0.4  # rates, as shares of the capacity
ATTACK_ROWS, IMAGES = 64, 400
MAX_REQUESTS = 40  # clean requests per second; the rows per request follow
THREADS_CLEAN, THREADS_ATTACK = 4, 24  # connections per client
PROBE_S = 5.0


@dataclass(frozen=True)
class Stream:
    """The requests of one client: batches of `rows` images, `every_s` seconds apart, from its own address."""

    address: str
    images: np.ndarray
    labels: np.ndarray
    rows: int
    every_s: float
    connections: int
    deadline_ms: float | None


@dataclass(frozen=True)
class Sent:
    """One request: HTTP status, seconds from the due time to the answer, correctly classified rows, rows."""

    status: int
    seconds: float
    correct: int
    rows: int


@dataclass(frozen=True)
class ScenarioResult:
    """One scenario.

    Attributes:
        sent: the requests of each address.
        macs: MACs that the server ran in `seconds` from the first request to the last answer.
        server_s, clients_s: processor time, seconds.
    """

    sent: dict[str, list[Sent]]
    macs: float
    seconds: float
    server_s: float
    clients_s: float


def processors(of_server: bool) -> set[int]:
    """Processors of the server: all but the last one, which is that of the clients. A single one is shared."""
    usable = sorted(os.sched_getaffinity(0))
    return set(usable[:-1] if of_server else usable[-1:]) or set(usable)


def client(stream: Stream, port: int, model: str, start: Any, seconds: float, out: Any) -> None:
    """A client process: puts its address, a list of `Sent` and its processor time into the queue."""
    os.sched_setaffinity(0, processors(of_server=False))
    sent: list[Sent] = []
    numbers, lock = iter(range(int(seconds / stream.every_s))), threading.Lock()
    contents = _contents(stream)
    start.wait()
    begin_s = time.monotonic()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, 60, source_address=(stream.address, 0))
        while True:
            with lock:
                number = next(numbers, None)
            due_s = begin_s + (number or 0) * stream.every_s
            if number is None or time.monotonic() > begin_s + seconds:
                return connection.close()
            time.sleep(max(0.0, due_s - time.monotonic()))
            sent.append(_request(connection, model, *contents[number % len(contents)], due_s))

    threads = [threading.Thread(target=work) for _ in range(stream.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put((stream.address, sent, time.process_time()))


def _contents(stream: Stream) -> list[tuple[bytes, int, np.ndarray]]:
    """Bodies of successive requests, the lengths of their JSON heads, and the labels."""
    contents = []
    for number in range(len(stream.images)):
        rows = (np.arange(stream.rows) + number * stream.rows) % len(stream.images)
        images = np.ascontiguousarray(stream.images[rows])
        tensor = {"name": "input", "shape": list(images.shape), "datatype": "FP32"}
        tensor["parameters"] = {"binary_data_size": images.nbytes}
        parameters = {} if stream.deadline_ms is None else {"mexit_deadline_us": stream.deadline_ms * 1e3}
        head = json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}], "parameters": parameters}).encode()
        contents.append((head + images.tobytes(), len(head), stream.labels[rows]))
    return contents


def _request(connection: Any, model: str, content: bytes, head: int, labels: np.ndarray, due_s: float) -> Sent:
    headers = {"Inference-Header-Content-Length": str(head)}
    connection.request("POST", f"/v2/models/{model}/infer", content, headers)
    response = connection.getresponse()
    answer, seconds = response.read(), time.monotonic() - due_s
    if response.status != 200:
        return Sent(response.status, seconds, 0, len(labels))
    correct = int((np.array(json.loads(answer)["outputs"][0]["data"]) == labels).sum())
    return Sent(200, seconds, correct, len(labels))


def _serve(bundle: str, rates: dict[str, int], out: Any) -> None:
    os.sched_setaffinity(0, processors(of_server=True))
    options = ServeOptions(budget=BUDGET, port=0, **rates)
    serve_bundle(Path(bundle), options, ready=lambda url: out.put(int(url.rpartition(":")[2])))


@contextmanager
def served(bundle: str, rates: dict[str, int]) -> Iterator[int]:
    """Run a server in another process; yields its port."""
    out = mp.get_context("spawn").Queue()
    process = mp.get_context("spawn").Process(target=_serve, args=(bundle, rates, out))
    process.start()
    try:
        yield out.get(timeout=60)
    finally:
        process.terminate()
        process.join()


def series(port: int, name: str) -> float:
    """The sum of one metric of the server over its labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def scenario(bundle: str, model: str, streams: list[Stream], rates: dict[str, int], seconds: float) -> ScenarioResult:
    """Run a server and its clients at the same time."""
    context = mp.get_context("spawn")
    with served(bundle, rates) as port:
        out, start = context.Queue(), context.Barrier(len(streams) + 1)
        processes = [
            context.Process(target=client, args=(stream, port, model, start, seconds, out)) for stream in streams
        ]
        for process in processes:
            process.start()
        before_s = series(port, "process_cpu_seconds_total")
        start.wait()
        begin_s = time.monotonic()
        outputs = [out.get(timeout=seconds + 120) for _ in processes]
        took_s = time.monotonic() - begin_s
        for process in processes:
            process.join()
        server_s = series(port, "process_cpu_seconds_total") - before_s
        sent = {address: one for address, one, _ in outputs}
        return ScenarioResult(sent, series(port, "mexit_macs_total"), took_s, server_s, sum(one for *_, one in outputs))


def capacity(bundle: str, model: str, images: np.ndarray, labels: np.ndarray) -> float:
    """MACs per second of the server without a rate limiter, while all attackers are active."""
    probe = Stream("127.0.3.1", images, labels, ATTACK_ROWS, 1e-3, THREADS_ATTACK, None)
    result = scenario(bundle, model, [probe], {}, PROBE_S)
    return result.macs / result.seconds


def slowdown_images(runtime: Runtime, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """DeepSloth images against the served policy, with the gradients of the run of the bundle."""
    import torch

    from mexit.attacks.policy_attacks import AttackTarget
    from mexit.attacks.slowdown import slowdown_attack
    from mexit.attacks.soft_policy import SoftPolicy
    from mexit.evaluate.target import GradientSource

    source = GradientSource.of_bundle(runtime.bundle)
    source.model.eval()
    pixels = torch.from_numpy(images)
    with torch.no_grad():
        policy = SoftPolicy.fit(runtime.policy(), source.model(pixels))
    config = source.settings.test_attack("average").pgd
    target = AttackTarget(source.model, policy, pixels, torch.from_numpy(labels), torch.arange(len(labels)), config)
    return np.asarray(slowdown_attack(target, "sloth").images.numpy())


def row(name: str, result: ScenarioResult, rates: dict[str, int], burst: float) -> list[object]:
    """The table row of one scenario."""
    sent_by, macs, seconds = result.sent, result.macs, result.seconds
    clean = [one for address, sent in sent_by.items() if address.startswith("127.0.1.") for one in sent]
    attack = [one for address, sent in sent_by.items() if address.startswith("127.0.2.") for one in sent]
    cells: list[object] = [name]
    if clean:
        late = sum(one.status != 200 or one.seconds * 1e3 > DEADLINE_MS for one in clean)
        answered = [one for one in clean if one.status == 200]
        times = np.array([one.seconds * 1e3 for one in answered]) if answered else np.array([np.nan])
        correct = sum(one.correct for one in answered) / max(1, sum(one.rows for one in answered))
        cells += [len(clean), f"{late / len(clean):.1%}"]
        cells += [f"{np.median(times):.1f}", f"{np.quantile(times, 0.99):.1f}", f"{correct:.2%}"]
    else:
        cells += ["-"] * 5
    refused = f"{sum(one.status != 200 for one in attack) / len(attack):.1%}" if attack else "-"
    bound = f"{macs / (burst + rates['rate'] * seconds):.3f}" if rates else "none"
    cells += [len(attack) or "-", refused, f"{macs / seconds / 1e6:.1f}", bound]
    return [*cells, f"{result.server_s / seconds:.2f}", f"{result.clients_s / seconds:.2f}"]


def main(bundle: str, seconds: str = "20") -> None:
    """Measure and write the page; `seconds` is the duration of a scenario."""
    runtime = Runtime.open(bundle, BUDGET)
    manifest = runtime.bundle.manifest
    splits = Splits.of_bundle(runtime.bundle)
    data, index = registry.load(splits.data_set), splits.part("test")[:IMAGES]
    images, labels = data.batch(index, manifest.input), data.labels[index]
    slow = slowdown_images(runtime, images, labels)
    clean_macs, slow_macs = (np.mean([one.macs for one in runtime.answer_tensor(some)]) for some in (images, slow))
    full = manifest.cumulative_macs[-1]
    capacity_macs = capacity(bundle, manifest.name, slow, labels)
    rates = {"rate": int(OVERALL * capacity_macs), "client_rate": int(EACH * capacity_macs)}
    burst = max(rates["rate"], full)

    rows = int(np.ceil(CLEAN_LOAD * capacity_macs / clean_macs / MAX_REQUESTS))
    every_s = CLEAN * rows * clean_macs / (CLEAN_LOAD * capacity_macs)
    attack_s = ATTACK_ROWS * full / (ATTACK_LOAD * capacity_macs)
    numbers = range(1, CLEAN + 1)
    clean_stream = (images, labels, rows, every_s, THREADS_CLEAN, DEADLINE_MS)
    clean = [Stream(f"127.0.1.{i}", *clean_stream) for i in numbers]
    attacker = Stream("127.0.2.1", slow, labels, ATTACK_ROWS, attack_s, THREADS_ATTACK, None)
    attackers = [replace(attacker, address=f"127.0.2.{i}", every_s=CLEAN * attack_s) for i in numbers]
    lines = []
    for name, streams in (
        ("clean alone", clean),
        ("one attacker", [*clean, attacker]),
        ("attackers alone", attackers),
    ):
        for kind, limits in (("rate limited", rates), ("unlimited", {})):
            result = scenario(bundle, manifest.name, streams, limits, float(seconds))
            lines.append(row(f"{name}, {kind}", result, limits, burst))
    columns = ["traffic", "clean requests", "late", "p50 ms", "p99 ms", "accuracy", "attack requests", "refused"]
    write_page(
        "rate_limiter",
        "2-core-cpu",
        f"The rate limiter under attack: `{manifest.name}` at budget {BUDGET}",
        [
            f"Capacity {capacity_macs / 1e6:.0f}M MACs/s; rate {rates['rate'] / 1e6:.0f}M MACs/s for all clients, "
            f"{rates['client_rate'] / 1e6:.0f}M for each client; bursts of one second. {CLEAN} clean clients "
            f"send {CLEAN_LOAD:.0%} of the capacity in requests of {rows} rows with a deadline of {DEADLINE_MS:g} "
            f"ms, the attacker {ATTACK_LOAD:g} times the capacity in requests of {ATTACK_ROWS} rows, {seconds} s "
            f"each. A clean image costs {clean_macs:,.0f} MACs on average, a slowdown image {slow_macs:,.0f} "
            f"(full: {full:,}). Server and clients run on different processors. The load average at the end was "
            f"{os.getloadavg()[1]:.1f}.",
            table([*columns, "M MACs/s", "of the bound", "server CPU", "clients' CPU"], lines),
            "Late: refused, or answered after the deadline. Latencies and accuracy are those of answered clean "
            "requests. Of the bound: MACs spent over burst + rate * T; at most 1. CPU: mean number of busy processors.",
        ],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

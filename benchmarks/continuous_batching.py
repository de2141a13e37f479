"""Compare three ways to answer the same requests: one at a time, in whole batches, by continuous batching.

    python benchmarks/continuous_batching.py BUNDLE|NETWORK... [--seconds 2] [--rounds 3] [--loads 0.8 1.3]

BUNDLE is a directory; NETWORK is a network with random weights, exported and calibrated on digits. Requests of 1 to 8
test images with the budgets low, medium and high arrive at random times (Poisson, open loop). Latency counts from the
due time of a request. All ways have the same number of workers and the same deadline:

- one at a time: a worker takes the next request and makes one call for it.
- whole batches: a worker takes all waiting requests, up to 64 rows, and makes one call per budget.
- continuous: `runtime.batching`.

The load is a fraction of the capacity, the requests per second that the first way answers while its queue is never
empty. The deadline is a multiple of the mean time of a single request. Every way refuses a request that is still in
the queue at its deadline. The ways alternate, so that other programs affect all of them. The load generator runs in
the same process; its cost is measured without a server.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batching_ways import (
    BUDGETS,
    MOST_ROWS,
    Continuous,
    DiscardRequests,
    OneAtATime,
    Outcome,
    Request,
    WholeBatches,
    send_stream,
)
from overhead_networks import export
from page import table, write_page

from mexit import Runtime
from mexit.core.resource_limits import read_limits
from mexit.data import registry
from mexit.data.splits import Splits
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle

LOADS = (0.3, 0.6, 0.8, 1.0, 1.3, 2.0)
BUSY = 0.1  # cores used by other processes, above which the page mentions them
DEADLINE = 25  # multiple of the mean time of a single request
SINGLE_S, CAPACITY_S = 10.0, 4.0  # approximate maximum duration of each measurement
NO_MISSES = (0.8, "continuous")  # load and way at which no deadline may be missed
WAYS = {"one at a time": OneAtATime, "whole batches": WholeBatches, "continuous": Continuous}


def requests(count: int, rate: float, samples: int, seed: int) -> list[Request]:
    """Draw `count` requests at `rate` per second."""
    rng = np.random.default_rng(seed)
    due_s = np.cumsum(rng.exponential(1 / rate, count))
    rows = rng.integers(1, MOST_ROWS + 1, count)
    first = rng.integers(0, samples - MOST_ROWS, count)
    budgets = rng.integers(0, len(BUDGETS), count)
    return [
        Request(int(one), int(some), BUDGETS[which], float(due))
        for one, some, which, due in zip(first, rows, budgets, due_s, strict=True)
    ]


def single_request_s(runtime: Runtime, tensor: np.ndarray) -> float:
    """Mean seconds of a single request, without the slowest fifth, which other programs delayed."""
    seconds, end_s = [], time.perf_counter() + SINGLE_S
    for request in requests(400, 1.0, len(tensor), seed=1):
        if (began_s := time.perf_counter()) > end_s:
            break
        runtime.answer_tensor(tensor[request.first : request.first + request.rows], budget=request.budget)
        seconds.append(time.perf_counter() - began_s)
    return float(np.mean(np.sort(seconds)[: int(0.8 * len(seconds))]))


def capacity(open_way: Callable, tensor: np.ndarray, service_s: float) -> float:
    """Requests per second if all arrive at once: the median of five measurements."""
    rates, count = [], min(1000, int(CAPACITY_S / service_s))
    for seed in range(5):
        way = open_way()
        _, seconds, _ = send_stream(way, requests(count, 1e9, len(tensor), seed))
        rates.append(count / seconds)
    return float(np.median(rates))


@dataclass(frozen=True)
class Figures:
    """Measurements of one round of one way at one load; `missed` and `cut` are fractions."""

    goodput: float
    missed: float
    cut: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def figures(outcomes: list[Outcome], seconds: float, cpu_s: float, deadline_s: float) -> Figures:
    times = np.array([np.inf if one.seconds is None else one.seconds for one in outcomes])
    in_time = times <= deadline_s
    by_policy = np.array([one.by_policy for one in outcomes])
    p50, p99 = np.quantile(times, (0.5, 0.99), method="higher") * 1e3
    return Figures(
        float((in_time & by_policy).sum() / seconds),
        float(1 - in_time.mean()),
        float((in_time & ~by_policy).mean()),
        float(p50),
        float(p99),
        cpu_s / len(outcomes) * 1e6,
    )


@dataclass(frozen=True)
class BenchmarkNetwork:
    """A bundle under test, its time for a single request and its capacity in requests per second."""

    name: str
    runtime: Runtime
    tensor: np.ndarray
    workers: int
    service_s: float
    capacity_rps: float

    @property
    def deadline_s(self) -> float:
        return DEADLINE * self.service_s

    @staticmethod
    def open(bundle_or_network: str) -> BenchmarkNetwork:
        """Open a bundle directory, or export a network by name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(bundle_or_network)
            if not path.is_dir():
                path = _random_bundle(bundle_or_network, Path(folder))
            runtime = Runtime.open(path, "medium", threads=1)
            return BenchmarkNetwork.of(runtime, path.name)

    @staticmethod
    def of(runtime: Runtime, name: str) -> BenchmarkNetwork:
        manifest = runtime.bundle.manifest
        data = registry.load(manifest.splits.data_set)
        index = Splits.of_bundle(runtime.bundle).part("test")
        tensor, workers = data.batch(index, manifest.input), read_limits().threads
        service_s = single_request_s(runtime, tensor)
        capacity_rps = capacity(lambda: OneAtATime(runtime, tensor, workers, 1e9), tensor, service_s)
        return BenchmarkNetwork(name, runtime, tensor, workers, service_s, capacity_rps)

    def requests(self, load: float, seconds: float, seed: int) -> list[Request]:
        return requests(int(load * self.capacity_rps * seconds), load * self.capacity_rps, len(self.tensor), seed)

    def open_way(self, kind):
        return kind(self.runtime, self.tensor, self.workers, self.deadline_s)


def _random_bundle(network: str, folder: Path) -> Path:
    """Write a calibrated bundle of a network with random weights."""
    bundle = export(network, folder).bundle
    bundle.write()
    calibrate_bundle(bundle.path, options=CalibrateOptions(policy="geometric", attack="none"), backend="ort", threads=1)
    return bundle.path


@dataclass(frozen=True)
class Schedule:
    """Duration of a round, number of rounds, and loads as fractions of the capacity."""

    seconds: float
    rounds: int
    loads: Sequence[float]


Results = dict[tuple[float, str], list[Figures]]


def run(network: BenchmarkNetwork, schedule: Schedule) -> Results:
    """Measure every way at every load in alternating rounds."""
    results: Results = {(load, name): [] for load in schedule.loads for name in WAYS}
    for seed in range(schedule.rounds):
        for load in schedule.loads:
            stream = network.requests(load, schedule.seconds, 10 + seed)
            for name, kind in WAYS.items():
                outcome = send_stream(network.open_way(kind), stream)
                results[load, name].append(figures(*outcome, network.deadline_s))
    return results


def other_processes_s() -> float:
    """Processor seconds of all other processes since the system start; 0.0 if the system does not report them."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    except OSError:
        return 0.0
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE|NETWORK")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="fractions of the capacity")
    parser.add_argument("--page", default="continuous_batching", help="name of the page")
    arguments = parser.parse_args()
    began_s, began_other_processes_s = time.perf_counter(), other_processes_s()
    networks = [BenchmarkNetwork.open(bundle) for bundle in arguments.bundles]
    stream = networks[0].requests(1.0, 1.0, seed=1)
    _, _, generator_s = send_stream(DiscardRequests(), stream)
    schedule = Schedule(arguments.seconds, arguments.rounds, arguments.loads)
    results = [run(network, schedule) for network in networks]
    others = (other_processes_s() - began_other_processes_s) / (time.perf_counter() - began_s)
    write(arguments.page, networks, results, schedule, generator_s / len(stream) * 1e6, others)


def write(
    page: str,
    networks: list[BenchmarkNetwork],
    results: list[Results],
    schedule: Schedule,
    generator_us: float,
    others: float,
) -> None:
    busy = f" Other processes kept {others:.1f} cores busy meanwhile." if others > BUSY else ""
    about = [
        f"`{one.name}`: a single request takes {one.service_s * 1e3:.2f} ms on average, the deadline is "
        f"{DEADLINE} times that, {one.deadline_s * 1e3:.1f} ms; the capacity is "
        f"{one.capacity_rps:.0f} requests per second."
        for one in networks
    ]
    lines = [line for one, figures in zip(networks, results, strict=True) for line in _lines(one.name, figures)]
    columns = [
        "bundle",
        "load",
        "way",
        "goodput/s",
        "missed",
        "cut short",
        "p50 ms",
        "p99 ms",
        "CPU us per request",
    ]
    write_page(
        page,
        "2-core-cpu",
        "Continuous batching against one at a time and whole batches",
        [
            f"Requests of 1 to {MOST_ROWS} images with budgets {', '.join(BUDGETS)}, {schedule.seconds:g} s "
            f"a round, {schedule.rounds} rounds, {networks[0].workers} workers. The load generator runs in the same "
            f"process and takes {generator_us:.0f} us of processor time per request.{busy}",
            "\n".join(f"- {line}" for line in about),
            table(columns, lines),
            "Goodput: answered in time, and by the exit that the policy chose (median of the rounds, and their "
            "range). Missed: refused or answered after the deadline. Cut short: answered in time, but some row "
            "by an earlier exit because of the deadline. Latencies count from when a request was due, refused "
            "ones as infinite. The CPU time includes the load generator.",
            "Goodput of continuous batching over the better of the other two, by load. Target: at least 0.95 at "
            "every load, and no misses at 80 %.",
            "\n".join(f"- {_summary(one.name, figures)}" for one, figures in zip(networks, results, strict=True)),
        ],
    )


def _median(rounds: list[Figures], what: str) -> float:
    return float(np.median([getattr(one, what) for one in rounds]))


def _lines(bundle: str, results: Results) -> list[list[str]]:
    lines = []
    for (load, name), rounds in results.items():
        spread = [one.goodput for one in rounds]
        lines.append(
            [
                bundle,
                f"{load:.0%}",
                name,
                f"{_median(rounds, 'goodput'):.0f} ({min(spread):.0f} to {max(spread):.0f})",
                f"{sum(one.missed for one in rounds) / len(rounds):.2%}",
                f"{sum(one.cut for one in rounds) / len(rounds):.2%}",
                *(f"{_median(rounds, what):.2f}" for what in ("p50_ms", "p99_ms")),
                f"{_median(rounds, 'cpu_us'):.0f}",
            ]
        )
    return lines


def _summary(bundle: str, results: Results) -> str:
    def ratio(load: float) -> float:
        ours, *others = (_median(results[load, name], "goodput") for name in reversed(WAYS))
        return ours / max(others)

    ratios = {load: ratio(load) for load, _ in results}
    missed = [one.missed for (load, name), rounds in results.items() for one in rounds if (load, name) == NO_MISSES]
    met = "met" if min(ratios.values()) >= 0.95 and not sum(missed) else "not met"
    text = ", ".join(f"{load:.0%}: {one:.2f}" for load, one in ratios.items())
    return f"`{bundle}`: {text}; {np.mean(missed):.2%} missed at 80 %: {met}."


if __name__ == "__main__":
    main()

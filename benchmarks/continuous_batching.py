"""Three ways to answer the same stream of requests: one at a time, in whole batches, continuously.

    python benchmarks/continuous_batching.py BUNDLE|NETWORK... [--seconds 2] [--rounds 3] [--loads 0.8 1.3]

The name of a network instead of a bundle's folder stands for one with random weights, exported and calibrated on
digits. Requests of 1 to 8 test images with the budgets low, medium and high come at random times (Poisson),
whether or not earlier ones were answered; latency counts from when a request was due. All have the same workers
and deadline:

- one at a time: workers take requests in order, each is a call of its own.
- whole batches: a worker takes all that waits, up to 64 rows, and makes one call of each budget's rows.
- continuous: `runtime.batching`.

The load is a share of the capacity, which is measured first: how many requests a second the first way answers when
there is always one waiting. The deadline is a multiple of the mean time of a request that is alone. A request that
was in the queue until its deadline is refused by every way. The ways take turns, round after round, so that they
share whatever else the machine does; so does the load generator, which runs in the same process: what it costs is
measured without a server.
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
    NoServer,
    OneAtATime,
    Outcome,
    Request,
    WholeBatches,
    play,
)
from overhead_networks import export
from page import table, write_page

from mexit import Runtime
from mexit.core.resource_limits import read_limits
from mexit.data import registry
from mexit.data.splits import Splits
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle

LOADS = (0.3, 0.6, 0.8, 1.0, 1.3, 2.0)
BUSY = 0.1  # cores that others use before it is worth a word
DEADLINE = 25  # mean times of a request alone
ALONE_S, CAPACITY_S = 10.0, 4.0  # spent on measuring these, at most about


AT_EASE = (0.8, "continuous")  # where no deadline may be missed
WAYS = {"one at a time": OneAtATime, "whole batches": WholeBatches, "continuous": Continuous}


def requests(count: int, rate: float, samples: int, seed: int) -> list[Request]:
    """`count` requests at `rate` a second."""
    rng = np.random.default_rng(seed)
    due_s = np.cumsum(rng.exponential(1 / rate, count))
    rows = rng.integers(1, MOST_ROWS + 1, count)
    first = rng.integers(0, samples - MOST_ROWS, count)
    budgets = rng.integers(0, len(BUDGETS), count)
    return [
        Request(int(one), int(some), BUDGETS[which], float(due))
        for one, some, which, due in zip(first, rows, budgets, due_s, strict=True)
    ]


def alone_s(runtime: Runtime, tensor: np.ndarray) -> float:
    """Mean seconds of a request when nothing else runs, without the slowest fifth, which others held up."""
    seconds, end_s = [], time.perf_counter() + ALONE_S
    for request in requests(400, 1.0, len(tensor), seed=1):
        if (began_s := time.perf_counter()) > end_s:
            break
        runtime.answer_tensor(tensor[request.first : request.first + request.rows], budget=request.budget)
        seconds.append(time.perf_counter() - began_s)
    return float(np.mean(np.sort(seconds)[: int(0.8 * len(seconds))]))


def capacity(open_way: Callable, tensor: np.ndarray, service_s: float) -> float:
    """Requests a second when all are there at once: the median of some tries."""
    rates, count = [], min(1000, int(CAPACITY_S / service_s))
    for seed in range(5):
        way = open_way()
        _, seconds, _ = play(way, requests(count, 1e9, len(tensor), seed))
        rates.append(count / seconds)
    return float(np.median(rates))


@dataclass(frozen=True)
class Figures:
    """One round of one way at one load."""

    goodput: float
    missed: float
    cut: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def figures(outcomes: list[Outcome], seconds: float, cpu_s: float, deadline_s: float) -> Figures:
    times = np.array([np.inf if one.seconds is None else one.seconds for one in outcomes])
    in_time = times <= deadline_s
    planned = np.array([one.as_planned for one in outcomes])
    p50, p99 = np.quantile(times, (0.5, 0.99), method="higher") * 1e3
    return Figures(
        float((in_time & planned).sum() / seconds),
        float(1 - in_time.mean()),
        float((in_time & ~planned).mean()),
        float(p50),
        float(p99),
        cpu_s / len(outcomes) * 1e6,
    )


@dataclass(frozen=True)
class BenchmarkNetwork:
    """A bundle under test, and what is known of it when nothing else runs."""

    name: str
    runtime: Runtime
    tensor: np.ndarray
    workers: int
    service_s: float
    able: float

    @property
    def deadline_s(self) -> float:
        return DEADLINE * self.service_s

    @staticmethod
    def open(given: str) -> BenchmarkNetwork:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(given) if Path(given).is_dir() else _random(given, Path(folder))
            runtime = Runtime.open(path, "medium", threads=1)
            return BenchmarkNetwork.of(runtime, path.name)

    @staticmethod
    def of(runtime: Runtime, name: str) -> BenchmarkNetwork:
        manifest = runtime.bundle.manifest
        data = registry.load(manifest.splits.data_set)
        index = Splits.of_bundle(runtime.bundle).part("test")
        tensor, workers = data.batch(index, manifest.input), read_limits().threads
        service_s = alone_s(runtime, tensor)
        able = capacity(lambda: OneAtATime(runtime, tensor, workers, 1e9), tensor, service_s)
        return BenchmarkNetwork(name, runtime, tensor, workers, service_s, able)

    def requests(self, load: float, seconds: float, seed: int) -> list[Request]:
        return requests(int(load * self.able * seconds), load * self.able, len(self.tensor), seed)

    def open_way(self, kind):
        return kind(self.runtime, self.tensor, self.workers, self.deadline_s)


def _random(network: str, folder: Path) -> Path:
    """A calibrated bundle of a network with random weights, which mixes exits as a trained one would."""
    bundle = export(network, folder).bundle
    bundle.write()
    calibrate_bundle(bundle.path, options=CalibrateOptions(policy="geometric", attack="none"), backend="ort", threads=1)
    return bundle.path


@dataclass(frozen=True)
class Play:
    """How often and how long the ways are compared."""

    seconds: float
    rounds: int
    loads: Sequence[float]


Found = dict[tuple[float, str], list[Figures]]


def run(subject: BenchmarkNetwork, given: Play) -> Found:
    """Every way at every load, round after round."""
    found: Found = {(load, name): [] for load in given.loads for name in WAYS}
    for seed in range(given.rounds):
        for load in given.loads:
            stream = subject.requests(load, given.seconds, 10 + seed)
            for name, kind in WAYS.items():
                played = play(subject.open_way(kind), stream)
                found[load, name].append(figures(*played, subject.deadline_s))
    return found


def others_s() -> float:
    """Processor seconds that all other processes have used so far; 0.0 where the system does not say."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    except OSError:
        return 0.0
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE|NETWORK")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="as shares of the capacity")
    parser.add_argument("--page", default="continuous_batching", help="its name")
    given = parser.parse_args()
    began_s, began_others_s = time.perf_counter(), others_s()
    subjects = [BenchmarkNetwork.open(bundle) for bundle in given.bundles]
    stream = subjects[0].requests(1.0, 1.0, seed=1)
    _, _, generator_s = play(NoServer(), stream)
    played = Play(given.seconds, given.rounds, given.loads)
    found = [run(subject, played) for subject in subjects]
    others = (others_s() - began_others_s) / (time.perf_counter() - began_s)
    write(given.page, subjects, found, played, generator_s / len(stream) * 1e6, others)


def write(
    page: str,
    subjects: list[BenchmarkNetwork],
    found: list[Found],
    played: Play,
    generator_us: float,
    others: float,
) -> None:
    busy = f" Other processes kept {others:.1f} cores busy meanwhile." if others > BUSY else ""
    about = [
        f"`{one.name}`: a request alone takes {one.service_s * 1e3:.2f} ms in the mean, the deadline is "
        f"{DEADLINE} times that, {one.deadline_s * 1e3:.1f} ms; the capacity is {one.able:.0f} requests a second."
        for one in subjects
    ]
    lines = [line for one, figures in zip(subjects, found, strict=True) for line in _lines(one.name, figures)]
    columns = ["bundle", "load", "way", "goodput/s", "missed", "cut short", "p50 ms", "p99 ms", "CPU us a request"]
    write_page(
        page,
        "2-core-cpu",
        "Continuous batching against one at a time and whole batches",
        [
            f"Requests of 1 to {MOST_ROWS} images with budgets {', '.join(BUDGETS)}, {played.seconds:g} s "
            f"a round, {played.rounds} rounds, {subjects[0].workers} workers. The load generator runs in the same "
            f"process and takes {generator_us:.0f} us of a processor a request.{busy}",
            "\n".join(f"- {line}" for line in about),
            table(columns, lines),
            "Goodput: answered in time, and by the exit that the policy chose (median of the rounds, and their "
            "range). Missed: refused or answered after the deadline. Cut short: answered in time, but some row "
            "by an earlier exit because of the deadline. Latencies count from when a request was due, refused "
            "ones as infinite; the CPU time holds the load generator's.",
            "Continuous against the better of the other two, by load (at least 0.95 everywhere, and none missed "
            "at 80 %, were aimed at):",
            "\n".join(f"- {_verdict(one.name, figures)}" for one, figures in zip(subjects, found, strict=True)),
        ],
    )


def _median(rounds: list[Figures], what: str) -> float:
    return float(np.median([getattr(one, what) for one in rounds]))


def _lines(bundle: str, found: Found) -> list[list[str]]:
    lines = []
    for (load, name), rounds in found.items():
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


def _verdict(bundle: str, found: Found) -> str:
    def ratio(load: float) -> float:
        ours, *others = (_median(found[load, name], "goodput") for name in reversed(WAYS))
        return ours / max(others)

    ratios = {load: ratio(load) for load, _ in found}
    missed = [one.missed for (load, name), rounds in found.items() for one in rounds if (load, name) == AT_EASE]
    met = "met" if min(ratios.values()) >= 0.95 and not sum(missed) else "not met"
    told = ", ".join(f"{load:.0%}: {one:.2f}" for load, one in ratios.items())
    return f"`{bundle}`: {told}; {np.mean(missed):.2%} missed at 80 %: {met}."


if __name__ == "__main__":
    main()

"""Measure the overhead of the engine against one graph, segment 1 alone and the predicted speed-up.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/runtime_overhead.py

Networks have random weights and answer random images. Thresholds are geometric; their mean costs on these images lie
1/4, 1/2 and 3/4 of the way from exit 1 to the last exit. The paths alternate: in each round, a path makes one uncounted
call and then answers all images. The time of a path is the tenth percentile over the rounds, averaged over the images,
which reduces the effect of other programs. With one thread, times are processor times of the calling thread, which does
all the work; with two threads they are wall-clock times, which include the effect of other programs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from overhead_networks import CLASSES, LARGE, Network, bound, export
from overhead_tables import (
    BARE,
    BARE_1,
    BOUND,
    BUDGETS,
    ENGINE,
    ENGINE_1,
    NESTED,
    ONE,
    ONE_BOUND,
    RUNTIME,
    RUNTIME_1,
    SCORED,
    Case,
    adaptive,
    against_one_graph,
    leaving_at_exit_1,
    nested_if,
    where_it_goes,
)
from page import write_page

from mexit import Runtime
from mexit.calibrate.geometric import Ranking, geometric
from mexit.core.exit_policy import Policy, first_exit
from mexit.export.nested_if import policy_inputs
from mexit.runtime.backends.ort import OrtBackend, open_session
from mexit.runtime.engine import answer
from mexit.runtime.reference import run_all_exits

IMAGES = {1: 16, 8: 32, 64: 64}  # by batch
NETWORKS = ("small-cnn", "msdnet-cifar10", "resnet38", "resnet50")
THREADS, BATCHES = (1, 2), (1, 8, 64)
SECONDS, LEAST_ROUNDS = 8.0, 3
LARGE_IMAGES = 8  # of the large network, 50 ms each; and no batch of 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="duration of each case")
    parser.add_argument("--dry", action="store_true", help="print the tables, and write no page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks = [export(name) for name in arguments.networks]
    load = os.getloadavg()[0]
    cases = [
        measure(network, threads, batch, arguments.seconds)
        for network in networks
        for threads in THREADS
        for batch in BATCHES
        if not (network.name == LARGE and batch > LARGE_IMAGES)
    ]
    parts = [
        __doc__.split("\n\n", 2)[2].strip(),
        f"onnxruntime {onnxruntime.__version__}; {arguments.seconds:g} s for each network, threads and batch, in "
        f"{min(case.rounds for case in cases)} to {max(case.rounds for case in cases)} rounds; "
        f"load average of the machine before: {load:.1f}.",
        *against_one_graph(cases),
        *leaving_at_exit_1(cases),
        *adaptive(cases),
        *where_it_goes([case for case in cases if case.batch == 1], networks),
        *nested_if([case for case in cases if case.batch == 1]),
    ]
    if arguments.dry:
        print("\n\n".join(parts))
    else:
        write_page("runtime_overhead", "2-core-cpu", "Overhead of the engine", parts)


def measure(network: Network, threads: int, batch: int, seconds: float) -> Case:
    """Time every path of one case, alternating."""
    backend = OrtBackend(network.bundle, threads)
    count = LARGE_IMAGES if network.name == LARGE else IMAGES[batch]
    images = np.random.default_rng(0).random((count, *network.bundle.manifest.input.shape), np.float32)
    costs = network.bundle.manifest.cumulative_macs
    policies = {name: policy_at(share, backend, images, costs) for name, share in BUDGETS.items()}
    shares = {name: shares_of(policy, backend, images) for name, policy in policies.items()}
    batches = [images[start : start + batch] for start in range(0, count, batch)]
    calls = paths(network, backend, threads, batch, policies)
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    segments: list[list[list[float]]] = []
    clock = time.thread_time if threads == 1 else time.perf_counter
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, call in calls.items():
            call(batches[-1])
            times[name].append([timed(call, part, clock) for part in batches])
        segments.append([segment_times(backend, part, clock) for part in batches])
        rounds += 1
    micros = {name: typical(rows) for name, rows in times.items()}
    each = np.quantile(segments, 0.1, axis=0).mean(axis=0).tolist()
    print(f"{network.name}, {threads} thread(s), batch {batch}: {rounds} rounds", flush=True)
    return Case(network, threads, batch, micros, each, shares, rounds)


def paths(
    network: Network, backend: OrtBackend, threads: int, batch: int, policies: dict[str, Policy]
) -> dict[str, Callable[[Any], object]]:
    """Return the timed functions of a batch of images, by name."""
    exits, runtime = len(backend.segments), Runtime(network.bundle, backend, "full", threads=threads)
    whole = open_session(network.one_graph, "one graph", threads)
    names = [output.name for output in whole.get_outputs()]
    full = Policy("max-probability", False, (1.0,) * exits, (None,) * (exits - 1))
    no_exit = Policy("max-probability", False, (1.0,) * exits, (1e6,) * (exits - 1))
    calls: dict[str, Callable[[Any], object]] = {
        ONE: lambda part: whole.run(names, {"input": part}),
        BARE: lambda part: run_all_exits(backend, part),
        ENGINE: lambda part: answer(backend, part, full, CLASSES),
        SCORED: lambda part: answer(backend, part, no_exit, CLASSES),
        RUNTIME: runtime.answer_tensor,
        BARE_1: lambda part: backend.segments[0].run(backend.carry(part)),
        ENGINE_1: lambda part: answer(backend, part, full, CLASSES, max_exit=1),
        RUNTIME_1: lambda part: runtime.answer_tensor(part, max_exit=1),
    }
    for name, policy in policies.items():
        calls[name] = lambda part, policy=policy: answer(backend, part, policy, CLASSES)
        if batch > 1:
            calls[f"survivors, {name}"] = survivors_alone(backend, policy)
    if batch == 1:
        calls[ONE_BOUND], calls[BOUND] = bound(whole), lambda part: run_bound(backend, part)
        nested = open_session(network.nested, "single file", threads)
        for name, policy in {"full": no_exit, **policies}.items():
            inputs = policy_inputs(policy)
            calls[f"{NESTED}, {name}"] = lambda part, inputs=inputs: nested.run(None, {"input": part, **inputs})
    return calls


def timed(call: Callable[[Any], object], part: Any, clock: Callable[[], float]) -> float:
    """Microseconds of one call."""
    begin = clock()
    call(part)
    return (clock() - begin) * 1e6


def typical(rows: Sequence[Sequence[float]]) -> float:
    """Mean over batches of the tenth percentile over rounds: rows (rounds, batches)."""
    return float(np.quantile(rows, 0.1, axis=0).mean())


def segment_times(backend: OrtBackend, part: Any, clock: Callable[[], float]) -> list[float]:
    """Microseconds of each segment: through bound buffers for one image, through arrays for a batch."""
    if len(part) == 1:
        with runner_with(backend, part) as run_segment:
            return [timed(run_segment, k, clock) for k in range(1, len(backend.segments) + 1)]
    carried, micros = backend.carry(part), []
    for segment in backend.segments:
        begin = clock()
        carried, _ = segment.run(carried)
        micros.append((clock() - begin) * 1e6)
    return micros


def survivors_alone(backend: OrtBackend, policy: Policy) -> Callable[[Any], object]:
    """Return a function that runs every segment on the rows that reach it, which were selected in advance."""

    @cache
    def inputs_of(address: int) -> list[Any]:
        part = parts[address]
        exits, carried, inputs = np.array(answer(backend, part, policy, CLASSES).exits), backend.carry(part), []
        for k, segment in enumerate(backend.segments, start=1):
            inputs.append((segment, carried.take(np.flatnonzero(exits >= k))))
            carried, _ = segment.run(carried)
        return [(segment, rows) for segment, rows in inputs if rows.rows]

    def call(part: Any) -> None:
        address = part.ctypes.data
        parts[address] = part
        for segment, rows in inputs_of(address):
            segment.run(rows)

    parts: dict[int, Any] = {}
    return call


def run_bound(backend: OrtBackend, part: Any) -> None:
    """Run all segments through bound buffers, without decisions."""
    with runner_with(backend, part) as run_segment:
        for k in range(1, len(backend.segments) + 1):
            run_segment(k)


@contextmanager
def runner_with(backend: OrtBackend, part: Any) -> Iterator[Callable[[int], Any]]:
    """Take a runner of the engine, with the image in its buffers; yields its function for segment k."""
    assert backend.runners is not None
    runner = backend.runners.take()
    runner.start(part)
    yield runner.run
    backend.runners.give_back(runner)


def policy_at(share: float, backend: OrtBackend, images: Any, costs: Sequence[int]) -> Policy:
    """Geometric thresholds whose mean cost is nearest to `share` of the way from exit 1 to the last exit."""
    exits = len(costs)
    open_policy = Policy("max-probability", False, (1.0,) * exits, (None,) * (exits - 1))
    scores = open_policy.scorer(CLASSES).score(run_all_exits(backend, images))
    target = costs[0] + share * (costs[-1] - costs[0])

    def deviation(q: float) -> float:
        taken = first_exit(scores, geometric(Ranking.of(scores), q))
        return abs(float(np.mean([costs[k - 1] for k in taken])) - target)

    best = min(np.geomspace(0.05, 20, 200), key=deviation)
    return Policy("max-probability", False, (1.0,) * exits, geometric(Ranking.of(scores), float(best)))


def shares_of(policy: Policy, backend: OrtBackend, images: Any) -> list[float]:
    """The share of the images that leaves at each exit."""
    exits = np.array(answer(backend, images, policy, CLASSES).exits)
    return [float((exits == k).mean()) for k in range(1, len(backend.segments) + 1)]


if __name__ == "__main__":
    main()

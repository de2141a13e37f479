"""The tables of `runtime_overhead.py`: against one graph, leaving at exit 1, adaptive, and a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from node_profile import profile_graphs
from overhead_networks import Network
from page import table

BUDGETS = {"low": 0.25, "medium": 0.5, "high": 0.75}
ONE, ONE_BOUND, BOUND, BARE = "one graph", "one graph, bound", "segments, bound", "segments"
ENGINE, SCORED, RUNTIME = "engine", "engine, scoring", "Runtime"
BARE_1, ENGINE_1, RUNTIME_1, NESTED = "segment 1", "engine, exit 1", "Runtime, exit 1", "nested If"


@dataclass(frozen=True)
class Case:
    """The times of one network, number of threads and batch size.

    Attributes:
        micros: microseconds per batch of each path.
        segments: microseconds of each segment alone.
        shares: share of the images that leaves at each exit, per budget.
        rounds: number of rounds.
    """

    network: Network
    threads: int
    batch: int
    micros: dict[str, float]
    segments: list[float]
    shares: dict[str, list[float]]
    rounds: int


def against_one_graph(cases: Sequence[Case]) -> list[str]:
    """Table (a): all segments against one graph."""
    rows = [
        [*head(case), f"{us[ONE]:.0f}", *(f"{us[name] / us[ONE]:.3f}" for name in (BARE, ENGINE, SCORED, RUNTIME))]
        for case in cases
        for us in [case.micros]
    ]
    text = (
        "All segments for every image, as a multiple of one graph that returns the logits of all exits by one "
        "`session.run`. *segments*: successive calls of `Segment.run`. *engine*: budget `full`, which runs no "
        "heads of early exits. *engine, scoring*: every exit is scored, and no image leaves early. Target at batch "
        "1: at most 1.03."
    )
    columns = ["network", "threads", "batch", "one graph, µs", "segments", "engine", "engine, scoring", "Runtime"]
    return ["## (a) Segments against one graph", text, table(columns, rows)]


def leaving_at_exit_1(cases: Sequence[Case]) -> list[str]:
    """Table (b): leaving at exit 1 against segment 1."""
    rows = [
        [*head(case), f"{us[BARE_1]:.0f}", *(f"{us[name] / us[BARE_1]:.3f}" for name in (ENGINE_1, RUNTIME_1))]
        for case in cases
        for us in [case.micros]
    ]
    text = (
        "Every image leaves at exit 1. Times are multiples of segment 1 alone by `Segment.run`. Target: at most 1.05."
    )
    return [
        "## (b) Leaving at exit 1",
        text,
        table(["network", "threads", "batch", "segment 1, µs", "engine", "Runtime"], rows),
    ]


def adaptive(cases: Sequence[Case]) -> list[str]:
    """Table (c): speed-up of the budgets."""
    rows = []
    for case in cases:
        costs = case.network.bundle.manifest.cumulative_macs
        for name in BUDGETS:
            shares = np.asarray(case.shares[name])
            measured, over_full = (case.micros[base] / case.micros[name] for base in (SCORED, ENGINE))
            predicted = sum(case.segments) / float(shares @ np.cumsum(case.segments))
            at_sizes = sum(case.segments) / case.micros[f"survivors, {name}"] if case.batch > 1 else predicted
            macs = costs[-1] / float(shares @ np.asarray(costs))
            left = " ".join(f"{share:.0%}" for share in shares)
            rows.append(
                [*head(case), name, left, f"{macs:.2f}", f"{predicted:.2f}", f"{at_sizes:.2f}", f"{measured:.2f}",
                 f"{measured / at_sizes:.3f}", f"{over_full:.2f}"]
            )  # fmt: skip
    text = (
        "Speed-up over running all segments with all heads. *MACs*: by the counted cost. *in proportion*: by the "
        "times of the segments alone on whole batches in the same rounds, and the shares that leave. *predicted*: "
        "by the times of the segments alone on as many rows as reach them, since a row in a small batch costs "
        "more; at batch 1 the same. *measured*: against the engine that scores every exit. Target: measured at "
        "least 0.95 of predicted. *over full*: against the engine at budget `full`, which leaves the early heads "
        "out."
    )
    columns = [
        "network",
        "threads",
        "batch",
        "budget",
        "leave at",
        "MACs",
        "in proportion",
        "predicted",
        "measured",
        "of predicted",
        "over full",
    ]
    return ["## (c) Adaptive", text, table(columns, rows)]


def where_it_goes(cases: Sequence[Case], networks: Sequence[Network]) -> list[str]:
    """The profile of one image."""
    reorders = {network.name: layout_micros(network) for network in networks}
    rows = []
    for case in cases:
        us = case.micros
        steps = [us[ONE_BOUND], us[BOUND], us[SCORED], us[ENGINE], us[RUNTIME]]
        cuts, engine, heads, runtime = (f"{after - before:+.0f}" for before, after in pairwise(steps))
        left = f"{us[ENGINE_1] - case.segments[0]:+.0f}"
        rows.append(
            [case.network.name, case.threads, f"{steps[0]:.0f}", cuts,
             "{:.0f} to {:.0f}".format(*reorders[case.network.name]), engine, heads, left, runtime]
        )  # fmt: skip
    text = (
        "Microseconds at batch 1. *cuts*: all segments through bound buffers against one graph through bound "
        "buffers, so a session call for each segment and the change of layout at each cut. *layout*: ONNX "
        "Runtime's own profile of the nodes that change it, in one graph and in all segments. *engine*: what it"
        " adds to the bound segments when it scores every exit. *heads*: what leaving them out at budget `full` "
        "changes. *exit 1*: what the engine adds to segment 1 bound. *Runtime*: what `Runtime` adds to the engine "
        "at `full`: checks, prediction, statistics."
    )
    columns = ["network", "threads", "one graph, bound", "cuts", "layout", "engine", "heads", "exit 1", "Runtime"]
    return ["## Where it goes", text, table(columns, rows)]


def nested_if(cases: Sequence[Case]) -> list[str]:
    """Table of the single file against the engine."""
    rows = []
    for case in cases:
        us = case.micros
        ratios = [us[f"{NESTED}, {name}"] / us[name if name in BUDGETS else SCORED] for name in ("full", *BUDGETS)]
        rows.append([case.network.name, case.threads, *(f"{ratio:.2f}" for ratio in ratios)])
    text = (
        "One call of the single file (`mexit export --single-file`) as a multiple of the engine with the same "
        "policy, at batch 1. Above 1, the engine with its bound segments is faster; it is what `mexit` runs."
    )
    columns = ["network", "threads", "full", *BUDGETS]
    return ["## The single file", text, table(columns, rows)]


def layout_micros(network: Network) -> tuple[float, float]:
    """Microseconds in nodes that change the layout: in one graph, and in all segments. One image, one thread."""
    image = np.random.default_rng(0).random((1, *network.bundle.manifest.input.shape), np.float32)
    segments = [network.bundle.segment("fp32", k) for k in range(1, len(network.bundle.manifest.exits) + 1)]
    return profile_graphs([network.one_graph], image).layout, profile_graphs(segments, image).layout


def head(case: Case) -> list[object]:
    return [case.network.name, case.threads, case.batch]

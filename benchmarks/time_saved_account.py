"""Where the time of one image goes: layers, layout, types, calls, decisions and `Runtime`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from node_profile import profile_graphs
from numpy.typing import NDArray

from mexit import Runtime
from mexit.core.bundle import Bundle
from mexit.flows.bench_result import STATIC
from mexit.flows.paired_times import Call
from mexit.runtime.backends.base import Backend
from mexit.runtime.backends.bound_runner import PlainRunner, Runner, RunnerPool
from mexit.runtime.backends.registry import open_backend
from mexit.runtime.engine import answer

CHAIN = "all segments"
PATHS = (STATIC, CHAIN)
WAYS = ("calls", "decisions", "runtime")  # of each path: a way contains the ways before it
PROFILED = ("ort", "ort:int8")
ACCOUNT_COLUMNS = ["engine", "network", "layers", "layout", "types", "calls", "decisions", "`Runtime`", "sum"]
ACCOUNT = (
    "Microseconds of one image, one thread, medians. *full* is the static network; *all segments* scores every exit of "
    "the bundle, and no image leaves early. *layers*, *layout* (blocked channels and back) and *types* (quantise, "
    "dequantise, cast) are the nodes of ONNX Runtime's profile, which records whole microseconds per node; *calls* is "
    "the rest of the bound calls, and of an engine without such a profile all of them. *decisions* are softmax, scores "
    "and thresholds. *`Runtime`* is request, prediction and statistics. The third row of an engine is the difference: "
    "what the cuts and the side heads cost an image that runs to the end. Features cross a cut as float32, with "
    "openvino:bf16 as bfloat16. In int8 the difference in *types* is what int8 features would save at most; the "
    "difference in *layout* stays, because inputs and outputs of an ONNX Runtime session are never blocked."
)


def account_ways(path: Path, engine: str) -> dict[str, Call]:
    """The calls of one image up to the engine's own, with decisions, and through `Runtime`, of both networks."""
    bundle = Bundle.open(path)
    backend, classes = open_backend(bundle, engine), len(bundle.manifest.classes)
    pools = {STATIC: getattr(backend, "static_runners", None), CHAIN: getattr(backend, "runners", None)}
    segments = {STATIC: [backend.static], CHAIN: backend.segments}
    ways: dict[str, Call] = {}
    for name in PATHS:
        runtime = Runtime(bundle, backend, STATIC, use_policies=False, all_heads=name == CHAIN)
        policy = runtime.policy()
        ways[f"{name}/calls"] = engine_calls(pools[name], backend, segments[name])
        ways[f"{name}/decisions"] = lambda images, policy=policy: answer(backend, images, policy, classes)
        ways[f"{name}/runtime"] = runtime.answer_tensor
    return ways


def engine_calls(pool: RunnerPool | None, backend: Backend, segments: Sequence[Any]) -> Call:
    """A call that runs one image through all segments as the runtime does, without decisions."""

    def call(image: NDArray[np.float32]) -> None:
        runner: Runner = PlainRunner(backend.carry, segments) if pool is None else pool.take()
        runner.start(image)
        for k in range(1, len(segments) + 1):
            runner.run(k)
        if pool is not None:
            pool.give_back(runner)

    return call


def account_nodes(path: Path, engine: str, image: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """The node times of both networks; empty for an engine without a profile of nodes."""
    if engine not in PROFILED:
        return {}
    bundle, variant = Bundle.open(path), engine.partition(":")[2] or "fp32"
    segments = [bundle.segment(variant, k) for k in range(1, len(bundle.manifest.exits) + 1)]
    graphs = {STATIC: [bundle.static(variant)], CHAIN: segments}
    return {name: asdict(profile_graphs(graphs[name], image)) for name in PATHS}


def account_rows(engine: str, values: Mapping[str, Any]) -> Iterator[list[str]]:
    """The rows of one engine; `values` has the times of `account_ways` and the nodes of `account_nodes`."""
    costs = {name: _costs(values, name) for name in PATHS}
    for name, columns in costs.items():
        yield [engine, name, *(f"{us:.0f}" for us in columns)]
    yield [engine, "difference", *(f"{more - us:+.0f}" for us, more in zip(*costs.values(), strict=True))]


def _costs(values: Mapping[str, Any], name: str) -> list[float]:
    nodes = values["nodes"].get(name, {"layers": 0.0, "layout": 0.0, "conversion": 0.0})
    kinds = [nodes["layers"], nodes["layout"], nodes["conversion"]]
    calls, decided, whole = (float(values["times"][f"{name}/{way}"]["p50_us"]) for way in WAYS)
    return [*kinds, calls - sum(kinds), decided - calls, whole - decided, whole]

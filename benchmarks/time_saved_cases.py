"""The measurements of `time_saved.py`: JSON values, each made once, so that a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from earlyon_network import INSTALLED, open_network
from frozen_network import compare_with_regression, time_from_pictures
from numpy.typing import NDArray
from overhead_networks import export
from time_saved_account import account_nodes, account_ways
from time_saved_networks import PARTS, PageNetwork

from mexit import Runtime
from mexit.calibrate.against_static import compare_with_static
from mexit.calibrate.clusters import Estimate, mean_with_error
from mexit.core.atomic_io import to_json, write_bytes
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import first_exit
from mexit.core.trace import Origin, Trace
from mexit.flows.bench import distinct_calls, machine, named_policies
from mexit.flows.bench_result import SMALL_LOSS, STATIC
from mexit.flows.paired_times import Call, time_in_turns
from mexit.runtime.backends.ort import open_session
from mexit.runtime.backends.registry import open_backend

ROUNDS = 9
MOST_CALLS = 1000  # of each way in a round
LEAST_CALLS = 2
THREADS, BATCHES = (1, 2), (1, 8, 64)
IMAGES = 512  # timed test images
BARE, PARITY_ENGINE = "bare session", "ort"
NOT_INSTALLED = "not installed here: pip install earlyon"


class Part:
    """The measurements of one network, in a JSON file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}

    def once(self, key: str, measure: Any) -> Any:
        """The stored value of a key, or that of `measure()`, which is then stored."""
        if key not in self.values:
            self.values[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, to_json(self.values))
        return self.values[key]


def measure(network: PageNetwork, part: Part, protocol_s: float, other_s: float) -> None:
    """Measure everything that the part lacks.

    Args:
        network: exported.
        part: receives the values.
        protocol_s: largest duration of a comparison with one thread and one image, seconds.
        other_s: that of the other comparisons.
    """
    part.once("about", lambda: about(network))
    if network.recipe.heads_only:
        part.once("from pictures", lambda: time_from_pictures(network))
        part.once("regression", lambda: compare_with_regression(network))
    images = network.images("test", IMAGES)
    for engine in network.engines:
        part.once(f"accuracy/{engine}", lambda engine=engine: accuracies(network, engine))
        for threads in THREADS:
            for batch in BATCHES:
                seconds = protocol_s if (threads, batch) == (1, 1) else other_s
                part.once(
                    f"budgets/{engine}/{threads}/{batch}",
                    lambda engine=engine, threads=threads, batch=batch, seconds=seconds: time_ways(
                        budget_calls(network, part, engine, threads), images, batch, seconds
                    ),
                )
        part.once(f"account/{engine}", lambda engine=engine: account(network, engine, images, other_s))
        part.once(f"cuts/{engine}", lambda engine=engine: time_ways(cut_calls(network, engine), images, 1, other_s))
    part.once("final", lambda: final(network, part, images, protocol_s))


def about(network: PageNetwork) -> dict[str, Any]:
    """The network, its run, its bundle and the machine."""
    manifest = Bundle.open(network.bundle).manifest
    return {
        "data": network.recipe.data,
        "settings": network.settings.to_json() | {"data": network.recipe.data},  # without the folder of this machine
        "exits": network.model.exits,
        "kept": list(manifest.numbers),
        "static_macs": manifest.static.macs if manifest.static else None,
        "machine": machine(),
        "failed": dict(network.failed),
        "n": {part: len(network.splits.part(part)) for part in PARTS},
    }


def time_ways(
    ways: Mapping[str, Call], images: NDArray[np.float32], batch: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time ways in turns for at most about `seconds`; mean and 10 % quantile of each round, quantiles of all, in us."""
    trial = time_in_turns(ways, images, batch, LEAST_CALLS, 2)
    each_s = sum(float(np.median(times)) for times in trial.values()) / 1e6
    calls = int(np.clip(seconds / (ROUNDS * each_s), LEAST_CALLS, MOST_CALLS))
    times_us = time_in_turns(ways, images, batch, calls, ROUNDS)
    return {
        name: {
            "calls": calls,
            "rounds_us": times.mean(axis=1).tolist(),
            "rounds_p10_us": np.quantile(times, 0.1, axis=1).tolist(),
            "p50_us": float(np.median(times)),
            "p95_us": float(np.quantile(times, 0.95)),
        }
        for name, times in times_us.items()
    }


def open_runtime(network: PageNetwork, engine: str, threads: int) -> Runtime:
    """The bundle in an engine, with thresholds selected by the time on this machine."""
    return Runtime.open(network.bundle, STATIC, backend=engine, threads=threads, cost="time")


def budget_calls(network: PageNetwork, part: Part, engine: str, threads: int) -> dict[str, Call]:
    """One call for each policy, and with ONNX Runtime in float32 that of a bare session of the static network.

    The policies are told apart with one thread. With two, each budget has the thresholds for two.
    """
    runtime = open_runtime(network, engine, threads)
    names = dict.fromkeys(part.values[f"accuracy/{engine}"]["same"].values())
    calls: dict[str, Call] = {name: partial(runtime.answer_tensor, budget=name) for name in names}
    if engine == PARITY_ENGINE:
        calls[BARE] = bare_session(runtime.bundle, threads)
    return calls


def bare_session(bundle: Bundle, threads: int = 1) -> Call:
    """A call of ONNX Runtime alone with the static network."""
    session, name = open_session(bundle.static("fp32"), "static.onnx", threads), bundle.manifest.input.name
    return lambda images: session.run(None, {name: images})


def overhead_alone(name: str, seconds: float) -> dict[str, Any]:
    """The two ways of the row about the overhead, of a network with random weights and random images."""
    bundle = export(name).bundle
    runtime = Runtime(bundle, open_backend(bundle, PARITY_ENGINE), STATIC, use_policies=False)
    images = np.random.default_rng(0).random((IMAGES, *bundle.manifest.input.shape), np.float32)
    ways: dict[str, Call] = {STATIC: runtime.answer_tensor, BARE: bare_session(bundle)}
    return {f"budgets/{PARITY_ENGINE}/1/1": time_ways(ways, images, 1, seconds)}


def cut_calls(network: PageNetwork, engine: str) -> dict[str, Call]:
    """The networks that end at an exit, through the same call of the runtime; the last one is the static one."""
    return {
        f"exit {k}": Runtime.open(path, STATIC, backend=engine, threads=1, use_policies=False).answer_tensor
        for k, path in network.cuts.items()
    }


def account(network: PageNetwork, engine: str, images: NDArray[np.float32], seconds: float) -> dict[str, Any]:
    """Where the time of one image goes, in one engine."""
    times = time_ways(account_ways(network.bundle, engine), images, 1, seconds)
    return {"times": times, "nodes": account_nodes(network.bundle, engine, images[:1])}


def accuracies(network: PageNetwork, engine: str) -> dict[str, Any]:
    """Accuracy of the static network, and the paired changes of budgets and cut networks, on both splits."""
    runtime = open_runtime(network, engine, 1)
    policies = named_policies(runtime)
    values: dict[str, Any] = {"same": {name: _first(policies, name) for name in policies}}
    for part in PARTS:
        trace = _trace(network, engine, part)
        static = trace.logits[-1].argmax(axis=1) == trace.labels
        budgets = {}
        for name, policy in policies.items():
            compared = compare_with_static(trace, policy, runtime.costs)
            assert compared.accuracy_change is not None
            budgets[name] = {"macs": compared.cost.value, **_estimate(compared.accuracy_change)}
        cuts = {}
        for k, path in network.cuts.items():
            right = network.logits(path, engine, part)[-1].argmax(axis=1) == trace.labels
            cuts[f"exit {k}"] = _estimate(mean_with_error(right.astype(np.float64) - static, trace.groups))
        values[part] = {"static": float(static.mean()), "budgets": budgets, "cuts": cuts}
    return values


def final(network: PageNetwork, part: Part, images: NDArray[np.float32], seconds: float) -> dict[str, Any]:
    """The fastest of each kind on this machine, one thread, one image, in one comparison.

    The static network, the budget that is expected to lose at most half a point, and the smaller static network that is
    expected to be at least as accurate as that budget; each in its fastest engine. The certification split, not the
    test split, says what is expected.
    """
    static = min(network.engines, key=lambda engine: mean_us(part, engine, STATIC))
    budget_engine, budget = _fastest_budget(network, part)
    cut_engine, cut = _fastest_cut(network, part, _expected(part, budget_engine, "budgets", budget))
    ways: dict[str, Call] = {
        f"static, {static}": open_runtime(network, static, 1).answer_tensor,
        f"{budget}, {budget_engine}": distinct_calls(
            runtime := open_runtime(network, budget_engine, 1), named_policies(runtime)
        )[part.values[f"accuracy/{budget_engine}"]["same"][budget]],
        f"{cut} as a static network, {cut_engine}": cut_calls(network, cut_engine)[cut],
    }
    rights = {
        f"static, {static}": _trace(network, static, "test").logits[-1].argmax(axis=1),
        f"{budget}, {budget_engine}": _answers(network, budget_engine, budget),
        f"{cut} as a static network, {cut_engine}": network.logits(
            network.cuts[int(cut.split()[1])], cut_engine, "test"
        )[-1].argmax(axis=1),
    }
    found = open_network(network) if INSTALLED else NOT_INSTALLED
    part.values["earlyon"] = found if isinstance(found, str) else {"thresholds": found.thresholds}
    if not isinstance(found, str):
        ways |= found.calls
        rights |= found.answers
    labels, groups = network.labels("test"), network.splits.groups_of(network.splits.part("test"))
    first = next(iter(rights.values())) == labels
    changes = {
        name: _estimate(mean_with_error((answers == labels).astype(np.float64) - first, groups))
        for name, answers in rights.items()
    }
    times = time_ways(ways, images, 1, seconds)
    return {name: values | {"change": changes[name]} for name, values in times.items()}


def mean_us(part: Part, engine: str, way: str, threads: int = 1, batch: int = 1) -> float:
    """The mean time of a call, us; `way` is a budget."""
    way = part.values[f"accuracy/{engine}"]["same"].get(way, way)
    return float(np.mean(part.values[f"budgets/{engine}/{threads}/{batch}"][way]["rounds_us"]))


def _expected(part: Part, engine: str, kind: str, name: str) -> float:
    """The expected accuracy of a budget or cut network: on the certification split."""
    values = part.values[f"accuracy/{engine}"]["certification"]
    return float(values["static"] + values[kind][name]["value"])


def _fastest_budget(network: PageNetwork, part: Part) -> tuple[str, str]:
    """Engine and name of the fastest budget that is expected to lose at most half a point; else the static network."""
    candidates = [
        (mean_us(part, engine, name), engine, name)
        for engine in network.engines
        for name, values in part.values[f"accuracy/{engine}"]["certification"]["budgets"].items()
        if values["value"] >= -SMALL_LOSS and part.values[f"accuracy/{engine}"]["same"][name] == name
    ]
    return min(candidates)[1:]


def _fastest_cut(network: PageNetwork, part: Part, accuracy: float) -> tuple[str, str]:
    """Engine and name of the fastest cut network with at least this expected accuracy; else the most accurate one."""
    candidates = [
        (_expected(part, engine, "cuts", name), float(np.mean(times["rounds_us"])), engine, name)
        for engine in network.engines
        for name, times in part.values[f"cuts/{engine}"].items()
    ]
    accurate = [(us, engine, name) for expected, us, engine, name in candidates if expected >= accuracy]
    return min(accurate)[1:] if accurate else max(candidates)[2:]


def _answers(network: PageNetwork, engine: str, budget: str) -> NDArray[np.int64]:
    """The class that a budget predicts for each test image, (N,)."""
    policy = named_policies(open_runtime(network, engine, 1))[budget]
    logits = network.logits(network.bundle, engine, "test")
    if all(threshold is None for threshold in policy.thresholds):
        return np.asarray(logits[-1].argmax(axis=1))
    scores, predicted = policy.scorer(logits.shape[-1]).answer(logits)
    return np.asarray(predicted[first_exit(scores, policy.thresholds) - 1, np.arange(logits.shape[1])])


def _trace(network: PageNetwork, engine: str, part: str) -> Trace:
    logits = network.logits(network.bundle, engine, part)
    origin = Origin("", "", engine, "", part, "clean", "")
    return Trace(
        logits,
        network.labels(part),
        network.splits.part(part),
        origin,
        network.splits.groups_of(network.splits.part(part)),
    )


def _first(policies: Mapping[str, Any], name: str) -> str:
    """The first budget with the same policy."""
    return next(other for other, policy in policies.items() if policy == policies[name])


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "stderr": estimate.stderr}

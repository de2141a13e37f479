"""`mexit bench`: compare every budget of a bundle with the static network on this machine.

The budget `full` is the static network. The other budgets leave as their policies decide on the bundle's own
calibration images, or on random images where the data set is missing; `exit K` stops at the first exit that was kept.
All paths run the same prepared images through the same call of the runtime, in turns (see `paired_times`). Budgets that
share a policy are timed once. Accuracy changes and MACs are those expected from the traces of the calibration.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.calibrate.against_static import StaticComparison, compare_with_static
from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import Policy
from mexit.core.policies_file import PolicyEntry
from mexit.core.progress import Progress, Silent
from mexit.core.resource_limits import processor_name, read_limits
from mexit.core.trace import Trace
from mexit.data import registry
from mexit.errors import Damaged, MexitError, NotFound, UsageError
from mexit.flows.bench_result import STATIC, BenchResult, Row
from mexit.flows.paired_times import ROUNDS, Call, time_in_turns, time_ratio
from mexit.runtime import autotune
from mexit.runtime.runtime import Runtime
from mexit.runtime.time_policies import note_timing

BATCHES = (1, 8, 64)
REPEATS = 200
MIN_REPEATS = 2 * ROUNDS
IMAGES, RANDOM_IMAGES = 512, 64
LARGER_NETWORK = "a larger network"


def bench_bundle(
    bundle: Path | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    repeats: int = REPEATS,
    data_dir: str | Path | None = None,
    tune: bool = False,
    cost: str = "macs",
    profile: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Compare every budget of a bundle with the static network.

    Args:
        bundle: a bundle directory; default the newest.
        backend: name of the engine, or "auto".
        threads: threads of the engine; default the fastest measured number, else 1.
        batches: batch sizes, at least 1.
        repeats: timed calls of each path with one image, at least 20; larger batches have fewer calls, at least 20.
        data_dir: folder of the data sets; default `MEXIT_DATA`.
        tune: measure every engine of this device first, and store the result for "auto"; with `cost` "time" also the
            times that select thresholds.
        cost, profile: unit of the budgets, and file of times, as in `Runtime.open`.
        progress: receives the progress.

    Raises:
        UsageError: `repeats` or a batch size is too small.
        MexitError: the bundle or the engine cannot be opened.
    """
    progress = progress or Silent()
    if repeats < MIN_REPEATS or min(batches, default=0) < 1:
        raise UsageError(
            f"--repeats must be at least {MIN_REPEATS} and each --batch at least 1, found {repeats} and {list(batches)}"
        )
    path = bundle or newest(BUNDLES, progress)
    tuning = autotune.tune(Bundle.open(path)) if tune else None
    runtime = Runtime.open(path, STATIC, backend=backend, threads=threads, cost=cost, profile=profile)
    if tune and runtime.timing is not None and profile is None:
        runtime.use_time(again=True)
    note_timing(runtime.timing, runtime.why_not_time, progress.note)
    images, description, real = _images(runtime, data_dir)
    policies = named_policies(runtime)
    trace = _trace(runtime)
    ways = distinct_calls(runtime, policies)
    first, *later = runtime.bundle.manifest.numbers
    if later:
        ways[f"exit {first}"] = partial(runtime.answer_tensor, budget=STATIC, max_exit=first)
    rows: list[Row] = []
    calls = {batch: max(MIN_REPEATS, repeats // batch) // ROUNDS for batch in batches}
    with progress.track("timing", len(ways) * ROUNDS * sum(calls.values())) as advance:
        for batch in batches:
            on_turn = partial(advance, detail=f"batch {batch}")
            times_us = time_in_turns(ways, images, batch, calls[batch], on_turn=on_turn)
            rows += _rows(runtime, batch, policies, times_us, trace)
    expected_on = "" if trace is None else f"{trace.logits.shape[1]} {trace.origin.split} images"
    unit = "macs" if runtime.timing is None else "time"
    return BenchResult(tuple(rows), machine(), unit, description, real, expected_on, _advice(runtime), tuning)


def machine() -> dict[str, Any]:
    """Return processor, number of cores and system, for result pages."""
    return {"cpu": processor_name(), "cores": read_limits().processors, "system": platform.platform()}


def named_policies(runtime: Runtime) -> dict[str, Policy]:
    """The policy of each named budget, by rising cost, after that of the static network, `full`."""
    entry = _entry(runtime)
    named = {} if entry is None else entry.named
    names = [STATIC, *(name for name, _ in sorted(named.items(), key=lambda item: item[1]) if name != STATIC)]
    image = np.zeros((1, *runtime.bundle.manifest.input.shape), np.float32)
    return {name: runtime.begin(image, budget=name).choice.policy for name in names}


def distinct_calls(runtime: Runtime, policies: Mapping[str, Policy]) -> dict[str, Call]:
    """One call for each policy, by the first budget that has it; a call answers a batch of prepared images."""
    first: dict[Policy, str] = {}
    for name, policy in policies.items():
        first.setdefault(policy, name)
    return {name: partial(runtime.answer_tensor, budget=name) for name in first.values()}


def _entry(runtime: Runtime) -> PolicyEntry | None:
    backend = runtime.backend
    if not runtime.calibrated:
        return None
    return runtime.bundle.policies().entry(backend.engine, backend.precision, backend.variant)


def _trace(runtime: Runtime) -> Trace | None:
    """The trace of clean images that selected nothing, or else the one that selected the thresholds."""
    entry = _entry(runtime)
    if entry is None:
        return None
    clean = [ref for ref in entry.evidence if ref.condition == "clean"]
    for ref in (*clean, entry.trace):
        try:
            return runtime.bundle.load_trace(ref)
        except (NotFound, Damaged):  # times need no trace
            continue
    return None


def _rows(
    runtime: Runtime,
    batch: int,
    policies: dict[str, Policy],
    times_us: dict[str, NDArray[np.float64]],
    trace: Trace | None,
) -> list[Row]:
    """The rows of one batch size: the static network, the first exit, then the other budgets."""
    timed = {policies[name]: values for name, values in times_us.items() if name in policies}
    rows = []
    for name in [STATIC, *(name for name in times_us if name not in policies), *list(policies)[1:]]:
        policy = policies.get(name)
        values = times_us[name] if policy is None else timed[policy]
        expected = None
        if trace is not None and policy is not None:
            expected = compare_with_static(trace, policy, runtime.costs)
        rows.append(_row(runtime, batch, name, values, times_us[STATIC], expected))
    return rows


def _row(
    runtime: Runtime,
    batch: int,
    path: str,
    times_us: NDArray[np.float64],
    static_us: NDArray[np.float64],
    expected: StaticComparison | None,
) -> Row:
    p50, p95 = np.quantile(times_us, [0.5, 0.95])
    change = expected.accuracy_change if expected else None
    return Row(
        engine=runtime.backend.engine,
        threads=runtime.threads,
        batch=batch,
        path=path,
        p50_us=float(p50),
        p95_us=float(p95),
        mean_us=float(times_us.mean()),
        n=times_us.size,
        of_static=time_ratio(times_us, static_us),
        macs=expected.cost.value if expected else None,
        accuracy_change=change.value if change else None,
        accuracy_error=change.stderr if change else None,
    )


def _advice(runtime: Runtime) -> list[str]:
    """What can be done where early exit saves no time with this bundle in this engine."""
    advice = []
    exits = runtime.bundle.manifest.provenance.get("exits", {})
    if len(runtime.backend.segments) > 1 and exits.get("option") != "auto":
        advice.append("mexit export --exits auto --replace (keeps only exits that save time)")
    if runtime.calibrated and runtime.timing is None and not runtime.why_not_time:
        advice.append("--cost time (selects thresholds by the times on this device)")
    if not autotune.explain(runtime.bundle).rows:
        advice.append("mexit bench --tune (finds the fastest engine)")
    return [*advice, LARGER_NETWORK]


def _images(runtime: Runtime, data_dir: str | Path | None) -> tuple[NDArray[np.float32], str, bool]:
    """Return images (B, C, H, W) in [0, 1], their description and whether they are real: else they are random."""
    spec = runtime.bundle.manifest.input
    try:
        data, splits = registry.load_bundle_data(runtime.bundle, data_dir)
        index = splits.part("calibration")[:IMAGES]
        return data.batch(index, spec), f"{len(index)} calibration images of {data.name}", True
    except MexitError:  # the data set is missing or has changed
        images = np.random.default_rng(0).random((RANDOM_IMAGES, *spec.shape), np.float32)
        return images, "random images, which leave at other exits than real ones", False

"""The tables and verdicts of the page of `time_saved.py`, from the measured JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

import numpy as np
from page import table
from time_saved_account import ACCOUNT, ACCOUNT_COLUMNS, account_rows
from time_saved_cases import BARE, BATCHES, PARITY_ENGINE, THREADS
from time_saved_networks import MINIATURE, RECIPES

from mexit.calibrate.clusters import t_quantile
from mexit.core.budget import short_macs
from mexit.flows.bench_result import SMALL_LOSS, STATIC, points, share
from mexit.flows.paired_times import CONFIDENCE, Ratio, time_ratio

Values = Mapping[str, Any]
MOST_RATIO = 1.02  # lower bound of the share of the static network's time
MOST_OVERHEAD_US = 30.0
LONGEST_US = 2000.0  # of longer calls the noise exceeds the overhead
MOST_SECONDS = 300.0  # from the pictures to a calibrated bundle
MOST_BELOW_REGRESSION = 0.01
PROTOCOL = "1/1"  # one thread, one image


def sections(name: str, values: Values) -> Iterator[str]:
    """The paragraphs and tables of one network."""
    about, engines = values["about"], engines_of(values)
    kept, sizes = ", ".join(map(str, about["kept"])), about["n"]
    yield f"## {name}"
    yield (
        f"`{about['settings']['model']}` on {about['data']}, {about['exits']} exits, of which the bundle keeps {kept}; "
        f"static network {short_macs(about['static_macs'])} MACs. {sizes['test']} test and "
        f"{sizes['certification']} certification images."
    )
    yield f"### {name}: budgets against the static network, batch 1, one thread"
    columns = ["engine", "budget", "us", "95 % of calls, us", "of static", "MACs", "points", "expected points"]
    yield table(columns, [row for engine in engines for row in _budget_rows(values, engine)])
    yield f"### {name}: us per image of the static network, and shares of its time, by threads and batch"
    shape = [f"{threads} thread{'s' * (threads > 1)}, batch {batch}" for threads in THREADS for batch in BATCHES]
    yield table(["engine", "budget", *shape], [row for engine in engines for row in _shape_rows(values, engine)])
    if accounted := [engine for engine in engines if f"account/{engine}" in values]:
        yield f"### {name}: where the microseconds go"
        yield ACCOUNT
        rows = [row for engine in accounted for row in account_rows(engine, values[f"account/{engine}"])]
        yield table(ACCOUNT_COLUMNS, rows)
    yield f"### {name}: static networks cut at an exit, batch 1, one thread"
    yield table(
        ["engine", "static network", "us", "of static", "points", "expected points"],
        [row for engine in engines for row in _cut_rows(values, engine)],
    )
    yield f"### {name}: the fastest of each kind, batch 1, one thread"
    yield table(["network", "us", "95 % of calls, us", "of static", "points"], list(_final_rows(values["final"])))
    if isinstance(values.get("earlyon"), str):
        yield f"earlyon: {values['earlyon']}."
    for engine, reason in about["failed"].items():
        yield f"Not measured: {engine}: {reason}"


def engines_of(values: Values) -> list[str]:
    """The measured engines."""
    return [key.split("/")[1] for key in values if key.startswith("accuracy/")]


def verdicts(parts: Mapping[str, Values]) -> Iterator[str]:
    """What the page states about each target, one sentence each."""
    slower = [
        f"{name} {engine} {budget} ({share(ratio)})"
        for name, values in parts.items()
        for engine in engines_of(values)
        for budget, ratio in budget_ratios(values, engine).items()
        if ratio.low > MOST_RATIO
    ]
    yield (
        f"No named budget is slower than the static network in the same engine, batch 1, one thread (lower 95 % bound "
        f"of the share at most {MOST_RATIO}): {_word(not slower)}{': ' + ', '.join(slower) if slower else ''}."
    )
    yield overhead_verdict(parts)
    for name, values in parts.items():
        recipe = (RECIPES | MINIATURE)[name]
        if recipe.heads_only:
            yield from _frozen_verdicts(name, values)
        if recipe.target_ratio is None:
            continue
        if recipe.against_fastest:
            yield from _fastest_verdicts(name, values, recipe.target_ratio)
        else:
            yield from _medium_verdicts(name, values, recipe.target_ratio)


def overhead_verdict(parts: Mapping[str, Values]) -> str:
    """What the page states about the overhead of `Runtime`; the values need only the budgets of one engine."""
    fast = {name: one for name, one in parts.items() if min(_bare_us(one)) < LONGEST_US}
    if not fast:
        return f"Calls of {LONGEST_US / 1e3:g} ms and more do not show the overhead of `Runtime`: see `--overhead`."
    undisturbed, means = (
        {name: overhead(one, of) for name, one in fast.items()} for of in ("rounds_p10_us", "rounds_us")
    )
    worst = max(value for value, _ in undisturbed.values())
    listed = ", ".join(
        f"{name} {value:.0f} ± {half:.0f} us (mean {means[name][0]:.0f} ± {means[name][1]:.0f})"
        for name, (value, half) in undisturbed.items()
    )
    return (
        f"`Runtime` beyond a bare session of the static network, ONNX Runtime, batch 1, one thread, by the 10 % "
        f"quantile of the calls, which other programs disturb least (at most {MOST_OVERHEAD_US:.0f} us): {listed}: "
        f"{_word(worst <= MOST_OVERHEAD_US)}."
    )


def budget_ratios(values: Values, engine: str) -> dict[str, Ratio]:
    """The share of the static network's time of each budget that is not the static network."""
    times = values[f"budgets/{engine}/{PROTOCOL}"]
    same = values[f"accuracy/{engine}"]["same"]
    return {name: _ratio(times[first], times[STATIC]) for name, first in same.items() if first != STATIC}


def _bare_us(values: Values) -> list[float]:
    return list(values[f"budgets/{PARITY_ENGINE}/{PROTOCOL}"][BARE]["rounds_us"])


def overhead(values: Values, of: str) -> tuple[float, float]:
    """Microseconds of a call of the runtime beyond those of the bare session, and half their 95 % interval.

    Args:
        values: the measured values of a network.
        of: the value of each round that is compared, such as "rounds_us", the mean.
    """
    times = values[f"budgets/{PARITY_ENGINE}/{PROTOCOL}"]
    more = np.array(times[STATIC][of]) - np.array(times[BARE][of])
    half = t_quantile((1 + CONFIDENCE) / 2, len(more) - 1) * float(more.std(ddof=1)) / sqrt(len(more))
    return float(more.mean()), half


def _names(values: Values, engine: str) -> dict[str, str]:
    """The names of the budgets that share a policy, by the first of them."""
    same: Mapping[str, str] = values[f"accuracy/{engine}"]["same"]
    return {first: ", ".join(name for name in same if same[name] == first) for first in dict.fromkeys(same.values())}


def _budget_rows(values: Values, engine: str) -> Iterator[list[str]]:
    times, accuracy = values[f"budgets/{engine}/{PROTOCOL}"], values[f"accuracy/{engine}"]
    for first, names in _names(values, engine).items():
        tested, expected = (accuracy[part]["budgets"][first] for part in ("test", "certification"))
        yield [
            engine, names, *_times(times[first]), share(_ratio(times[first], times[STATIC])),
            short_macs(tested["macs"]), *(points(one["value"], one["stderr"]) for one in (tested, expected)),
        ]  # fmt: skip
    if BARE in times:
        yield [engine, BARE, *_times(times[BARE]), share(_ratio(times[BARE], times[STATIC])), "", "", ""]


def _shape_rows(values: Values, engine: str) -> Iterator[list[str]]:
    shapes = [(threads, batch) for threads in THREADS for batch in BATCHES]
    times = [values[f"budgets/{engine}/{threads}/{batch}"] for threads, batch in shapes]
    for first, names in _names(values, engine).items():
        if first == STATIC:
            cells = [f"{_mean(one[STATIC]) / batch:.0f} us" for one, (_, batch) in zip(times, shapes, strict=True)]
        else:
            cells = [share(_ratio(one[first], one[STATIC])) for one in times]
        yield [engine, names, *cells]


def _cut_rows(values: Values, engine: str) -> Iterator[list[str]]:
    times, accuracy = values[f"cuts/{engine}"], values[f"accuracy/{engine}"]
    last = list(times)[-1]
    for name, one in times.items():
        changes = [accuracy[part]["cuts"][name] for part in ("test", "certification")]
        shown = ["", ""] if name == last else [points(each["value"], each["stderr"]) for each in changes]
        yield [engine, name, f"{_mean(one):.0f}", share(_ratio(one, times[last])), *shown]


def _final_rows(final: Values) -> Iterator[list[str]]:
    static = next(iter(final.values()))
    for name, one in final.items():
        change = "" if one is static else points(one["change"]["value"], one["change"]["stderr"])
        yield [name, *_times(one), share(_ratio(one, static)), change]


def _medium_verdicts(name: str, values: Values, target: float) -> Iterator[str]:
    for engine in (PARITY_ENGINE, "openvino:bf16"):
        if engine not in engines_of(values):
            continue
        ratio = budget_ratios(values, engine).get("medium", Ratio(1.0, 1.0, 1.0))
        change = values[f"accuracy/{engine}"]["test"]["budgets"]["medium"]
        met = ratio.value <= target and change["value"] >= -SMALL_LOSS
        yield (
            f"{name}, {engine}: `medium` takes {share(ratio)} of the static network's time (at most {target}) at "
            f"{points(change['value'], change['stderr'])} points (at least {-100 * SMALL_LOSS}): {_word(met)}."
        )


def _fastest_verdicts(name: str, values: Values, target: float) -> Iterator[str]:
    (static, static_times), (budget, times), (cut, cut_times), *_ = values["final"].items()
    ratio, change = _ratio(times, static_times), times["change"]
    met = ratio.value <= target and change["value"] >= -SMALL_LOSS
    yield (
        f"{name}: {budget} is {1 / ratio.value:.2f} times as fast as the fastest static network ({static}; target "
        f"{1 / target:.1f}) at {points(change['value'], change['stderr'])} points (at least {-100 * SMALL_LOSS}): "
        f"{_word(met)}."
    )
    against = _ratio(times, cut_times)
    lead = points(cut_times["change"]["value"], cut_times["change"]["stderr"])
    yield (
        f"{name}: {budget} takes {share(against)} of the time of the smaller static network of equal accuracy ({cut}, "
        f"{lead} points; below 1): {_word(against.high < 1)}."
    )


def _frozen_verdicts(name: str, values: Values) -> Iterator[str]:
    took, compared = values["from pictures"], values["regression"]
    seconds = took["train"] + took["export"]
    yield (
        f"{name}: from {took['pictures']:,} pictures to a calibrated bundle in {seconds:.0f} s (`mexit train --freeze` "
        f"{took['train']:.0f} s, `mexit export` {took['export']:.0f} s; at most {MOST_SECONDS:.0f} s for 1,800 "
        f"pictures): {_word(seconds <= MOST_SECONDS * max(1.0, took['pictures'] / 1800))}."
    )
    yield (
        f"{name}: the last exit has {compared['accuracy']:.1%} on test images, "
        f"{points(compared['value'], compared['stderr'])} points against a logistic regression on the same features "
        f"(at least {-100 * MOST_BELOW_REGRESSION}): {_word(compared['value'] >= -MOST_BELOW_REGRESSION)}."
    )


def _ratio(times: Values, reference: Values) -> Ratio:
    return time_ratio(*(np.array(one["rounds_us"])[:, None] for one in (times, reference)))


def _mean(times: Values) -> float:
    return float(np.mean(times["rounds_us"]))


def _times(times: Values) -> list[str]:
    return [f"{_mean(times):.0f}", f"{times['p95_us']:.0f}"]


def _word(met: bool) -> str:
    return "met" if met else "**missed**"

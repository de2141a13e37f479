"""The tables of budgets that `export`, `calibrate` and `inspect` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mexit.commands import output
from mexit.core.budget import short_macs
from mexit.core.trace import UNKNOWN

if TYPE_CHECKING:
    from mexit.core.policies_file import FrontierPoint, Outcome, PolicyEntry
    from mexit.flows.calibrate import CalibrateResult
    from mexit.flows.export import ExportResult
    from mexit.runtime.latency_profile import Profile


def show_policies(entry: PolicyEntry, profile: Profile | None = None) -> None:
    """Print what each policy does on held-out data: exits taken, and cost and accuracy under attack.

    Args:
        entry: the policies, selected in MACs.
        profile: times of this device, for the mean time of the exits taken; None leaves it out.
    """
    attacked = any(point.attacked for _, point in entry.by_policy())
    rows = []
    for names, point in entry.by_policy():
        held_out = point.held_out or point.calibration
        under_attack = [*_cost_and_accuracy(point.attacked)] if attacked else []
        time = [] if profile is None else [_mean_time(held_out, point, profile)]
        rows.append([", ".join(names), _limits(entry, names), *time, output.counts(held_out.exits), *under_attack])
    time = [] if profile is None else ["mean us"]
    columns = ["budget", "MACs", *time, "exits taken", *(["attacked: mean", "accuracy"] if attacked else [])]
    caption = f"{_caption(entry)}\n{output.MACS}" + ("" if profile is None else "; mean us: those exits on this device")
    output.table("policies on held-out data", columns, rows, caption)
    if names := entry.more_accurate_than_full():
        output.paragraph(
            f"{', '.join(names)}: more accurate than full on the calibration images; full never exits early, so "
            "nothing is selected for it"
        )


def show_times(entry: PolicyEntry) -> None:
    """Print the budgets that were selected in time on this device, with mean time and MACs on held-out data."""
    static = entry.frontier[-1].calibration.mean_us
    rows = []
    for names, point in entry.by_policy():
        outcome = point.held_out or point.calibration
        share = outcome.mean_us / static if outcome.mean_us and static else None
        cells = [f"{point.limit:,.0f}", f"{outcome.mean_us or 0:,.0f}", output.percent(share)]
        rows.append([", ".join(names), *cells, short_macs(outcome.mean_macs), output.percent(outcome.accuracy)])
    columns = ["budget", "us", "mean us", "of static", "mean MACs", "accuracy"]
    output.table(
        "budgets in time on this device", columns, rows, "measured on held-out images; full is the static network"
    )


def show_expected(table: Mapping[str, Any] | None) -> None:
    """Print expected and test accuracy and cost of each budget, and a sentence for each unexpected test result.

    Args:
        table: the result of `calibrate.expected.expected_and_test`; None if none is stored.
    """
    if table is None:
        output.paragraph("no test results are stored: mexit calibrate measures them")
        return
    rows = []
    for row in table["budgets"]:
        accuracy, cost = row["accuracy"] or {}, row["cost"]
        cells = [_value(accuracy.get(part)) for part in ("expected", "test")]
        costs = [short_macs(cost[part]["value"]) if cost[part] else "-" for part in ("expected", "test")]
        differences = _difference(accuracy), _difference(cost, cost["expected"]["value"])
        rows.append([", ".join(row["names"]), *cells, differences[0], *costs, differences[1]])
    columns = ["budget"]
    for quantity in ("accuracy", "MACs"):
        columns += [f"expected\n{quantity}", f"test\n{quantity}", f"difference\n± {table['confidence']:.0%}"]
    output.table("expected and test results", columns, rows, _expected_caption(table))
    for sentence in table["warnings"]:
        output.paragraph(sentence)


def show_reject(entry: PolicyEntry, table: Mapping[str, Any] | None) -> None:
    """Print the share of answered images and of wrong answers for each policy with a reject option.

    Args:
        entry: the policies; without a reject option nothing is printed.
        table: the result of `calibrate.expected.expected_and_test`, for the test results; None if none is stored.
    """
    if entry.reject is None:
        return
    tested = {tuple(row["names"]): row.get("reject") or {} for row in (table or {}).get("budgets", ())}
    rows = []
    for names, point in entry.by_policy():
        if rejected := point.rejected:
            test = tested.get(tuple(names), {})
            answered, wrong = (test.get(part, {}).get("test") for part in ("coverage", "error"))
            others = [] if rejected.unknown_answered is None else [output.percent(rejected.unknown_answered)]
            shares = output.percent(rejected.coverage), output.percent(answered)
            rows.append([", ".join(names), *shares, _share(rejected.error), _share(wrong), *others])
    groups = "" if entry.reject.groups is None else f" in {entry.reject.groups} groups"
    caption = (
        f"wrong: share of the answers; expected: measured on {entry.reject.n} images{groups} of the certification split"
    )
    if entry.reject.n_unknown is not None:
        caption += f" and {entry.reject.n_unknown} of other things"
    others = [] if entry.reject.n_unknown is None else ["other things\nanswered"]
    columns = ["budget", "expected\nanswered", "test\nanswered", "expected\nwrong", "test\nwrong", *others]
    output.table(f"reject option: at most {_share(entry.reject.max_error)} wrong answers", columns, rows, caption)
    output.paragraph(entry.reject.promise)
    everything = [name for names, point in entry.by_policy() for name in names if _answers_all(point)]
    if everything and entry.reject.n_unknown is None:
        output.paragraph(
            f"{', '.join(everything)}: every picture of the certification split is answered, because the bound holds "
            "without rejecting any; so are pictures of other things: --reject-from folder:PATH, a folder of such "
            "pictures, makes most of them unsure"
        )


def budget_to_serve(entry: PolicyEntry) -> str:
    """The budget of the next command: `low` or the cheapest; `full` if that one has the policy of `full`."""
    groups = [names for names, _ in entry.by_policy()]
    names = next((names for names in groups if "low" in names), groups[0])
    return next(name for name in ("full", "low", names[0]) if name in names)


def show_lost(result: CalibrateResult | ExportResult) -> None:
    """Print what the replaced calibration had and the new one has not, and the commands that restore it."""
    for one in result.lost:
        output.paragraph(one.text)
        output.say(f"  {one.command}")


def _answers_all(point: FrontierPoint) -> bool:
    return point.rejected is not None and point.rejected.coverage == 1


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _mean_time(outcome: Outcome, point: FrontierPoint, profile: Profile) -> str:
    """Mean microseconds of a single image that leaves at the exits taken."""
    times_us = profile.costs.of_exits(point.thresholds)
    return f"{sum(n * us for n, us in zip(outcome.exits, times_us, strict=True)) / outcome.n:,.0f}"


def _limits(entry: PolicyEntry, names: Sequence[str]) -> str:
    """The budgets in MACs: one, or the smallest and the largest."""
    macs = [short_macs(entry.names[name]) for name in names]
    return "-".join(dict.fromkeys((macs[0], macs[-1])))


def _cost_and_accuracy(outcome: Outcome | None) -> tuple[str, str]:
    return (short_macs(outcome.mean_macs), output.percent(outcome.accuracy)) if outcome else ("-", "-")


def _value(estimate: Mapping[str, Any] | None) -> str:
    return output.percent(estimate["value"]) if estimate else "-"


def _difference(comparison: Mapping[str, Any], unit: float = 1.0) -> str:
    """Test minus expected, and its interval, in hundredths of a unit: `-0.7 ± 2.1`."""
    if comparison.get("difference") is None:
        return "-"
    difference, half_width = comparison["difference"] / unit, comparison["half_width"]
    return f"{100 * difference:+.1f} ± " + ("?" if half_width is None else f"{100 * half_width / unit:.1f}")


def _expected_caption(table: Mapping[str, Any]) -> str:
    expected, test = table["certification"], table["test"]
    lines = [f"expected: measured on {_size(expected)} of the certification split"]
    if test is None:
        lines.append(f"no test results: {table['missing']}")
    else:
        of = f", evenly spaced among {test['of']}" if test["of"] > test["n"] else ""
        rejects = any(row.get("reject") for row in table["budgets"])
        use = "certification selects the reject thresholds alone" if rejects else "neither split selects anything"
        lines.append(f"test: {_size(test)} of the test split{of}; {use}")
        lines.append(f"difference: in points and in % of the expected MACs; ±: its {table['confidence']:.0%} interval")
    return "\n".join(lines)


def _size(part: Mapping[str, Any]) -> str:
    return f"{part['n']} images" + (f" in {part['groups']} groups" if part["groups"] else "")


def _caption(entry: PolicyEntry) -> str:
    held_out = entry.frontier[0].held_out
    parts = [f"thresholds selected on {entry.trace.n} calibration images"]
    if held_out is not None:
        use = "nothing" if entry.reject is None else "the reject thresholds alone"
        parts.append(f"measured on {held_out.n} certification images, which select {use}")
    if any(len(names) > 1 for names, _ in entry.by_policy()):
        parts.append("budgets in one row have the same thresholds")
    attacks = dict.fromkeys(ref.condition for ref in entry.evidence if ref.condition not in ("clean", UNKNOWN))
    return "; ".join(parts + [f"attack: {attack}" for attack in attacks])

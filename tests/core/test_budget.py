"""What people may type for a budget, what it means, and what they are told when it cannot be had."""

from __future__ import annotations

import pytest

from mexit.core.budget import Budget, exact_macs, format_macs, parse_macs
from mexit.core.cost import Costs
from mexit.errors import BudgetInfeasible, UsageError

COSTS = Costs((1_000_000, 3_000_000, 9_500_000), 9_250_000)


@pytest.mark.parametrize(
    ("text", "kind", "macs"),
    [
        ("low", "named", 1_000_000 + 0.25 * 8_250_000),
        ("medium", "named", 1_000_000 + 0.5 * 8_250_000),
        ("high", "named", 1_000_000 + 0.75 * 8_250_000),
        ("full", "named", 9_250_000),
        ("1500000", "macs", 1_500_000),
        ("1500k", "macs", 1_500_000),
        ("1.5M", "macs", 1_500_000),
        ("0.0015G", "macs", 1_500_000),
        (" 2 M ", "macs", 2_000_000),
        ("1000000", "macs", 1_000_000),
        ("100G", "macs", 100_000_000_000),
        ("40%", "share", 0.4 * 9_250_000),
        ("12.5 %", "share", 0.125 * 9_250_000),
        ("100%", "share", 9_250_000),
    ],
)
def test_budgets_as_people_type_them(text: str, kind: str, macs: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.text) == (kind, text.strip())
    assert budget.cost(COSTS) == pytest.approx(macs, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", " ", "cheap", "Low", "12m", "12MB", "1e6", "-5", "+5", "12 M M", "M", "%", "5s", ".5M", "1,5M", "0x10",
     "nan", "inf", "low\0", "12M\n3", "--budget"],
)  # fmt: skip
def test_anything_else_is_answered_with_the_ways_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a budget: write low, medium, high, full, MACs \(800k, 12M\)"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "option"), [("certified", "--max-risk 0.02"), ("target", "--target-drop 0.005")])
def test_a_budget_without_its_certificate_is_answered_with_the_command_that_makes_one(text: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"'{text}' needs a certificate, and .* none: mexit calibrate {option} makes"):
        Budget.parse(text)
    assert Budget.parse(text, {text: 50.0}).value == 50


@pytest.mark.parametrize("text", ["0", "0%", "0ms", "0.0M"])
def test_zero_is_told_apart_from_nonsense(text: str) -> None:
    with pytest.raises(UsageError, match=f"must be above zero, found '{text}'"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["101%", "4000%", "9" * 400, "9" * 400 + "ms"], ids=lambda text: text[:6])
def test_more_than_everything_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="at most"):
        Budget.parse(text)


def test_below_exit_1_the_nearest_feasible_budget_is_named_and_can_be_typed() -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        Budget.parse("5%").cost(COSTS)
    message = str(caught.value)
    assert message == (
        "budget '5%' is 462k MACs, but the cheapest policy costs 1M MACs (10.8% of the static network): "
        "the nearest feasible budget is 1000000"
    )
    assert Budget.parse(message.rpartition(" ")[2]).cost(COSTS) == COSTS.cumulative[0]


def test_the_nearest_feasible_budget_is_exact_where_people_would_round() -> None:
    odd = Costs((1_234_567, 9_876_543), 9_876_543)
    with pytest.raises(BudgetInfeasible, match=r"the nearest feasible budget is 1234567$"):
        Budget.parse("1M").cost(odd)
    assert Budget.parse(exact_macs(odd.first)).cost(odd) == odd.first


def test_milliseconds_need_a_device_that_measured_itself() -> None:
    budget = Budget.parse("5ms")
    assert (budget.kind, budget.value) == ("ms", 5.0)
    with pytest.raises(UsageError, match=r"budget '5ms': .*give a budget between 1M MACs and 9.25M MACs"):
        budget.cost(COSTS)


def test_only_full_is_full() -> None:
    assert Budget.parse("full").is_full
    assert not Budget.parse("100%").is_full
    assert not Budget.parse("high").is_full


def test_a_network_with_one_exit_has_one_budget() -> None:
    assert {Budget.parse(name).cost(Costs((500,), 500)) for name in ("low", "medium", "high", "full", "100%")} == {500}


@pytest.mark.parametrize(
    ("macs", "shown"), [(999, "999 MACs"), (1500, "1.5k MACs"), (9.25e6, "9.25M MACs"), (2e9, "2G MACs")]
)
def test_macs_for_people(macs: float, shown: str) -> None:
    assert format_macs(macs) == shown


@pytest.mark.parametrize(
    ("typed", "macs"),
    [("40M", 40_000_000), ("1.5G", 1_500_000_000), (" 800 k ", 800_000), ("7", 7), (7, 7), (2.5e6, 2_500_000)],
)
def test_numbers_of_macs_as_people_type_them(typed: str | float, macs: int) -> None:
    assert parse_macs(typed, "rate") == macs


@pytest.mark.parametrize(
    "typed",
    ["", "fast", "-1", "0", "0.5", "1e6", "40%", "5ms", "2000000000G", "9" * 5000, 0, -1, True, float("nan")],
    ids=lambda typed: str(typed)[:6],
)
def test_anything_else_is_not_a_number_of_macs(typed: str | float) -> None:
    with pytest.raises(UsageError, match="a rate"):
        parse_macs(typed, "rate")

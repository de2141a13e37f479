"""`policies.json`: of this model, with its checksum, consistent; anything else says what to type."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mexit.core.atomic_io import sha256_bytes, to_json
from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.cost import Costs
from mexit.core.policies_file import Policies
from mexit.errors import BudgetInfeasible, Damaged, NotCalibrated, SchemaTooNew, StalePolicy, Untrusted, UsageError


@pytest.fixture
def policies(digits_bundle: Path) -> Policies:
    return Bundle.open(digits_bundle).policies()


def edit(bundle: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> None:
    """Change the file; with `sign`, its checksum too, as somebody would who wants to get through."""
    value = json.loads((bundle / "policies.json").read_bytes())
    change(value)
    if sign:
        value["checksum"] = sha256_bytes(to_json({"model": value["model"], "entries": value["entries"]}))
    (bundle / "policies.json").write_bytes(to_json(value))


def test_policies_come_back_as_they_were_saved(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    before = bundle.policies()
    assert bundle.save_policies(before) == bundle_copy / "policies.json"
    assert Bundle.open(bundle_copy).policies() == before


def test_without_the_file_the_bundle_is_not_calibrated(bundle_copy: Path) -> None:
    (bundle_copy / "policies.json").unlink()
    with pytest.raises(NotCalibrated, match=f"has no policies.json: run mexit calibrate {bundle_copy}"):
        Bundle.open(bundle_copy).policies()


def test_policies_of_another_model_are_refused(bundle_copy: Path) -> None:
    own = Bundle.open(bundle_copy).id
    edit(bundle_copy, lambda value: value.update(model="f" * 64))
    with pytest.raises(StalePolicy, match=f"belongs to model {'f' * 12}, this bundle is {own[:12]}: run mexit calib"):
        Bundle.open(bundle_copy).policies()


def test_one_changed_threshold_breaks_the_checksum(bundle_copy: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["entries"][0]["frontier"][5]["thresholds"][0] = -1.0

    edit(bundle_copy, change, sign=False)
    with pytest.raises(Damaged, match="the checksum does not match the content; run mexit calibrate to write it again"):
        Bundle.open(bundle_copy).policies()


def test_every_single_flipped_bit_is_noticed(bundle_copy: Path) -> None:
    bundle, path = Bundle.open(bundle_copy), bundle_copy / "policies.json"
    good = path.read_bytes()
    before = bundle.policies()
    for place in range(0, len(good), 97):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            found = bundle.policies()
        except (Damaged, StalePolicy, SchemaTooNew):
            continue
        assert found == before, f"byte {place}"


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"format": "mexit-policies"}', b'{"format": "mexit-policies", "version": true}',
     b'{"format": "mexit-policies", "version": 1, "model": NaN}'],
    ids=["empty", "list", "no version", "version true", "nan"],
)  # fmt: skip
def test_what_is_no_policies_file_is_damaged(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / "policies.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"policies\.json"):
        Bundle.open(bundle_copy).policies()


def test_a_newer_file_is_told_apart_and_never_overwritten(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda value: value.update(version=3))
    for read in (Bundle.open(bundle_copy).policies, Bundle.open(bundle_copy).policies_or_empty):
        with pytest.raises(SchemaTooNew, match="version 3 is newer than this mexit reads"):
            read()


CHANGES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no frontier": (("frontier",), [], "an entry without frontier"),
    "unknown measure": (("measure",), "guess", "unknown measure 'guess'"),
    "frontier falls": (("frontier", 0, "budget_macs"), 1e15, "must rise in budget"),
    "name outside": (("named", "low"), 999, "a named budget points outside the frontier"),
    "name negative": (("named", "low"), -1, "a named budget points outside the frontier"),
    "fewer thresholds": (("frontier", 3, "thresholds"), [0.5], "3 temperatures need 2 thresholds"),
    "fewer reject thresholds": (("frontier", 3, "reject"), [0.5, None], "3 temperatures need 3 reject thresholds"),
    "text as reject threshold": (("frontier", 3, "reject"), [0.5, "a", None], r"reject\[1\]: expected float"),
    "text as threshold": (("frontier", 3, "thresholds"), ["a", None], r"thresholds\[0\]: expected float"),
    "temperature 0": (("temperatures",), [1.0, 0.0, 1.0], "temperatures must be positive"),
    "no ensemble": (("ensemble",), None, "ensemble: expected bool, found None"),
    "trace a text": (("trace",), "traces/x.npz", "trace: expected an object"),
}


@pytest.mark.parametrize(("path", "value", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_an_entry_that_cannot_be_is_damaged_even_with_a_fitting_checksum(
    bundle_copy: Path, path: tuple[Any, ...], value: Any, words: str
) -> None:
    def change(whole: dict[str, Any]) -> None:
        inner = whole["entries"][0]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    edit(bundle_copy, change)
    with pytest.raises(Damaged, match=words):
        Bundle.open(bundle_copy).policies()


def test_an_entry_for_another_number_of_exits_is_damaged(bundle_copy: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["entries"][0]["temperatures"].pop()
        for point in value["entries"][0]["frontier"]:
            point["thresholds"].pop()

    edit(bundle_copy, change)
    with pytest.raises(Damaged, match="the entry of ort is for 2 exits, this bundle has 3: run mexit calibrate"):
        Bundle.open(bundle_copy).policies()


def test_a_link_to_policies_elsewhere_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / "policies.json").rename(bundle_copy.parent / "policies.json")
    (bundle_copy / "policies.json").symlink_to("../policies.json")
    with pytest.raises(Untrusted, match="leads out of the bundle"):
        Bundle.open(bundle_copy).policies()


def test_a_trace_path_that_leaves_the_bundle_is_refused(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    ref = dataclasses.replace(bundle.policies().entries[0].trace, file="../outside.npz")
    with pytest.raises(Untrusted, match="leads out of the bundle"):
        bundle.load_trace(ref)


def test_a_new_entry_takes_the_place_of_the_same_engine_only(policies: Policies) -> None:
    entry = policies.entries[0]
    other = dataclasses.replace(entry, engine="fake")
    both = policies.with_entry(other)
    assert both.entries == (entry, other)
    newer = dataclasses.replace(entry, measure="margin")
    assert both.with_entry(newer).entries == (other, newer)


def test_a_budget_takes_the_largest_point_not_above_it(policies: Policies) -> None:
    entry = policies.entries[0]
    static = entry.frontier[-1].budget_macs
    macs = Costs((int(entry.frontier[0].budget_macs), static), static)
    for place, point in enumerate(entry.frontier[:-1]):
        between = (point.budget_macs + entry.frontier[place + 1].budget_macs) / 2
        assert entry.frontier[entry.frontier_index(Budget("x", "macs", between), macs)] is point
        assert entry.frontier[entry.frontier_index(Budget("x", "macs", point.budget_macs), macs)] is point
    assert entry.frontier[entry.frontier_index(Budget.parse("100G"), macs)] is entry.frontier[-1]


def test_named_budgets_take_their_own_points(policies: Policies) -> None:
    entry = policies.entries[0]
    for name, index in entry.named.items():
        assert entry.frontier[entry.frontier_index(Budget.parse(name), Costs((1, 2), 2))] is entry.frontier[index]
        assert entry.names[name] == entry.frontier[index].budget_macs


def test_below_the_smallest_point_both_ways_out_can_be_typed(policies: Policies) -> None:
    entry = dataclasses.replace(policies.entries[0], frontier=policies.entries[0].frontier[5:], named={})
    smallest = round(entry.frontier[0].budget_macs)
    with pytest.raises(BudgetInfeasible) as caught:
        entry.frontier[entry.frontier_index(Budget.parse("1000"), Costs((500, 10_000_000), 10_000_000))]
    assert str(caught.value) == (
        f"budget '1000' is 1k MACs; the smallest calibrated one is {smallest}: use that, "
        "or run mexit calibrate --budget mine=1000"
    )


def test_a_budget_of_ones_own_is_known_by_its_name(policies: Policies) -> None:
    names = {"night": policies.entries[0].frontier[7].budget_macs}
    assert (
        policies.entries[0].frontier[
            policies.entries[0].frontier_index(Budget.parse("night", names), Costs((1, 10**9), 10**9))
        ]
        is policies.entries[0].frontier[7]
    )
    with pytest.raises(UsageError, match="'night' is not a budget"):
        Budget.parse("night")


def test_saving_policies_removes_the_traces_that_nobody_names_any_more(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    policies = bundle.policies()
    named = {ref.file for entry in policies.entries for ref in (entry.trace, *entry.evidence)}
    (bundle_copy / "traces/old.npz").write_bytes(b"x")
    bundle.save_policies(policies)
    assert {f"traces/{file.name}" for file in (bundle_copy / "traces").iterdir()} == named


@pytest.mark.parametrize(
    ("engine", "precision", "variant", "name"),
    [
        ("openvino", "fp32", "fp32", "openvino"),
        ("ort", "bf16", "fp32", "ort:bf16"),
        ("ort", "int8", "int8", "ort:int8"),
    ],
)
def test_an_engine_without_an_entry_is_not_calibrated(policies, engine, precision, variant, name) -> None:
    with pytest.raises(NotCalibrated, match=f"calibrated: ort fp32.*run mexit calibrate --backend {name}$"):
        policies.entry(engine, precision, variant)

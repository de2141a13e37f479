"""The page of `benchmarks/time_saved.py`: its verdicts on known times, resumed measurements, and a rehearsal."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mexit.train.config import resolve

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark program by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def times(us: float) -> dict[str, Any]:
    noise = 1 + 0.001 * np.random.default_rng(round(us)).normal(size=9)
    return {
        "calls": 10,
        "rounds_us": (us * noise).tolist(),
        "rounds_p10_us": (us * noise).tolist(),
        "p50_us": us,
        "p95_us": us,
    }


def change(value: float, stderr: float = 0.002, macs: float = 1e6) -> dict[str, float]:
    return {"value": value, "stderr": stderr, "macs": macs}


def measured(
    load: Any, *, low: float = 60.0, full: float = 100.0, bare: float = 80.0, loss: float = 0.001
) -> dict[str, Any]:
    """Values of one engine, us, in which `medium` has the policy of `low`, and `high` that of `full`."""
    cases: ModuleType = load("time_saved_cases")
    same = {"full": "full", "low": "low", "medium": "low", "high": "full"}
    budgets = {name: change(-loss if first == "low" else 0.0) for name, first in same.items()}
    cuts = {"exit 1": change(-0.1), "exit 2": change(0.0)}
    accuracy = {"static": 0.9, "budgets": budgets, "cuts": cuts}
    values: dict[str, Any] = {
        "about": {
            "data": "cifar10", "settings": {"model": "resnet38"}, "exits": 3, "kept": [1, 3], "static_macs": 8e7,
            "n": {"test": 100, "certification": 50}, "failed": {"openvino": "not installed"},
        },
        "accuracy/ort": {"same": same, "test": accuracy, "certification": accuracy},
        "cuts/ort": {"exit 1": times(40), "exit 2": times(full)},
        "final": {
            "static, ort": times(full) | {"change": change(0.0)},
            "low, ort": times(low) | {"change": change(-loss)},
            "exit 1 as a static network, ort": times(70) | {"change": change(-0.001)},
        },
        "from pictures": {"train": 80.0, "export": 60.0, "pictures": 1800},
        "regression": {"accuracy": 0.98, "value": -0.002, "stderr": 0.001},
        "earlyon": "stages pass on 3 tensors; earlyon needs one",
    }  # fmt: skip
    for threads in cases.THREADS:
        for batch in cases.BATCHES:
            values[f"budgets/ort/{threads}/{batch}"] = {
                "full": times(full * batch), "low": times(low * batch), cases.BARE: times(bare * batch),
            }  # fmt: skip
    nodes = {"layers": 70.0, "layout": 1.0, "conversion": 0.0}
    ways = {"full/calls": 75, "full/decisions": 85, "full/runtime": full, "all segments/calls": 120}
    ways |= {"all segments/decisions": 150, "all segments/runtime": 170}
    values["account/ort"] = {
        "times": {name: times(us) for name, us in ways.items()},
        "nodes": {"full": nodes, "all segments": nodes | {"layers": 95.0, "layout": 9.0}},
    }
    return values


def verdict(load: Any, name: str, values: dict[str, Any]) -> list[str]:
    return list(load("time_saved_tables").verdicts({name: values}))


def test_targets_that_are_met(load: Any) -> None:
    slower, overhead, medium = verdict(load, "resnet38", measured(load))
    assert slower.endswith(": met.")
    assert "resnet38 20 ± 0 us (mean 20 ± 0): met" in overhead
    assert "`medium` takes 0.60 ± 0.00" in medium
    assert medium.endswith(": met.")


def test_a_budget_that_is_slower_than_the_static_network_is_named(load: Any) -> None:
    slower, _, medium = verdict(load, "resnet38", measured(load, low=104.0))
    assert "**missed**: resnet38 ort low (1.04 ± 0.00), resnet38 ort medium" in slower
    assert "high" not in slower, "it runs the static network"
    assert "**missed**" in medium
    assert verdict(load, "resnet38", measured(load, low=101.0))[0].endswith(": met.")


def test_other_targets_that_are_missed(load: Any) -> None:
    assert "**missed**" in verdict(load, "resnet38", measured(load, bare=50.0))[1], "the overhead is 50 us"
    assert "**missed**" in verdict(load, "resnet38", measured(load, loss=0.006))[2], "fast, but 0.6 points lost"
    assert len(verdict(load, "small-cnn", measured(load))) == 2, "no target of its own"


def test_efficientnet_is_compared_with_the_fastest_static_network_and_a_smaller_one(load: Any) -> None:
    *_, fastest, smaller = verdict(load, "lite0-gtsrb", measured(load))
    assert "low, ort is 1.67 times as fast" in fastest
    assert fastest.endswith(": met.")
    assert "takes 0.86 ± 0.00 of the time of the smaller static network" in smaller
    assert smaller.endswith(": met.")
    *_, fastest, smaller = verdict(load, "lite0-gtsrb-finetuned", measured(load, low=72.0))
    assert "**missed**" in fastest, "1.39 times instead of 2"
    assert "**missed**" in smaller, "72 us against 70 us"


def test_a_frozen_network_is_timed_from_its_pictures_and_compared_with_a_regression(load: Any) -> None:
    values = measured(load)
    _, _, took, regression, *_ = verdict(load, "lite0-imagenette-mini", values)
    assert "from 1,800 pictures to a calibrated bundle in 140 s" in took
    assert "98.0% on test images, -0.2 ± 0.1 points" in regression
    assert took.endswith(": met.")
    assert regression.endswith(": met.")
    values["from pictures"]["train"] = 250.0
    values["regression"]["value"] = -0.011
    assert sum("**missed**" in one for one in verdict(load, "lite0-imagenette-mini", values)[2:4]) == 2
    assert "regression" not in " ".join(verdict(load, "lite0-imagenette-mini-finetuned", values))


def test_the_tables_show_budgets_of_one_policy_in_one_row(load: Any) -> None:
    text = "\n".join(load("time_saved_tables").sections("resnet38", measured(load)))
    assert "of which the bundle keeps 1, 3;" in text
    assert "| ort | low, medium | 60 | 60 | 0.60 ± 0.00 | 1M | -0.1 ± 0.2 | -0.1 ± 0.2 |" in text
    assert "| ort | full, high | 100 us | 100 us | 100 us |" in text
    assert "| ort | full | 70 | 1 | 0 | 4 | 10 | 15 | 100 |" in text
    assert "| ort | difference | +25 | +8 | +0 | +12 | +20 | +5 | +70 |" in text
    assert "earlyon: stages pass on 3 tensors" in text
    assert "Not measured: openvino: not installed" in text


def test_a_value_is_measured_once_and_stored_at_once(load: Any, tmp_path: Path) -> None:
    part_class, path = load("time_saved_cases").Part, tmp_path / "parts" / "one.json"
    assert part_class(path).once("key", lambda: {"us": 1.5}) == {"us": 1.5}
    assert json.loads(path.read_bytes()) == {"key": {"us": 1.5}}
    again = part_class(path)
    assert again.once("key", lambda: pytest.fail("measured again")) == {"us": 1.5}
    assert again.once("other", lambda: 2) == 2
    assert part_class(path).values == {"key": {"us": 1.5}, "other": 2}


def test_the_recipes_have_valid_settings(load: Any) -> None:
    recipes = load("time_saved_networks").RECIPES
    for name in ("small-cnn", "wide-cnn", "msdnet-cifar10", "resnet38"):
        assert resolve(recipes[name].data, "neo_kd", recipes[name].settings).method == "clean"


@pytest.mark.long
def test_a_rehearsal_measures_everything_once(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = load("time_saved")
    typed = ["--miniature", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    typed += ["--seconds", "0.2", "--other-seconds", "0.1", "--threads", "1"]
    program.main(typed)
    page = capsys.readouterr().out
    assert "### digits: the fastest of each kind" in page
    assert "digits-frozen: the last exit has" in page
    before = {part: part.read_bytes() for part in (tmp_path / "results").iterdir()}
    assert len(before) == 2
    program.main(typed)
    assert {part: part.read_bytes() for part in before} == before
    assert capsys.readouterr().out.split("## digits")[1] == page.split("## digits")[1]

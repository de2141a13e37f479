"""The Grafana dashboard asks for metrics and labels that a real server has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import INFER, infer_body, start

from mexit import Bundle
from mexit.core.atomic_io import to_json
from mexit.core.versions import installed_versions
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.latency_profile import Profile

FILE = Path(__file__).parents[2] / "examples" / "grafana.json"
OF_PROMETHEUS = {"instance", "job"}  # labels that every scraped series has
VARIABLES = {"datasource", "instance", "model"}
FUNCTIONS = {"rate", "increase", "sum", "count", "histogram_quantile"}
KEYWORDS = {"by"}
# What the dashboard does not show.
LEFT_OUT = re.compile(r"process_(start_time_seconds|virtual_memory_bytes|max_fds)$|mexit_\w+_created$")
_SAMPLE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? \S+$", re.MULTILINE)
_LABELS = re.compile(r'(\w+)="[^"]*"')

Series = dict[str, set[str]]


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


@pytest.fixture(scope="module")
def served(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory, images: NDArray[np.float32]) -> Series:
    """The labels of every metric of a server with time policies, rate limits and drift watch, by name."""
    folder = tmp_path_factory.mktemp("grafana")
    profile = Profile((100.0, 200.0, 400.0), 400.0, Bundle.open(mixed_bundle).id, "ort", "fp32", 1,
                      installed_versions(PACKAGES))  # fmt: skip
    (folder / "profile.json").write_bytes(to_json(asdict(profile)))
    options = {"cost": "time", "profile": str(folder / "profile.json"), "rate": "1G", "client_rate": "1G"}
    with start(mixed_bundle, folder, watch_drift=0.5, threads=1, **options) as server:
        assert server.json("POST", INFER, infer_body(images[:4]))[0] == 200
        text = server.ask("GET", "/metrics")[2].decode()
    return {name: set(_LABELS.findall(labels)) for name, labels in _SAMPLE.findall(text)}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels that show queries; rows hold none here."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Every query with its legend."""
    return [(one["expr"], one["legendFormat"]) for panel in panels(dashboard) for one in panel["targets"]]


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """The metrics of a query, each with the labels by which it is selected."""
    bare = re.sub(r"by \([^)]*\)", "", query)
    found = re.findall(r"\b([a-z_]\w*)\{([^}]*)\}", bare)
    words = set(re.findall(r"\b[a-z_][a-z_0-9]*\b", re.sub(r"\{[^}]*\}|\[[^]]*\]|\d[\d.e-]*", "", bare)))
    assert words - FUNCTIONS - KEYWORDS == {name for name, _ in found}, f"a metric without a selector: {query}"
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", text))) for name, text in found]


def test_every_metric_and_label_exists(dashboard: dict[str, Any], served: Series) -> None:
    for query, legend in queries(dashboard):
        grouped = {label for text in re.findall(r"by \(([^)]*)\)", query) for label in text.split(", ")}
        shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
        for name, labels in selectors(query):
            assert name in served, f"no metric {name}: {query}"
            unknown = (labels | grouped) - served[name] - OF_PROMETHEUS
            assert not unknown, f"{name} has no label {unknown}: {query}"
            assert shown <= (grouped or served[name] | OF_PROMETHEUS), f"{legend}: {query}"


def test_every_metric_is_shown(dashboard: dict[str, Any], served: Series) -> None:
    asked = {name for query, _ in queries(dashboard) for name, _ in selectors(query)}
    assert {name for name in served.keys() - asked if not LEFT_OUT.match(name)} == set()


def test_the_choices_at_the_top_exist(dashboard: dict[str, Any], served: Series) -> None:
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables.keys() == VARIABLES
    for one in variables.values():
        if one["type"] == "query":
            metric, selected, label = re.fullmatch(
                r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", one["definition"]
            ).groups()  # type: ignore[union-attr]
            labels = {label, *re.findall(r"(\w+)=", selected or "")}
            assert labels <= served[metric] | OF_PROMETHEUS
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([*panels(dashboard)])))
    assert used - {"__rate_interval"} == VARIABLES


def test_the_panels_fit_and_are_described(dashboard: dict[str, Any]) -> None:
    """No two overlap, and each has a unit, a description and the chosen data source."""
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken = np.zeros((200, 24), int)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]] += 1
    assert taken.max() == 1
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] == "heatmap" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])

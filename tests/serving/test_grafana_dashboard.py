"""The Grafana dashboard asks for metrics and labels that a real server has."""

from __future__ import annotations

import http.client
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from servers import INFER, Server, free_port, infer_body, start, wait_until

from mexit import Bundle
from mexit.core.atomic_io import to_json
from mexit.core.versions import installed_versions
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.latency_profile import Profile

FILE = Path(__file__).parents[2] / "examples" / "grafana.json"
OF_PROMETHEUS = {"instance", "job"}  # labels that every scraped series has
VARIABLES = {"datasource", "instance", "model"}
FUNCTIONS = {"rate", "increase", "sum", "max", "count", "histogram_quantile"}
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
def server(
    mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory, images: NDArray[np.float32]
) -> Iterator[Server]:
    """A server with time policies, rate limits, drift watch and a camera, so that it has all metrics."""
    pytest.importorskip("av", reason="needs the extra camera")
    folder = tmp_path_factory.mktemp("grafana")
    versions = installed_versions(PACKAGES)
    profile = Profile((100.0, 200.0, 400.0), 400.0, Bundle.open(mixed_bundle).id, "ort", "fp32", 1, versions)
    (folder / "profile.json").write_bytes(to_json(asdict(profile)))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "frame.png")
    (folder / "cameras.toml").write_text(f"[[camera]]\nname = 'door'\nsource = '{folder / 'frame.png'}'\n")
    options = {"cost": "time", "profile": str(folder / "profile.json"), "rate": "1G", "client_rate": "1G"}
    options["cameras"] = str(folder / "cameras.toml")
    with start(mixed_bundle, folder, watch_drift=0.5, threads=1, **options) as running:
        assert running.json("POST", INFER, infer_body(images[:4]))[0] == 200
        wait_until(lambda: running.series("mexit_camera_frames_total", outcome="answered") == 1)
        yield running


@pytest.fixture(scope="module")
def served(server: Server) -> Series:
    """The labels of every metric, by name."""
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
    missing = {name for name in served.keys() - asked if not LEFT_OUT.match(name)}
    assert not missing, f"add a panel to {FILE.name}, or leave it out here"


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


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to a Prometheus that scrapes the server twice a second."""
    program, port = shutil.which("prometheus"), free_port()
    if program is None:
        pytest.skip("needs prometheus (apt install prometheus)")
    scrape = {"job_name": "mexit", "scrape_interval": "500ms", "static_configs": [{"targets": [server.address]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))  # JSON is YAML
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    with subprocess.Popen([program, *options], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            yield connection
        finally:
            connection.close()
            process.terminate()


@pytest.mark.long
def test_prometheus_answers_every_query(
    dashboard: dict[str, Any], server: Server, prometheus: http.client.HTTPConnection, images: NDArray[np.float32]
) -> None:
    """With a number that is finite for each of its series, once a few requests were answered and one refused."""

    def answer(query: str) -> list[float]:
        for variable, value in (("$__rate_interval", "4s"), ("$instance", ".+"), ("$model", ".+")):
            query = query.replace(variable, value)
        try:
            prometheus.request("GET", f"/api/v1/query?query={quote(query)}")
            response = prometheus.getresponse()
            body = response.read()
        except OSError:
            prometheus.close()
            return []
        if response.status == 503:  # it starts
            return []
        content = json.loads(body)
        assert content["status"] == "success", (query, content)
        return [float(series["value"][1]) for series in content["data"]["result"]]

    def has_numbers(query: str) -> bool:
        server.json("POST", INFER, infer_body(images[:8]))
        server.json("POST", INFER, infer_body(images[:1], mexit_budget="none"))
        values = answer(query)
        return bool(values) and any(map(math.isfinite, values))

    for query, _ in queries(dashboard):
        wait_until(lambda query=query: has_numbers(query))

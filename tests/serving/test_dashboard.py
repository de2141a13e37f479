"""The dashboard's files and JSON routes: complete, without outside resources, and in agreement with the metrics."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import Client, Server, infer_body, serve_runtime, start

import mexit
from mexit import Bundle, Runtime
from mexit.core.atomic_io import to_json
from mexit.core.versions import installed_versions
from mexit.runtime.autotune import PACKAGES
from mexit.runtime.latency_profile import Profile
from mexit.serving.dashboard_files import TYPES

Images = NDArray[np.float32]
FOLDER = Path(mexit.__file__).parent / "serving" / "dashboard"
FILES = sorted(path.name for path in FOLDER.iterdir())


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def stats_of(client: Client) -> Any:
    status, value = client.json("GET", "/v1/stats")
    assert status == 200
    return value


def test_every_file_is_served_with_its_type_and_policy(server: Server) -> None:
    for name in FILES:
        status, headers, content = server.ask("GET", f"/dashboard/{name}")
        assert (status, headers["content-type"]) == (200, TYPES[Path(name).suffix])
        assert content == (FOLDER / name).read_bytes()
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
    assert server.ask("GET", "/")[2] == (FOLDER / "index.html").read_bytes()
    for name in ("..", "%2e%2e%2fhttp.py", "http.py", "index"):
        assert server.ask("GET", f"/dashboard/{name}")[0] == 404


def test_the_page_loads_only_its_own_files() -> None:
    """No address but relative ones, no script or style in the page, and every file is used."""
    used = set(re.findall(r'(?:src|href)="(?!#)([^"]+)"', text("index.html")))
    assert used - {"docs"} == {"dashboard/dashboard.css", "dashboard/dashboard.js", "dashboard/icon.svg"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text("index.html"))
    modules = {name for file in FILES for name in re.findall(r'from "\./([\w.]+)"', text(file))}
    assert modules | {"dashboard.js", "dashboard.css", "icon.svg", "index.html"} == set(FILES)
    for name in FILES:
        addresses = set(re.findall(r"https?://[^\"'\s)]+", text(name)))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|@import|url\(", text(name)), name


def test_every_element_that_the_scripts_name_is_in_the_page() -> None:
    ids = set(re.findall(r'\sid="([\w-]+)"', text("index.html")))
    named = {name for file in FILES for name in re.findall(r'\bby\("([\w-]+)"\)', text(file))}
    assert named <= ids
    assert set(re.findall(r'(?:aria-labelledby|for)="([\w-]+)"', text("index.html"))) <= ids


def test_the_wheel_holds_the_files() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs the extra dev")
    builder = wheel.WheelBuilder(str(Path(mexit.__file__).parents[1]))
    held = {file.distribution_path for file in builder.recurse_included_files()}
    assert {f"mexit/serving/dashboard/{name}" for name in FILES} <= held


def test_the_page_needs_no_token_and_its_data_do(mixed_bundle: Path, sample_png: bytes) -> None:
    with serve_runtime(Runtime.open(mixed_bundle), tokens=("a-token",)) as client:
        assert client.ask("GET", "/")[0] == client.ask("GET", "/dashboard/dashboard.js")[0] == 200
        assert client.ask("GET", "/v1/stats")[0] == client.ask("POST", "/v1/explain", sample_png)[0] == 401
        assert client.ask("GET", "/v1/stats", headers={"Authorization": "Bearer a-token"})[0] == 200


def test_stats_agree_with_the_answers(mixed_bundle: Path, runtime: Runtime, images: Images, sample_png: bytes) -> None:
    with serve_runtime(Runtime.open(mixed_bundle, "medium")) as client:
        assert [exit["answers"] for exit in stats_of(client)["models"][0]["exits"]] == [0, 0, 0]
        for budget in ("low", "full"):
            assert client.ask("POST", "/v2/models/digits/infer", infer_body(images, mexit_budget=budget))[0] == 200
        client.ask("POST", "/v1/classify", b"no picture")
        client.ask("POST", "/v1/explain", sample_png)
        stats = stats_of(client)
    answers = [*runtime(images, budget="low"), *runtime(images, budget="full")]
    [model] = stats["models"]
    assert [exit["answers"] for exit in model["exits"]] == [
        sum(answer.exit == number for answer in answers) for number in (1, 2, 3)
    ]
    assert [exit["macs"] for exit in model["exits"]] == list(runtime.bundle.manifest.cumulative_macs)
    assert model["answers_by_budget"] | {"low": 60, "full": 60} == model["answers_by_budget"]
    assert model["totals"]["macs"] == sum(answer.macs for answer in answers)
    assert model["totals"]["static_macs"] == model["static_macs"] * 120 == int(runtime.costs.static) * 120
    assert model["latency"]["counts"][-1] == 3, "the refused picture is a request, and the explained one is not"
    assert model["latency"]["counts"] == sorted(model["latency"]["counts"])
    assert (stats["errors"], stats["rate_limiter"], model["drift"]) == ({"400": 1}, None, None)
    assert stats["repository"] == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]


def test_shares_of_budgets_select_what_their_names_select(mixed_bundle: Path, server: Server) -> None:
    """The named budgets are where the page's slider shows them, and the lowest share is feasible."""
    budgets = stats_of(server)["models"][0]["budgets"]
    runtime = Runtime.open(mixed_bundle)
    assert budgets["named"].pop("full") == 1
    assert sorted(budgets["named"]) == ["high", "low", "medium"]
    for name, share in budgets["named"].items():
        assert runtime.policy(f"{100 * share + 1e-6:.7f}%").thresholds == runtime.policy(name).thresholds
    assert (budgets["unit"], budgets["calibrated"]) == ("macs", True)
    assert runtime.policy(f"{100 * budgets['lowest'] + 0.001:.3f}%").thresholds


def test_saved_time_is_that_of_the_profile(mixed_bundle: Path, tmp_path: Path, images: Images) -> None:
    """With times of 1, 2 and 4 ms, and 5 ms for the static network."""
    model_id, path = Bundle.open(mixed_bundle).id, tmp_path / "profile.json"
    profile = Profile((1e3, 2e3, 4e3), 5e3, model_id, "ort", "fp32", 1, installed_versions(PACKAGES))
    path.write_bytes(to_json(asdict(profile)))
    timed = Runtime.open(mixed_bundle, "low", cost="time", profile=path)
    with serve_runtime(timed) as client:
        assert client.ask("POST", "/v2/models/digits/infer", infer_body(images))[0] == 200
        assert client.ask("POST", "/v2/models/digits/infer", infer_body(images[:5], mexit_budget="full"))[0] == 200
        [model] = stats_of(client)["models"]
    exits = [answer.exit for answer in timed(images)]
    assert set(exits) >= {1, 2}
    expected = 5 * 5e-3 + sum({1: 1e-3, 2: 2e-3, 3: 4e-3}[k] for k in exits)
    assert model["totals"]["profile_s"] == pytest.approx(expected)
    assert model["totals"]["static_profile_s"] == pytest.approx(65 * 5e-3)
    assert (model["static_us"], model["budgets"]["unit"]) == (5000.0, "us")


def test_the_rate_limiter_bounds_explanations(mixed_bundle: Path, sample_png: bytes) -> None:
    """Its bucket holds one pass through all exits."""
    macs = Bundle.open(mixed_bundle).manifest.cumulative_macs[-1]
    with serve_runtime(Runtime.open(mixed_bundle, rate=1, burst=macs)) as client:
        before = stats_of(client)["rate_limiter"]
        assert client.ask("POST", "/v1/explain", sample_png)[0] == 200
        status, headers, content = client.ask("POST", "/v1/explain", sample_png)
        after = stats_of(client)["rate_limiter"]
    assert (status, "retry-after" in headers) == (503, True)
    assert "no tokens for all exits" in json.loads(content)["error"]
    assert before["all"] == {"macs_per_s": 1, "burst_macs": macs}
    assert before["tokens"] == macs
    assert after["tokens"] < 10


def test_an_explanation_as_json(server: Server, runtime: Runtime, sample_png: bytes) -> None:
    [answer] = runtime([sample_png], budget="low")
    status, found = server.json("POST", "/v1/explain?budget=low", sample_png)
    assert status == 200
    assert (found["exit"], found["label"], found["macs"]) == (answer.exit, answer.label, answer.macs)
    assert len(found["exits"]) == 3
    for one in found["exits"]:
        shown = [entry["probability"] for entry in one["classes"]]
        assert len(shown) == 5
        assert shown == sorted(shown, reverse=True)
        reaches = one["threshold"] is not None and one["score"] >= one["threshold"]
        assert (reaches or one["exit"] == 3) or one["exit"] < found["exit"]
    assert found["exits"][-1]["threshold"] is None


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("?budget=1%25", 400, "nearest feasible budget"),
        ("?budget=much", 400, "is not a budget"),
        ("?max_exit=1", 400, "unknown query 'max_exit': known are model, budget"),
        ("?model=letters", 404, "unknown model 'letters'"),
    ],
)
def test_faulty_explanations(server: Server, sample_png: bytes, query: str, status: int, message: str) -> None:
    found, answer = server.json("POST", f"/v1/explain{query}", sample_png)
    assert found == status
    assert message in answer["error"]


@pytest.mark.slow
def test_counts_of_all_processes(mixed_bundle: Path, tmp_path: Path, images: Images) -> None:
    with start(mixed_bundle, tmp_path, workers=2) as server:
        for _ in range(6):  # each on a connection of its own
            assert server.ask("POST", "/v2/models/digits/infer", infer_body(images[:10]))[0] == 200
        found = [sum(exit["answers"] for exit in stats_of(server)["models"][0]["exits"]) for _ in range(4)]
    assert found == [60] * 4

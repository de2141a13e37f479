"""The Python model of a Triton repository gives the answers of the runtime, at every budget."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from triton_stub import ClientRequest, InferenceResponse, TritonModelException, TritonServer, assert_equal

from mexit import Bundle, Runtime
from mexit.core.exit_policy import LOWEST
from mexit.core.policies_file import PolicyEntry
from mexit.core.scores import AGREEMENT, MEASURES
from mexit.export.triton_repository import write_repository

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0" / "bundles" / "demo"
BUDGETS = ("low", "medium", "high", "full", "40%", "100%", "800k", "1.2M", "9G")


@pytest.fixture(scope="module")
def images(test_digits) -> NDArray[np.float32]:
    """Test digits as a tensor, (64, 1, 8, 8)."""
    return (test_digits[0][:64, None] / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="module")
def server(mixed_bundle, tmp_path_factory) -> TritonServer:
    """`mixed_bundle` in the stub of Triton."""
    return serve(mixed_bundle, tmp_path_factory.mktemp("triton") / "models")


def serve(bundle: Path, repository: Path) -> TritonServer:
    """Write the repository of a bundle and load it."""
    models = write_repository(Bundle.open(bundle), repository)
    return TritonServer(repository, models[0])


def with_frontier(bundle: Path, copy: Path, **changes: object) -> Path:
    """A copy of a bundle whose thresholds let a third of the calibration samples leave at each exit."""
    opened = Bundle.open(Path(shutil.copytree(bundle, copy)))
    policies = opened.policies()
    [entry] = policies.entries
    entry = replace(entry, **changes, certificates=())
    scores = entry.policy(entry.frontier[0]).scorer(10).score(opened.load_trace(entry.trace).logits)
    thresholds = tuple(float(np.quantile(row, 2 / 3)) for row in scores[:-1])
    few = (thresholds[0], *(None for _ in thresholds[1:]))
    points = [(1.2e6, thresholds), (1.4e6, few), (1.6e6, (None,) * len(thresholds))]
    frontier = tuple(replace(entry.frontier[-1], budget_macs=macs, thresholds=one) for macs, one in points)
    named: dict[str, int] = {"third": 0, "few": 1, "static": 2}
    changed: PolicyEntry = replace(entry, frontier=frontier, named=named)
    opened.save_policies(policies.with_entry(changed))
    return copy


@pytest.mark.parametrize("bundle", ["digits_bundle", "mixed_bundle", "reject_bundle"])
def test_every_budget_gives_the_answers_of_the_runtime(bundle, images, tmp_path, request) -> None:
    path = request.getfixturevalue(bundle)
    server, runtime = serve(path, tmp_path / "models"), Runtime.open(path, backend="ort")
    for budget in BUDGETS:
        [response] = server.infer(ClientRequest(images, {"mexit_budget": budget}))
        assert_equal(response.arrays(), runtime(images, budget=budget))


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
def test_every_score_gives_the_answers_of_the_runtime(measure, ensemble, digits_bundle, images, tmp_path) -> None:
    temperatures = (0.7, 1.3, 2.0)
    path = with_frontier(
        digits_bundle, tmp_path / "digits", measure=measure, ensemble=ensemble, temperatures=temperatures
    )
    server, runtime = serve(path, tmp_path / "models"), Runtime.open(path, "full", backend="ort")
    for budget in ("third", "few", "static", "full"):
        predictions = runtime(images, budget=budget)
        [response] = server.infer(ClientRequest(images, {"mexit_budget": budget}))
        assert_equal(response.arrays(), predictions)
        exits = {"third": {1, 2, 3}, "few": {1, 3}}.get(budget, {3})
        if measure != AGREEMENT:  # whole numbers, so that its quantile is not at a third
            assert {one.exit for one in predictions} == exits


def test_a_confident_answer_is_sure_below_the_reject_threshold(reject_bundle, images, tmp_path) -> None:
    path = with_frontier(reject_bundle, tmp_path / "digits")
    bundle = Bundle.open(path)
    policies = bundle.policies()
    [entry] = policies.entries
    [first, second] = entry.frontier[0].thresholds
    high = replace(entry.frontier[0], reject=(first + 1, second + 1, second))
    everyone = replace(entry.frontier[1], thresholds=(LOWEST, None), reject=(first, None, None))
    bundle.save_policies(policies.with_entry(replace(entry, frontier=(high, everyone, entry.frontier[2]))))
    server, runtime = serve(path, tmp_path / "models"), Runtime.open(path, "full", backend="ort")
    for budget, unsure_exits in (("third", {3}), ("few", {1})):
        predictions = runtime(images, budget=budget)
        assert {one.exit for one in predictions if one.index is None} == unsure_exits
        [response] = server.infer(ClientRequest(images, {"mexit_budget": budget}))
        assert_equal(response.arrays(), predictions)


def test_a_bundle_without_static_network_runs_its_segments(images, tmp_path) -> None:
    server, runtime = serve(GOLDEN, tmp_path / "models"), Runtime.open(GOLDEN, backend="ort")
    for budget in ("low", "full"):
        [response] = server.infer(ClientRequest(images, {"mexit_budget": budget}))
        assert_equal(response.arrays(), runtime(images, budget=budget))
    assert server.calls[-3:] == [(f"demo-exit{k}", len(images)) for k in (1, 2, 3)]


def test_only_rows_that_have_not_left_run_on(server, images, mixed_bundle) -> None:
    server.calls.clear()
    [response] = server.infer(ClientRequest(images, {"mexit_budget": "medium"}))
    exits = response.arrays()["exit"][:, 0]
    assert set(exits.tolist()) == {1, 2, 3}
    assert server.calls == [(f"digits-exit{k}", int((exits >= k).sum())) for k in (1, 2, 3)]


def test_the_budget_full_runs_the_static_network(server, images) -> None:
    server.calls.clear()
    server.infer(ClientRequest(images, {"mexit_budget": "full"}))
    assert server.calls == [("digits-static", len(images))]


def test_requests_of_one_call_get_their_own_answers(server, images, mixed_bundle) -> None:
    runtime = Runtime.open(mixed_bundle, backend="ort")
    requests = [
        ClientRequest(images[:1], {"mexit_budget": "low"}),
        ClientRequest(images[1:9], {"mexit_budget": "full"}),
        ClientRequest(images[9:12] * 255, {"mexit_budget": "low"}),
        ClientRequest(images[12:30], {"mexit_budget": "low", "priority": 3}),
        ClientRequest(images[30:35]),
    ]
    server.calls.clear()
    responses = server.infer(*requests)
    for place, budget in ((0, "low"), (1, "full"), (3, "low"), (4, "low")):
        assert_equal(responses[place].arrays(), runtime(requests[place].images, budget=budget))
    assert "divide 0..255 by 255" in responses[2].error().message()
    assert server.calls[0] == ("digits-exit1", 1 + 18 + 5), "requests of one policy run as one batch"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"mexit_budget": "1k"}, r"'1k' is 1000 MACs: the smallest feasible budget is \d{5,}$"),
        ({"mexit_budget": "0"}, "smallest feasible budget"),
        ({"mexit_budget": "0.01%"}, "smallest feasible budget"),
        ({"mexit_budget": "5ms"}, "must be .*low.*full.*found '5ms'"),
        ({"mexit_budget": "120%"}, "found '120%'"),
        ({"mexit_budget": "cheap"}, "found 'cheap'"),
        ({"mexit_budget": 800}, "found 800"),
        ({"mexit_budget": None}, "found None"),
        ({"mexit_bugdet": "low"}, "unknown parameter 'mexit_bugdet': the only one is mexit_budget"),
        ({"mexit_deadline_us": 100}, "unknown parameter 'mexit_deadline_us'"),
    ],
)
def test_a_wrong_parameter_is_an_error_that_says_what_is_expected(server, images, parameters, text) -> None:
    server.calls.clear()
    [response] = server.infer(ClientRequest(images, parameters))
    assert response.error().code == "INVALID_ARG"
    assert_matches(response, text)
    assert not server.calls


def assert_matches(response: InferenceResponse, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        raise ValueError(response.error().message())


def test_the_nearest_feasible_budget_of_the_message_works(server, images) -> None:
    [response] = server.infer(ClientRequest(images, {"mexit_budget": "1k"}))
    nearest = response.error().message().rpartition(" ")[2]
    [response] = server.infer(ClientRequest(images, {"mexit_budget": nearest}))
    assert not response.has_error()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_values_that_are_not_pixels_are_refused(server, images, value) -> None:
    wrong = images[:2].copy()
    wrong[1, 0, 3, 3] = value
    [response] = server.infer(ClientRequest(wrong))
    assert_matches(response, r"values in \[0, 1\]")


def test_a_failing_segment_fails_the_batch(mixed_bundle, images, tmp_path) -> None:
    server = serve(mixed_bundle, tmp_path / "models")
    server.failing = "digits-exit2"
    with pytest.raises(TritonModelException, match="digits-exit2: out of memory"):
        server.infer(ClientRequest(images, {"mexit_budget": "medium"}))


def test_the_default_budget_is_a_parameter_of_the_configuration(mixed_bundle, images, tmp_path) -> None:
    serve(mixed_bundle, tmp_path / "models")
    config = tmp_path / "models" / "digits" / "config.pbtxt"
    original = config.read_text()
    config.write_text(original.replace('string_value: "low"', 'string_value: "full"'))
    server = TritonServer(tmp_path / "models", "digits")
    server.infer(ClientRequest(images))
    assert server.calls == [("digits-static", len(images))]
    config.write_text(original.replace('string_value: "low"', 'string_value: "1k"'))
    with pytest.raises(ValueError, match="smallest feasible"):
        TritonServer(tmp_path / "models", "digits")

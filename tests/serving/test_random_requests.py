"""Requests that schemathesis makes from the OpenAPI description: valid, and invalid in one place."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from servers import Server
from test_openapi import DESCRIPTION, OPERATIONS

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra dev, and Python 3.11")

# A request can be as the description says and not fit the model, whose shape and exits it does not know; and the server
# ignores what it does not know, such as the content type of a tensor request.
NOT_PROMISED = ("positive_data_acceptance", "negative_data_rejection")


def check(server: Server, method: str, path: str, mode: str, examples: int) -> None:
    """No random request gets an undocumented status, type or body, or status 500."""
    schema = schemathesis.openapi.from_dict(DESCRIPTION)
    operation = schema[path][method]
    names = {"model": "digits", "version": "1"} if "infer" in path and mode == "positive" else None
    cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode), path_parameters=names)
    excluded = [getattr(schemathesis.checks, name) for name in NOT_PROMISED]

    @given(case=cases)
    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        derandomize=examples < 100,
        suppress_health_check=list(HealthCheck),
    )
    def run(case: object) -> None:
        case.call_and_validate(base_url=server.url, excluded_checks=excluded)  # type: ignore[attr-defined]

    run()


def can_be_wrong(method: str, path: str) -> bool:
    """Whether a request can be invalid: a route without parameters and body takes every one."""
    return method == "POST" or "{version}" in path


CASES = [(*operation, "positive") for operation in OPERATIONS]
CASES += [(*operation, "negative") for operation in OPERATIONS if can_be_wrong(*operation)]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_random_requests(server: Server, method: str, path: str, mode: str) -> None:
    check(server, method, path, mode, 3 if method == "GET" else 10)
    assert server.json("GET", "/v2/models/digits/ready") == (200, {"name": "digits", "ready": True})


@pytest.mark.long
@pytest.mark.parametrize(("method", "path"), [operation for operation in OPERATIONS if operation[0] == "POST"])
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_many_random_requests(server: Server, method: str, path: str, mode: str) -> None:
    check(server, method, path, mode, 2000)

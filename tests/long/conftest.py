"""Fixtures of the tests with other projects' clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served_demo import BUNDLE, Images, Served, digit_tensor, serve_demo

from mexit import Runtime


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "tls"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_demo(tmp_path_factory.mktemp("served"), request.param) as one:
        yield one


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.open(BUNDLE, budget="medium")


@pytest.fixture(scope="module")
def images() -> Images:
    return digit_tensor()

"""One server for all tests that do not need one of their own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from servers import Server, start

from mexit import Runtime


@pytest.fixture(scope="session")
def server(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A shared server with the budget `medium`. Tests compare its counters before and after."""
    with start(mixed_bundle, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def runtime(mixed_bundle: Path) -> Runtime:
    """The runtime with the same bundle and budget, which gives the expected answers."""
    return Runtime.open(mixed_bundle, budget="medium")


@pytest.fixture(scope="session")
def images(test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> NDArray[np.float32]:
    """60 digits as the input tensor, (60, 1, 8, 8) float32 in [0, 1]."""
    return (test_digits[0][:60, None] / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="session")
def sample_png(test_digits: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> bytes:
    """A digit as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(test_digits[0][0]).save(stream, "PNG")
    return stream.getvalue()

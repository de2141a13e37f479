"""Unsure answers over HTTP: JSON, tensors, binary tensors, batches of several clients, and metrics."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from servers import INFER, Server, infer_body, outputs_of, start

from mexit import Runtime

Images = NDArray[np.float32]


@pytest.fixture(scope="module", params=["off", "continuous"])
def server(reject_bundle: Path, tmp_path_factory: pytest.TempPathFactory, request) -> Iterator[Server]:
    with start(reject_bundle, tmp_path_factory.mktemp("unsure"), batching=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def runtime(reject_bundle: Path) -> Runtime:
    return Runtime.open(reject_bundle, budget="medium")


@pytest.mark.parametrize("parameters", [{}, {"mexit_max_exit": 1}, {"mexit_budget": "full"}], ids=str)
def test_a_tensor_request_has_label_minus_1(server: Server, runtime: Runtime, images: Images, parameters) -> None:
    budget, max_exit = parameters.get("mexit_budget"), parameters.get("mexit_max_exit")
    expected = runtime(images, budget=budget, max_exit=max_exit)
    unsure = [one.reason == "unsure" for one in expected]
    assert 0 < sum(unsure) < len(images)
    before = server.series("mexit_unsure_total", budget=budget or "medium")
    status, answer = server.json("POST", INFER, infer_body(images, **parameters))
    assert status == 200
    outputs = outputs_of(answer)
    assert outputs["label"] == [-1 if one.index is None else one.index for one in expected]
    assert [label == -1 for label in outputs["label"]] == unsure
    assert outputs["exit"] == [one.exit for one in expected]
    assert np.asarray(outputs["probabilities"]).max() <= 1
    np.testing.assert_array_equal(outputs["confidence"], np.array([one.confidence for one in expected], np.float32))
    assert answer["parameters"]["mexit_unsure_rows"] == sum(unsure)
    assert server.series("mexit_unsure_total", budget=budget or "medium") - before == sum(unsure)


def test_a_binary_tensor_request_has_it_too(server: Server, runtime: Runtime, images: Images) -> None:
    expected = runtime(images)
    row = next(i for i, one in enumerate(expected) if one.reason == "unsure")
    header = {"Inference-Header-Content-Length": "0"}
    _, headers, body = server.ask("POST", INFER, images[row : row + 1].tobytes(), header)
    split = int(headers["inference-header-content-length"])
    at = split
    for entry in json.loads(body[:split])["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        if entry["name"] == "label":
            assert np.frombuffer(body[at : at + size], "<i8").tolist() == [-1]
        at += size


def test_a_classified_image_has_null(server: Server, runtime: Runtime, test_digits) -> None:
    for pixels in test_digits[0][:40]:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        status, answer = server.json("POST", "/v1/classify?receipts=true", content.getvalue())
        [expected] = runtime(pixels)
        assert status == 200
        assert (answer["label"], answer["index"], answer["reason"]) == (expected.label, expected.index, expected.reason)
        if expected.reason == "unsure":
            assert answer["receipt"]["reason"] == "unsure"
            break
    else:
        pytest.fail("no image is unsure")


def test_the_counter_is_there_from_the_start(mixed_bundle: Path, tmp_path: Path) -> None:
    with start(mixed_bundle, tmp_path) as own:
        text = own.ask("GET", "/metrics")[2].decode()
        assert 'mexit_unsure_total{budget="low",model="digits"} 0.0' in text

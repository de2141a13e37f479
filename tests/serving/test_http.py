"""The Open Inference Protocol over HTTP: an unmodified client, and the same answers as from the runtime."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from PIL import Image
from servers import INFER, Server, infer_body, start

from mexit import Prediction, Runtime
from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
from mexit.serving.oip import HEADER_LENGTH

Images = NDArray[np.float32]


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with triton.InferenceServerClient(server.address) as triton_client:
        yield triton_client


def columns(predictions: list[Prediction]) -> dict[str, NDArray[Any]]:
    """The five outputs of predictions."""
    return {
        "probabilities": np.array([prediction.probabilities for prediction in predictions]).astype(np.float32),
        "label": np.array([prediction.index for prediction in predictions], np.int64),
        "confidence": np.array([prediction.confidence for prediction in predictions]).astype(np.float32),
        "exit": np.array([prediction.exit for prediction in predictions], np.int32),
        "macs": np.array([prediction.macs for prediction in predictions], np.int64),
    }


def assert_same(outputs: dict[str, NDArray[Any]], predictions: list[Prediction]) -> None:
    for name, expected in columns(predictions).items():
        assert outputs[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(outputs[name], expected, err_msg=name)


def json_request(images: Images, **parts: Any) -> dict[str, Any]:
    entry = {"name": "input", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return {"inputs": [entry], **parts}


def arrays_of(response: dict[str, Any]) -> dict[str, NDArray[Any]]:
    dtypes = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32}
    return {
        output["name"]: np.array(output["data"], dtypes[output["datatype"]]).reshape(output["shape"])
        for output in response["outputs"]
    }


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary-out", "json-out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary-in", "json-in"])
def test_tritonclient_gets_what_the_runtime_answers(
    client: Any, runtime: Runtime, images: Images, binary_in: bool, binary_out: bool, compression: str | None
) -> None:
    tensor = triton.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary_in)
    names = ["macs", "exit", "confidence", "label", "probabilities"]
    result = client.infer(
        "digits",
        [tensor],
        outputs=[triton.InferRequestedOutput(name, binary_data=binary_out) for name in names],
        request_id="a request",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
        parameters={"mexit_budget": "high"},
    )
    expected = runtime(images, budget="high")
    assert len({prediction.exit for prediction in expected}) > 1, "the images must leave at several exits"
    assert_same({name: result.as_numpy(name) for name in names}, expected)
    response = result.get_response()
    assert [output["name"] for output in response["outputs"]] == names
    assert (response["model_name"], response["model_version"], response["id"]) == ("digits", "1", "a request")
    assert response["parameters"]["mexit_budget"] == "high"
    assert response["parameters"]["mexit_mean_macs"] == pytest.approx(
        np.mean([prediction.macs for prediction in expected])
    )


def test_tritonclient_gets_all_outputs_by_default(client: Any, runtime: Runtime, images: Images) -> None:
    tensor = triton.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    result = client.infer("digits", [tensor], model_version="1")
    expected = runtime(images)
    assert_same({name: result.as_numpy(name) for name in columns(expected)}, expected)


def test_tritonclient_reads_all_metadata(client: Any, runtime: Runtime) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("letters")
    assert client.get_server_metadata()["name"] == "mexit"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    index = [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    assert client.get_model_repository_index() == index
    config = client.get_model_config("digits")
    assert config["max_batch_size"] == 1024
    assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [1, 8, 8]}]
    for statistics in (client.get_inference_statistics("digits"), client.get_inference_statistics()):
        assert statistics["model_stats"][0]["name"] == "digits"


def test_model_metadata(client: Any, runtime: Runtime) -> None:
    metadata = client.get_model_metadata("digits")
    assert metadata == client.get_model_metadata("digits", "1")
    parameters = metadata.pop("parameters")
    assert metadata == {
        "name": "digits",
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "label", "datatype": "INT64", "shape": [-1]},
            {"name": "confidence", "datatype": "FP32", "shape": [-1]},
            {"name": "exit", "datatype": "INT32", "shape": [-1]},
            {"name": "macs", "datatype": "INT64", "shape": [-1]},
        ],
    }
    assert all(isinstance(value, str | int | float | bool) for value in parameters.values())
    assert json.loads(parameters["mexit_classes"]) == list(runtime.bundle.manifest.classes)
    assert json.loads(parameters["mexit_exit_macs"]) == list(runtime.bundle.manifest.cumulative_macs)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_plain_json(server: Server, runtime: Runtime, images: Images, nested: bool) -> None:
    request = json_request(images)
    if nested:
        request["inputs"][0]["data"] = images.tolist()
    status, response = server.json("POST", INFER, request)
    assert status == 200
    assert "id" not in response
    assert_same(arrays_of(response), runtime(images))


def test_raw_binary_request(server: Server, runtime: Runtime, images: Images) -> None:
    status, headers, body = server.ask("POST", INFER, images[:1].tobytes(), {"Inference-Header-Content-Length": "0"})
    assert status == 200
    result = triton.InferenceServerClient.parse_response_body(
        body, header_length=int(headers["inference-header-content-length"])
    )
    expected = runtime(images[:1])
    assert_same({name: result.as_numpy(name) for name in columns(expected)}, expected)


def test_an_output_overrides_the_default_of_the_request(server: Server, images: Images) -> None:
    outputs = [{"name": "label"}, {"name": "exit", "parameters": {"binary_data": False}}]
    request = json_request(images[:2], outputs=outputs, parameters={"binary_data_output": True})
    status, headers, body = server.ask("POST", INFER, json.dumps(request))
    split = int(headers["inference-header-content-length"])
    label, exits = json.loads(body[:split])["outputs"]
    assert status == 200
    assert headers["content-type"] == "application/octet-stream"
    assert label["parameters"] == {"binary_data_size": len(body) - split} == {"binary_data_size": 16}
    assert "data" in exits
    assert "parameters" not in exits


def test_budgets_and_last_exit(server: Server, runtime: Runtime, images: Images) -> None:
    full = f"{runtime.bundle.manifest.cumulative_macs[-1]}"
    for parameters, options in [
        ({"mexit_budget": "full"}, {"budget": "full"}),
        ({"mexit_budget": full}, {"budget": full}),
        ({"mexit_budget": "full", "mexit_max_exit": 2}, {"budget": "full", "max_exit": 2}),
        ({"mexit_max_exit": 1}, {"max_exit": 1}),
    ]:
        _, response = server.json("POST", INFER, json_request(images, parameters=parameters))
        assert_same(arrays_of(response), runtime(images, **options))


@pytest.mark.parametrize("name", ["mexit_deadline_us", "timeout"])
def test_deadlines(server: Server, images: Images, name: str) -> None:
    """A deadline that passed in the queue gives an error; a distant one changes nothing."""
    budget = {"mexit_budget": "full"}
    status, response = server.json("POST", INFER, json_request(images, parameters={name: 1, **budget}))
    assert status == 504
    assert "deadline" in response["error"]
    status, response = server.json("POST", INFER, json_request(images, parameters={name: 10**9, **budget}))
    assert status == 200
    assert response["parameters"]["mexit_late_rows"] == 0
    assert set(arrays_of(response)["exit"]) == {3}


def test_a_timeout_of_zero_is_none(server: Server, images: Images) -> None:
    status, _ = server.json("POST", INFER, json_request(images, parameters={"timeout": 0}))
    assert status == 200


def png(pixels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    "pixels",
    [np.full((8, 8), 128, np.uint8), np.arange(640 * 480 * 3).reshape(480, 640, 3).astype(np.uint8)],
    ids=["8x8 grey", "640x480 colour"],
)
def test_classify_equals_the_runtime(server: Server, runtime: Runtime, pixels: NDArray[np.uint8]) -> None:
    content = png(pixels)
    status, answer = server.json("POST", "/v1/classify?budget=full&max_exit=2&deadline_ms=60000", content)
    expected = runtime(content, budget="full", max_exit=2, deadline_ms=60000)[0].to_json()
    assert status == 200
    assert answer.pop("latency_ms") > 0
    expected.pop("latency_ms")
    assert answer == expected
    assert answer["exit"] == 2


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_classify_of_base64_in_json_equals_that_of_bytes(server: Server, prefix: str) -> None:
    content = png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    body = {"image": prefix + base64.b64encode(content).decode()}
    answers = [server.json("POST", "/v1/classify", sent, headers) for sent, headers in (
        (content, {}), (body, {"Content-Type": "application/json"}), (body, {})
    )]  # fmt: skip
    for _, answer in answers:
        answer.pop("latency_ms")
    assert answers[0][0] == 200
    assert answers[1] == answers[2] == answers[0]


NULLS: dict[str, dict[str, Any]] = {
    "the request": {"id": None, "parameters": None, "outputs": None},
    "an output": {"outputs": [{"name": "label", "parameters": None}]},
    "parameters": {"parameters": {"mexit_budget": None, "timeout": None, "priority": None, "mexit_receipts": None}},
    "parameters of an output": {"outputs": [{"name": "label", "parameters": {"binary_data": None}}]},
}


@pytest.mark.parametrize("parts", NULLS.values(), ids=NULLS.keys())
def test_null_is_an_absent_field(server: Server, images: Images, parts: dict[str, Any]) -> None:
    status, answer = server.json("POST", INFER, json_request(images[:1], **parts))
    assert status == 200, answer
    [label] = [output["data"] for output in answer["outputs"] if output["name"] == "label"]
    [expected] = [output["data"] for output in server.json("POST", INFER, json_request(images[:1]))[1]["outputs"]
                  if output["name"] == "label"]  # fmt: skip
    assert label == expected


def test_null_beside_a_binary_tensor(server: Server, images: Images) -> None:
    entry = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": None}
    head = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": 256}}]}).encode()
    status, _, _ = server.ask("POST", INFER, head + images[:1].tobytes(), {HEADER_LENGTH: str(len(head))})
    assert status == 200


def test_null_in_other_routes(server: Server) -> None:
    assert server.json("POST", "/v2/repository/index", {"ready": None})[0] == 200
    status, answer = server.json("POST", "/v2/repository/index", {"ready": "yes"})
    assert (status, answer["error"][:22]) == (400, "the body must be empty")


def test_a_served_name(mixed_bundle: Path, images: Images, tmp_path: Path) -> None:
    """The name replaces the bundle's in routes, answers, metadata, statistics and metrics."""
    with start(mixed_bundle, tmp_path, name="night-cam.v2") as own:
        path = "/v2/models/night-cam.v2"
        assert own.json("GET", path)[1]["name"] == "night-cam.v2"
        assert own.json("GET", f"{path}/ready") == (200, {"name": "night-cam.v2", "ready": True})
        assert own.json("GET", f"{path}/config")[1]["name"] == "night-cam.v2"
        assert own.json("GET", f"{path}/stats")[1]["model_stats"][0]["name"] == "night-cam.v2"
        assert own.json("POST", "/v2/repository/index", {})[1][0]["name"] == "night-cam.v2"
        status, answer = own.json("POST", f"{path}/versions/1/infer", json_request(images[:1]))
        assert (status, answer["model_name"]) == (200, "night-cam.v2")
        assert own.series("mexit_predictions_total", model="night-cam.v2") == 1
        assert own.json("GET", "/v2/models/digits")[1]["error"].endswith("this server has 'night-cam.v2'")


def test_repository_index_of_ready_models(server: Server) -> None:
    assert server.json("POST", "/v2/repository/index", {"ready": True})[1][0]["name"] == "digits"
    assert server.json("POST", "/v2/repository/index", {})[1][0]["name"] == "digits"


def test_a_budget_of_the_bundle(bundle_copy: Path, images: Images, tmp_path: Path) -> None:
    """A budget that calibration defined is accepted, and has a label of its own in the metrics."""
    calibrate_bundle(bundle_copy, options=CalibrateOptions(budgets={"night": "30%"}, attack="none"))
    with start(bundle_copy, tmp_path, budget="night") as own:
        status, answer = own.json("POST", INFER, infer_body(images[:4], mexit_budget="night"))
        assert (status, answer["parameters"]["mexit_budget"]) == (200, "night")
        status, answer = own.json("POST", INFER, infer_body(images[:4], mexit_budget="day"))
        assert status == 400
        assert "'day' is not a budget" in answer["error"]
        assert own.series("mexit_predictions_total", budget="night") == 4
        assert own.stop() == 0


def test_without_thresholds_only_the_full_budget_works(bundle_copy: Path, images: Images, tmp_path: Path) -> None:
    """The runtime's error names the bundle's directory; the server's error does not."""
    (bundle_copy / "policies.json").unlink()
    with start(bundle_copy, tmp_path, budget="full") as own:
        assert own.json("POST", INFER, infer_body(images[:1]))[0] == 200
        status, answer = own.json("POST", INFER, infer_body(images[:1], mexit_budget="low"))
        message = "the model has no thresholds for this engine: only the budget 'full' works"
        assert (status, answer["error"]) == (409, message)


def test_the_example_client(server: Server) -> None:
    example = Path(__file__).parents[2] / "examples" / "03_serve_and_query" / "client.py"
    command = [sys.executable, str(example), "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == [
        "budget low ",
        "budget full",
        "budget low ",
        "budget high",
    ]
    assert any(line.startswith("mexit_macs_total") for line in lines)

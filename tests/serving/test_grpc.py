"""`GRPCInferenceService` of a real server, with an unmodified tritonclient."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from model_versions import copy
from numpy.typing import NDArray
from servers import Server, free_port, hook_runtime, refused, serve_runtime, start, wait_until
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mexit import Prediction, Runtime
from mexit.serving.limits import Limits

Images = NDArray[np.float32]
Change = Callable[[Any], Any]
OUTPUTS = ("probabilities", "label", "confidence", "exit", "macs")
TOKENS = "first,second"
ONE_MIB = 1 << 20


@pytest.fixture(scope="module")
def grpc_server(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server and the address of its gRPC port."""
    port = free_port()
    with start(mixed_bundle, tmp_path_factory.mktemp("grpc"), grpc_port=port) as server:
        yield server, f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(grpc_server: tuple[Server, str]) -> Iterator[Any]:
    with triton.InferenceServerClient(grpc_server[1]) as triton_client:
        yield triton_client


@pytest.fixture(scope="module")
def stub(grpc_server: tuple[Server, str]) -> Iterator[Any]:
    with grpc.insecure_channel(grpc_server[1]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def guarded(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, Path]]:
    """A server of a folder, with two workers, tokens and small messages; its gRPC address, and the folder."""
    folder = tmp_path_factory.mktemp("guarded")
    copy(mixed_bundle, folder / "models" / "digits" / "1")
    port = free_port()
    options = {"grpc_port": port, "token": TOKENS, "workers": 2}
    with start(folder / "models", folder, {"body_bytes": ONE_MIB}, **options) as server:
        yield server, f"127.0.0.1:{port}", folder / "models"


def tensor_of(images: Images) -> triton.InferInput:
    tensor = triton.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    return tensor


def request_of(images: Images, model: str = "digits") -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[images.tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=images.shape)
    return request


def assert_same(arrays: dict[str, NDArray[Any]], predictions: list[Prediction]) -> None:
    probabilities = np.array([prediction.probabilities for prediction in predictions]).astype(np.float32)
    np.testing.assert_array_equal(arrays["probabilities"], probabilities)
    assert arrays["label"].tolist() == [prediction.index for prediction in predictions]
    assert arrays["exit"].tolist() == [prediction.exit for prediction in predictions]
    assert arrays["macs"].tolist() == [prediction.macs for prediction in predictions]


def code_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_tritonclient_gets_what_the_runtime_answers(client: Any, runtime: Runtime, images: Images) -> None:
    names = ["macs", "exit", "confidence", "label", "probabilities"]
    result = client.infer(
        "digits",
        [tensor_of(images)],
        model_version="1",
        outputs=[triton.InferRequestedOutput(name) for name in names],
        request_id="a request",
        parameters={"mexit_budget": "high", "mexit_receipts": True},
    )
    expected = runtime(images, budget="high")
    assert len({prediction.exit for prediction in expected}) > 1, "the images must leave at several exits"
    assert_same({name: result.as_numpy(name) for name in names}, expected)
    response = result.get_response()
    assert [output.name for output in response.outputs] == names
    assert (response.model_name, response.model_version, response.id) == ("digits", "1", "a request")
    assert response.parameters["mexit_budget"].string_param == "high"
    assert response.parameters["mexit_late_rows"].int64_param == 0
    assert response.parameters["mexit_mean_macs"].double_param == pytest.approx(
        np.mean([prediction.macs for prediction in expected])
    )
    assert len(json.loads(response.parameters["mexit_receipts"].string_param)) == len(images)


def test_typed_contents_are_answered_by_typed_contents(stub: Any, runtime: Runtime, images: Images) -> None:
    request = request_of(images)
    request.inputs[0].contents.fp32_contents.extend(images.ravel().tolist())
    del request.raw_input_contents[:]
    response = stub.ModelInfer(request)
    assert not response.raw_output_contents
    fields = {"FP32": "fp32_contents", "INT64": "int64_contents", "INT32": "int_contents"}
    arrays = {
        output.name: np.array(getattr(output.contents, fields[output.datatype])).reshape(output.shape)
        for output in response.outputs
    }
    assert_same(arrays, runtime(images))


def test_health_and_metadata(client: Any, runtime: Runtime) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert client.get_server_metadata().name == "mexit"
    metadata = client.get_model_metadata("digits", as_json=True)
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": ["-1", "1", "8", "8"]}]
    assert [output["name"] for output in metadata["outputs"]] == list(OUTPUTS)
    config = client.get_model_config("digits", as_json=True)["config"]
    assert config["max_batch_size"] == 1024
    assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": ["1", "8", "8"]}]
    assert config["output"][1] == {"name": "label", "data_type": "TYPE_INT64", "dims": ["1"]}
    [entry] = client.get_model_repository_index().models
    assert (entry.name, entry.version, entry.state) == ("digits", "1", "READY")


def test_calls_are_counted(grpc_server: tuple[Server, str], client: Any, images: Images) -> None:
    server, _ = grpc_server

    def counts() -> tuple[int, int, float, float]:
        [entry] = client.get_inference_statistics("digits").model_stats
        rows, failed = entry.inference_count, entry.inference_stats.fail.count
        return rows, failed, server.series("mexit_predictions_total"), server.series("mexit_errors_total", status="400")

    before = counts()
    client.infer("digits", [tensor_of(images[:5])])
    with pytest.raises(triton.InferenceServerException, match="expected shape"):
        client.infer("digits", [tensor_of(images[0])])
    assert np.subtract(counts(), before).tolist() == [5, 1, 5, 1]
    assert len(client.get_inference_statistics().model_stats) == 1


def _output(request: Any) -> None:
    request.outputs.add(name="logits")


def _parameter(name: str, **value: Any) -> Change:
    def change(request: Any) -> None:
        request.parameters[name].MergeFrom(service_pb2.InferParameter(**value))

    return change


def _both(request: Any) -> None:
    request.inputs[0].contents.fp32_contents.append(0.5)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda request: request.inputs[0].shape.append(1), "INVALID_ARGUMENT", "expected shape"),
        (lambda request: setattr(request.inputs[0], "datatype", "FP16"), "INVALID_ARGUMENT", "found 'FP16'"),
        (lambda request: setattr(request.inputs[0], "name", "x"), "INVALID_ARGUMENT", "unknown input 'x'"),
        (lambda request: request.ClearField("inputs"), "INVALID_ARGUMENT", "holds 1 tensors, the request has 0 inputs"),
        (lambda request: request.ClearField("raw_input_contents"), "INVALID_ARGUMENT", "takes 256 bytes, found 0"),
        (lambda request: request.raw_input_contents.append(b""), "INVALID_ARGUMENT", "raw_input_contents holds 2"),
        (_both, "INVALID_ARGUMENT", "found both"),
        (_output, "INVALID_ARGUMENT", "unknown output 'logits'"),
        (_parameter("mexit_budgt", string_param="low"), "INVALID_ARGUMENT", "unknown parameter 'mexit_budgt'"),
        (_parameter("mexit_budget", int64_param=3), "INVALID_ARGUMENT", "mexit_budget must be a string"),
        (_parameter("mexit_budget", string_param="1"), "INVALID_ARGUMENT", ""),
        (_parameter("mexit_deadline_us", double_param=float("nan")), "INVALID_ARGUMENT", "must be a number"),
        (lambda request: setattr(request, "model_name", "letters"), "NOT_FOUND", "unknown model 'letters'"),
        (lambda request: setattr(request, "model_name", ""), "NOT_FOUND", "unknown model ''"),
        (lambda request: setattr(request, "model_version", "7"), "NOT_FOUND", "no version '7'"),
    ],
)  # fmt: skip
def test_refused_requests(stub: Any, images: Images, change: Change, code: str, message: str) -> None:
    request = request_of(images[:1])
    change(request)
    found, details = code_of(lambda: stub.ModelInfer(request))
    assert (found.name, message in details) == (code, True), details


def test_unknown_models_everywhere(client: Any) -> None:
    for ask in (client.is_model_ready, client.get_model_metadata, client.get_model_config, client.load_model):
        with pytest.raises(triton.InferenceServerException, match="model 'letters'") as caught:
            ask("letters")
        assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "RepositoryIndex", "RepositoryModelLoad"])
@pytest.mark.parametrize("content", [b"\xff", b"\x0a\x05ab", b"\x0b", b"\x0a\x02\xc3\x28"])
def test_malformed_messages(grpc_server: tuple[Server, str], method: str, content: bytes) -> None:
    with grpc.insecure_channel(grpc_server[1]) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        code, details = code_of(lambda: call(content, timeout=20))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "is not a valid" in details


def test_unknown_methods(grpc_server: tuple[Server, str]) -> None:
    with grpc.insecure_channel(grpc_server[1]) as channel:
        for method in ("inference.GRPCInferenceService/SystemSharedMemoryStatus", "other.Service/Method"):
            code, _ = code_of(lambda method=method: channel.unary_unary(f"/{method}")(b"", timeout=20))
            assert code == grpc.StatusCode.UNIMPLEMENTED


def test_a_stream_answers_in_order_and_survives_errors(client: Any, runtime: Runtime, images: Images) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(6):
        model = "letters" if number == 2 else "digits"
        client.async_stream_infer(model, [tensor_of(images[number : number + 3])], request_id=str(number))
    received = [answers.get(timeout=20) for _ in range(6)]
    client.stop_stream()
    assert [error is None for _, error in received] == [True, True, False, True, True, True]
    assert "unknown model 'letters'" in str(received[2][1])
    for number in (0, 1, 3, 4, 5):
        result = received[number][0]
        assert result.get_response().id == str(number)
        assert_same({name: result.as_numpy(name) for name in OUTPUTS}, runtime(images[number : number + 3]))


def test_a_deadline_in_the_queue(client: Any, images: Images) -> None:
    with pytest.raises(triton.InferenceServerException, match=r"in the queue, the deadline was 0\.001 ms") as caught:
        client.infer("digits", [tensor_of(images)], timeout=1)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_the_deadline_of_a_call_ends_its_wait(digits_bundle: Path, images: Images) -> None:
    """The only worker is busy; a call whose deadline passes is not computed later."""
    entered, leave, runs = threading.Event(), threading.Event(), []

    def hook(batch: Images) -> None:
        runs.append(len(batch))
        entered.set()
        assert leave.wait(30)

    port, limits = free_port(), Limits(workers=1, short_s=0)
    with (
        serve_runtime(hook_runtime(digits_bundle, hook), limits, grpc_port=port) as server,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        first: queue.Queue[Any] = queue.Queue()
        client.async_infer("digits", [tensor_of(images[:1])], lambda result, error: first.put(error or result))
        assert entered.wait(30)
        with pytest.raises(triton.InferenceServerException) as caught:
            client.infer("digits", [tensor_of(images[:2])], client_timeout=0.2)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        wait_until(lambda: server.series("mexit_errors_total", status="499") == 1)
        wait_until(lambda: server.series("mexit_requests_in_flight", route="infer") == 1)
        leave.set()
        assert first.get(timeout=20).as_numpy("exit").shape == (1,)
        client.infer("digits", [tensor_of(images[:3])])
    assert runs == [1, 3]


def test_compressed_messages_are_refused(grpc_server: tuple[Server, str], client: Any, images: Images) -> None:
    """grpcio decompresses without a bound: 200 KB would become 200 MB."""
    server, address = grpc_server
    before = server.peak_bytes()
    with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        assert code_of(lambda: call(bytes(200 * ONE_MIB), timeout=60))[0] == grpc.StatusCode.UNIMPLEMENTED
    assert server.peak_bytes() - before < 16 * ONE_MIB
    client.infer("digits", [tensor_of(images[:1])])


def test_a_large_message_takes_no_memory(grpc_server: tuple[Server, str]) -> None:
    server, address = grpc_server
    before = server.peak_bytes()
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        code, details = code_of(lambda: call(bytes(100 * ONE_MIB), timeout=60))
    assert (code, "larger than max" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert server.peak_bytes() - before < 16 * ONE_MIB


def test_a_port_in_use(grpc_server: tuple[Server, str], mixed_bundle: Path, tmp_path: Path) -> None:
    """Workers share a port, two servers do not."""
    port = int(grpc_server[1].rpartition(":")[2])
    last = refused(mixed_bundle, tmp_path, grpc_port=port)
    assert f"port {port} is in use: choose another with --grpc-port" in last


def test_tokens(guarded: tuple[Server, str, Path], images: Images) -> None:
    _, address, _ = guarded
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = request_of(images[:1])
        assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
        assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "Bearer first"),) * 2):
            code, details = code_of(lambda metadata=metadata: stub.ModelInfer(request, metadata=metadata))
            assert (code, "Bearer TOKEN" in details) == (grpc.StatusCode.UNAUTHENTICATED, True)
            assert code_of(lambda metadata=metadata: [*stub.ModelStreamInfer(iter([request]), metadata=metadata)])[
                0
            ] == (grpc.StatusCode.UNAUTHENTICATED)
        assert stub.ModelInfer(request, metadata=(("authorization", "Bearer second"),)).model_name == "digits"


def test_load_and_unload(guarded: tuple[Server, str, Path], mixed_bundle: Path, images: Images) -> None:
    """In all workers, by the first token only."""
    _, address, folder = guarded
    admin, user = {"authorization": "Bearer first"}, {"authorization": "Bearer second"}
    with triton.InferenceServerClient(address) as client:
        with pytest.raises(triton.InferenceServerException, match="only an admin token") as caught:
            client.unload_model("digits", headers=user)
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
        with pytest.raises(triton.InferenceServerException, match="'config' is not supported"):
            client.load_model("digits", headers=admin, config="{}")
        client.unload_model("digits", headers=admin)
        with pytest.raises(triton.InferenceServerException, match="no version in service: unloaded") as caught:
            client.infer("digits", [tensor_of(images[:1])], headers=user)
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        copy(mixed_bundle, folder / "digits" / "2")
        client.load_model("digits", headers=admin)
    for _ in range(8):  # each connection reaches one of the workers
        with triton.InferenceServerClient(address) as client:
            result = client.infer("digits", [tensor_of(images[:1])], headers=user)
            assert result.get_response().model_version == "2"


def test_large_messages_are_refused(guarded: tuple[Server, str, Path], images: Images) -> None:
    _, address, _ = guarded
    headers = {"authorization": "Bearer first"}
    with triton.InferenceServerClient(address) as client:
        with pytest.raises(triton.InferenceServerException) as caught:
            client.infer("digits", [tensor_of(np.zeros((5000, 1, 8, 8), np.float32))], headers=headers)
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        with pytest.raises(triton.InferenceServerException, match="at most 65536 bytes") as caught:
            client.get_model_metadata("d" * 70_000, headers=headers)
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        with pytest.raises(triton.InferenceServerException, match="at most 1024 rows") as caught:
            client.infer("digits", [tensor_of(np.zeros((1025, 1, 8, 8), np.float32))], headers=headers)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_stop_ends_open_streams(mixed_bundle: Path, tmp_path: Path, images: Images) -> None:
    port = free_port()
    with start(mixed_bundle, tmp_path, grpc_port=port) as server:
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer("digits", [tensor_of(images[:1])])
            assert answers.get(timeout=20)[1] is None
            assert server.stop() == 0
            wait_until(lambda: not answers.empty())
            assert answers.get()[1] is not None
            client.stop_stream()
        assert "Traceback" not in server.errors

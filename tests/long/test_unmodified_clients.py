"""KServe's clients and tritonclient, with the packages that they ask for, drive `mexit serve` over REST and gRPC."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import MEXIT, quiet
from numpy.typing import NDArray

from mexit import Prediction, Runtime
from mexit.data import digits

pytestmark = pytest.mark.long
kserve = pytest.importorskip("kserve", exc_type=ImportError, reason="needs kserve, in an environment of its own")

import grpc  # noqa: E402
import httpx  # noqa: E402
import tritonclient.grpc as triton_grpc  # noqa: E402
import tritonclient.http as triton_http  # noqa: E402

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "tests" / "golden" / "bundle-2" / "bundles" / "demo"
CERTIFICATE = ROOT / "tests" / "serving" / "certificate.pem"  # of localhost and 127.0.0.1, with its key
MODEL, TOKEN = "demo", "Bearer secret"
OUTPUTS = ("probabilities", "label", "confidence", "exit", "macs")
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Served:
    """A running server: the addresses of HTTP and gRPC, and whether they have TLS."""

    url: str
    grpc: str
    tls: bool

    @property
    def context(self) -> ssl.SSLContext | bool:
        """The certificates that a client trusts."""
        return ssl.create_default_context(cafile=str(CERTIFICATE)) if self.tls else True

    @property
    def root(self) -> str | None:
        return str(CERTIFICATE) if self.tls else None


@pytest.fixture(scope="module", params=["plain", "tls"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`mexit serve` with a token and two workers, without and with TLS."""
    folder, (port, grpc_port) = tmp_path_factory.mktemp("served"), free_ports()
    command = [*MEXIT, "serve", str(BUNDLE), "--budget", "medium", "--cost", "macs", "--workers", "2"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port), "--token", "secret"]
    if request.param == "tls":
        (folder / "server.pem").write_bytes(CERTIFICATE.read_bytes())
        (folder / "server.pem").chmod(0o600)
        command += ["--tls-cert", str(folder / "server.pem")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet()) as process:
        try:
            assert process.stdout is not None
            while "serving" not in (line := process.stdout.readline()):
                assert line, "the server did not start"
            scheme = "https" if request.param == "tls" else "http"
            yield Served(f"{scheme}://localhost:{port}", f"localhost:{grpc_port}", request.param == "tls")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.open(BUNDLE, budget="medium")


@pytest.fixture(scope="module")
def images() -> Images:
    """32 digits as the input tensor, (32, 1, 8, 8) float32 in [0, 1]."""
    pixels = np.asarray(digits.load().images.at(np.arange(32)))
    return (pixels[:, None] / np.float32(255)).astype(np.float32)


def assert_same(arrays: Callable[[str], NDArray[Any]], predictions: list[Prediction]) -> None:
    """The outputs of a response, by name, are the answers of the runtime."""
    assert len({one.exit for one in predictions}) > 1, "the images must leave at several exits"
    probabilities = np.array([one.probabilities for one in predictions]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(arrays("probabilities"), np.float32), probabilities)
    confidence = np.array([one.confidence for one in predictions], np.float32)
    np.testing.assert_array_equal(np.asarray(arrays("confidence"), np.float32), confidence)
    assert arrays("label").tolist() == [one.index for one in predictions]
    assert arrays("exit").tolist() == [one.exit for one in predictions]
    assert arrays("macs").tolist() == [one.macs for one in predictions]


def kserve_request(images: Images, binary: bool, **parameters: object) -> Any:
    """A request whose input and outputs are binary, or numbers in JSON (REST) and in typed contents (gRPC)."""
    tensor = kserve.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    outputs = [kserve.infer_type.RequestedOutput(name, {"binary_data": binary}) for name in OUTPUTS]
    return kserve.InferRequest(MODEL, [tensor], request_id="one", parameters=parameters, request_outputs=outputs)


@asynccontextmanager
async def kserve_rest(served: Served) -> AsyncIterator[Any]:
    config = kserve.inference_client.RESTConfig(protocol="v2", verify=served.context)
    async with kserve.InferenceRESTClient(config) as client:
        yield client


@asynccontextmanager
async def kserve_grpc(served: Served) -> AsyncIterator[Any]:
    async with kserve.InferenceGRPCClient(served.grpc, use_ssl=served.tls, root_certificates=served.root) as client:
        yield client


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_kserve_over_rest(served: Served, runtime: Runtime, images: Images, binary: bool) -> None:
    async def ask() -> Any:
        async with kserve_rest(served) as client:
            assert await client.is_server_live(served.url)
            assert await client.is_server_ready(served.url)
            assert await client.is_model_ready(served.url, MODEL, {"authorization": TOKEN})
            request = kserve_request(images, binary, mexit_budget="high")
            return await client.infer(served.url, request, MODEL, {"authorization": TOKEN})

    response = asyncio.run(ask())
    assert (response.id, response.model_name) == ("one", MODEL)
    assert response.parameters["mexit_budget"] == "high"
    assert_same(lambda name: response.get_output_by_name(name).as_numpy(), runtime(images, budget="high"))


@pytest.mark.parametrize("binary", [False, True], ids=["contents", "raw"])
def test_kserve_over_grpc(served: Served, runtime: Runtime, images: Images, binary: bool) -> None:
    async def ask() -> Any:
        headers = (("authorization", TOKEN),)
        async with kserve_grpc(served) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL, headers=headers)
            return await client.infer(kserve_request(images, binary, mexit_budget="high"), headers=headers)

    response = asyncio.run(ask())
    assert (response.id, response.model_name) == ("one", MODEL)
    assert_same(lambda name: response.get_output_by_name(name).as_numpy(), runtime(images, budget="high"))


def test_kserve_reads_errors(served: Served, images: Images) -> None:
    """No token, and an unknown budget, over both protocols."""

    async def ask() -> None:
        token = {"authorization": TOKEN}
        async with kserve_rest(served) as client:
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                await client.infer(served.url, kserve_request(images, True), MODEL)
            with pytest.raises(httpx.HTTPStatusError, match=r"unknown budget 'much'|budget.*400"):
                await client.infer(served.url, kserve_request(images, True, mexit_budget="much"), MODEL, token)
            assert not await client.is_model_ready(served.url, "other", token)
        async with kserve_grpc(served) as client:
            with pytest.raises(grpc.RpcError) as caught:
                await client.infer(kserve_request(images, True))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                await client.infer(
                    kserve_request(images, True, mexit_budget="much"), headers=(("authorization", TOKEN),)
                )
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(ask())


def triton_tensor(package: Any, images: Images, **options: Any) -> Any:
    tensor = package.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, **options)
    return tensor


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_tritonclient_over_http(served: Served, runtime: Runtime, images: Images, binary: bool) -> None:
    address = served.url.partition("//")[2]
    options = {"ssl": True, "ssl_context_factory": lambda: served.context} if served.tls else {}
    with triton_http.InferenceServerClient(address, **options) as client:
        outputs = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
        tensor = triton_tensor(triton_http, images, binary_data=binary)
        result = client.infer(MODEL, [tensor], outputs=outputs, headers={"authorization": TOKEN})
    assert_same(result.as_numpy, runtime(images))


def test_tritonclient_over_grpc(served: Served, runtime: Runtime, images: Images) -> None:
    """One call, and a stream."""
    headers, answers = {"authorization": TOKEN}, []
    client = triton_grpc.InferenceServerClient(served.grpc, ssl=served.tls, root_certificates=served.root)
    with client:
        tensor = triton_tensor(triton_grpc, images)
        assert_same(client.infer(MODEL, [tensor], headers=headers).as_numpy, runtime(images))
        client.start_stream(lambda result, error: answers.append((result, error)), headers=headers)
        for _ in range(3):
            client.async_stream_infer(MODEL, [tensor], parameters={"mexit_budget": "high"})
        client.stop_stream()  # after the last answer
    assert [error for _, error in answers] == [None] * 3
    for result, _ in answers:
        assert_same(result.as_numpy, runtime(images, budget="high"))

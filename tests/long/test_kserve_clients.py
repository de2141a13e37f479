"""KServe's clients, unmodified, drive `mexit serve` over REST and gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from served_demo import MODEL, OUTPUTS, TOKEN, Images, Served, assert_same

from mexit import Runtime

pytestmark = pytest.mark.long
grpc = pytest.importorskip("grpc", exc_type=ImportError, reason="needs grpcio")
kserve = pytest.importorskip("kserve", exc_type=ImportError, reason="needs kserve: clients-requirements.txt")
httpx = pytest.importorskip("httpx", exc_type=ImportError, reason="needs kserve: clients-requirements.txt")


def kserve_request(images: Images, binary: bool, **parameters: object) -> Any:
    """A request whose input and outputs are binary, or numbers in JSON (REST) and in typed contents (gRPC)."""
    tensor = kserve.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    outputs = [kserve.protocol.infer_type.RequestedOutput(name, {"binary_data": binary}) for name in OUTPUTS]
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

"""tritonclient with the protobuf that its extra grpc asks for drives `mexit serve` over HTTP and gRPC."""

from __future__ import annotations

from typing import Any

import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from served_demo import MODEL, OUTPUTS, TOKEN, Images, Served, assert_same

from mexit import Runtime

pytestmark = pytest.mark.long


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

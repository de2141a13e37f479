"""gRPC in TLS with a token, from an unmodified tritonclient."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from servers import free_port, start

from mexit import Runtime

CERTIFICATE = Path(__file__).with_name("certificate.pem")  # of localhost and 127.0.0.1, with its key
TOKEN = {"authorization": "Bearer secret"}
Images = NDArray[np.float32]


@pytest.fixture(scope="module", params=["key beside", "key apart"])
def address(
    request: pytest.FixtureRequest, mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The gRPC port of a server with a certificate and a token: in one process, and in a worker."""
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    options: dict[str, str | int] = {"tls_cert": str(folder / "certificate.pem"), "workers": 0}
    shutil.copyfile(CERTIFICATE, folder / "certificate.pem")
    if request.param == "key apart":
        certificate, mark, key = CERTIFICATE.read_text().partition("-----BEGIN PRIVATE KEY-----")
        (folder / "certificate.pem").write_text(certificate)
        (folder / "key.pem").write_text(mark + key)
        options |= {"tls_key": str(folder / "key.pem"), "workers": 1}
    for file in folder.glob("*.pem"):
        file.chmod(0o600)
    with start(mixed_bundle, folder, grpc_port=port, token="secret", **options) as server:
        assert server.url.startswith("https://")
        yield f"localhost:{port}"
        assert server.stop() == 0
        assert "Traceback" not in server.errors


def tensor_of(images: Images) -> triton.InferInput:
    tensor = triton.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    return tensor


def test_a_client_with_the_certificate_and_the_token_is_answered(
    address: str, runtime: Runtime, images: Images
) -> None:
    expected = runtime(images[:8])
    with triton.InferenceServerClient(address, ssl=True, root_certificates=str(CERTIFICATE)) as client:
        result = client.infer("digits", [tensor_of(images[:8])], headers=TOKEN)
        assert result.as_numpy("label").tolist() == [one.index for one in expected]
        assert result.as_numpy("macs").tolist() == [one.macs for one in expected]
        for headers in (None, {"authorization": "Bearer other"}):
            with pytest.raises(triton.InferenceServerException) as caught:
                client.infer("digits", [tensor_of(images[:1])], headers=headers)
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"


def test_other_connections_are_refused(address: str, images: Images) -> None:
    """Without TLS, with the certificates of the system, and with the name of another host."""
    with open(CERTIFICATE, "rb") as file:
        trusted = grpc.ssl_channel_credentials(file.read())
    channels = (
        grpc.insecure_channel(address),
        grpc.secure_channel(address, grpc.ssl_channel_credentials()),
        grpc.secure_channel(address, trusted, (("grpc.ssl_target_name_override", "elsewhere"),)),
    )
    for channel in channels:
        with channel:
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            with pytest.raises(grpc.RpcError) as caught:
                live(b"", timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

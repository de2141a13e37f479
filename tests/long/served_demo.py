"""`mexit serve` of a released bundle, and its expected answers, for clients in an environment of their own."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command_line import MEXIT, quiet
from numpy.typing import NDArray

from mexit import Prediction
from mexit.data import digits

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


@contextmanager
def serve_demo(folder: Path, tls: bool) -> Iterator[Served]:
    """`mexit serve` with a token and two workers.

    Args:
        folder: for its files.
        tls: whether it has a certificate.
    """
    port, grpc_port = free_ports()
    command = [*MEXIT, "serve", str(BUNDLE), "--budget", "medium", "--cost", "macs", "--workers", "2"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port), "--token", "secret"]
    if tls:
        (folder / "server.pem").write_bytes(CERTIFICATE.read_bytes())
        (folder / "server.pem").chmod(0o600)
        command += ["--tls-cert", str(folder / "server.pem")]
    environment = {**quiet(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, "the server did not start"
            scheme = "https" if tls else "http"
            yield Served(f"{scheme}://localhost:{port}", f"localhost:{grpc_port}", tls)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def free_ports() -> tuple[int, int]:
    """Two ports of 127.0.0.1 that are free now."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def digit_tensor() -> Images:
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

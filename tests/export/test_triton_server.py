"""The Python model inside Triton's server, with the segments as Python models that run ONNX Runtime.

The server is that of the PyPI package nvidia-pytriton, which has the Python backend but no ONNX Runtime backend. Its
Python backend needs numpy 1. To run this test:

    pip download --no-deps nvidia-pytriton==0.7.0 && python -m zipfile -e nvidia_pytriton-*.whl pytriton
    python -m venv venv && venv/bin/pip install 'numpy<2' onnxruntime==1.20.1
    TRITON_SERVER=$PWD/pytriton TRITON_PYTHON=$PWD/venv/bin/python python -m pytest tests/export/test_triton_server.py
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from triton_stub import assert_equal
from tritonclient.utils import InferenceServerException

from mexit import Bundle, Runtime
from mexit.export.triton_repository import OUTPUTS, write_repository

pytestmark = pytest.mark.long

START_S = 60
SEGMENT = """
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(Path(__file__).with_name("model.onnx")), options)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = [one.name for one in self.session.get_inputs()]
        feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        outputs = zip(self.session.get_outputs(), self.session.run(None, feeds))
        return pb_utils.InferenceResponse([pb_utils.Tensor(one.name, array) for one, array in outputs])
"""


@pytest.fixture(scope="module", params=["mixed_bundle", "reject_bundle"])
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def client(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton.InferenceServerClient]:
    """A client of a running server."""
    folder, python = os.environ.get("TRITON_SERVER"), os.environ.get("TRITON_PYTHON")
    if not folder or not python:
        pytest.skip("needs Triton: set TRITON_SERVER and TRITON_PYTHON as the module says")
    root = tmp_path_factory.mktemp("triton")
    write_repository(Bundle.open(bundle), root / "models")
    for graph in (root / "models").glob("*/1/model.onnx"):
        graph.with_name("model.py").write_text(SEGMENT)
        config = graph.parents[1] / "config.pbtxt"
        config.write_text(config.read_text().replace('"onnxruntime"', '"python"'))
    port = free_port()
    with (root / "log").open("wb") as log, start(Path(folder), Path(python), root, port, log) as process:
        try:
            client = triton.InferenceServerClient(f"127.0.0.1:{port}")
            wait_until_ready(client, process, root / "log")
            yield client
        finally:
            process.terminate()


def start(folder: Path, python: Path, root: Path, port: int, log: Any) -> subprocess.Popen[bytes]:
    """Start the server on the repository `root / "models"`."""
    server = folder / "pytriton" / "tritonserver"
    facts = "import sysconfig; print(sysconfig.get_python_version(), sysconfig.get_config_var('LIBDIR'))"
    version, libraries = subprocess.run(
        [python, "-c", facts], capture_output=True, text=True, check=True
    ).stdout.split()
    backends = Path(shutil.copytree(server / "backends", root / "backends"))
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    shutil.copy(server / "bin" / "tritonserver", root)
    for program in (backends / "python" / "triton_python_backend_stub", root / "tritonserver"):
        program.chmod(0o755)  # zipfile does not set it
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder / 'nvidia_pytriton.libs'}:{libraries}",
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # the Python backend takes the first python3
    }
    environment.pop("PYTHONPATH", None)
    options = {"model-repository": root / "models", "backend-directory": backends, "grpc-port": port}
    options |= {"grpc-address": "127.0.0.1", "allow-http": "false", "allow-metrics": "false"}
    command = [root / "tritonserver", *(f"--{name}={value}" for name, value in options.items())]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_until_ready(client: triton.InferenceServerClient, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.is_server_ready():
                return
        except InferenceServerException:  # it does not listen yet
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-4000:])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def ask(client: Any, images: NDArray[np.float32], parameters: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The outputs of one request."""
    tensor = triton.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    result = client.infer("digits", [tensor], parameters=dict(parameters))
    return {name: result.as_numpy(name) for name in OUTPUTS}


def test_every_budget_gives_the_answers_of_the_runtime(client, bundle, test_digits) -> None:
    images = (test_digits[0][:64, None] / np.float32(255)).astype(np.float32)
    runtime = Runtime.open(bundle, backend="ort")
    for budget in ("low", "medium", "high", "full", "40%", "900k"):
        for rows in (1, 7, 64):
            assert_equal(ask(client, images[:rows], {"mexit_budget": budget}), runtime(images[:rows], budget=budget))
    assert_equal(ask(client, images[:5], {}), runtime(images[:5], budget="low"))


def test_concurrent_requests_get_their_own_answers(client, bundle, test_digits) -> None:
    images = (test_digits[0][:64, None] / np.float32(255)).astype(np.float32)
    runtime = Runtime.open(bundle, backend="ort")

    def one(number: int) -> None:
        budget, rows = ("low", "medium", "high", "full")[number % 4], images[number % 50 :][: 1 + number % 9]
        if number % 10 == 9:
            with pytest.raises(InferenceServerException, match="smallest feasible budget"):
                ask(client, rows, {"mexit_budget": "1k"})
        else:
            assert_equal(ask(client, rows, {"mexit_budget": budget}), runtime(rows, budget=budget))

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(one, range(400)))) == 400


@pytest.mark.parametrize("parameters", [{"mexit_budget": "5ms"}, {"mexit_budget": 7}, {"mexit_bugdet": "low"}])
def test_a_wrong_parameter_is_an_invalid_argument(client, parameters) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, np.zeros((1, 1, 8, 8), np.float32), parameters)
    assert "INVALID_ARGUMENT" in str(caught.value.status())


def test_pixels_up_to_255_are_an_invalid_argument(client) -> None:
    with pytest.raises(InferenceServerException, match=r"divide 0\.\.255"):
        ask(client, np.full((1, 1, 8, 8), 255, np.float32), {})

"""A stub of Triton's `pb_utils`: inference requests run the models of a repository in ONNX Runtime.

Every tensor is compared with the `config.pbtxt` of its model, which is parsed with Triton's own schema.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format, text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

from mexit import Prediction

HOST = "the host's memory"


class TritonModelException(Exception):
    """A failure of a whole batch."""


@dataclass(frozen=True)
class TritonError:
    """An error with one of Triton's codes."""

    text: str
    code: str = "INTERNAL"
    INVALID_ARG = "INVALID_ARG"

    def message(self) -> str:
        return self.text


@dataclass(frozen=True)
class Tensor:
    """A named array."""

    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass(frozen=True)
class InferenceResponse:
    """Output tensors, or an error."""

    output_tensors: Sequence[Tensor]
    error_or_none: TritonError | None = None

    def has_error(self) -> bool:
        return self.error_or_none is not None

    def error(self) -> TritonError | None:
        return self.error_or_none

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The outputs by name; an error fails the test."""
        assert self.error_or_none is None, self.error_or_none
        return {tensor.name: tensor.array for tensor in self.output_tensors}


@dataclass(frozen=True)
class ClientRequest:
    """A request to the Python model, as Triton hands it over."""

    images: NDArray[np.float32]
    sent: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self) -> str:
        return json.dumps(self.sent)


def read_config(model: Path) -> Any:
    """The `config.pbtxt` of a model; an unknown field or value raises."""
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def check_tensors(specs: Sequence[Any], tensors: Sequence[Tensor], max_batch_size: int) -> None:
    """Fail if tensors are not those of a configuration, in name, dtype, shape and batch size."""
    assert [one.name for one in specs] == [one.name for one in tensors]
    assert len({len(one.array) for one in tensors}) == 1
    for spec, tensor in zip(specs, tensors, strict=True):
        kind = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
        assert tensor.array.dtype == triton_to_np_dtype(kind), tensor.name
        assert list(tensor.array.shape[1:]) == list(spec.dims), tensor.name
        assert 1 <= len(tensor.array) <= max_batch_size, tensor.name


def assert_equal(found: Mapping[str, NDArray[Any]], predictions: Sequence[Prediction]) -> None:
    """Fail if outputs differ from the predictions of the runtime."""
    expected = {
        "label": [-1 if one.index is None else one.index for one in predictions],
        "exit": [one.exit for one in predictions],
        "macs": [one.macs for one in predictions],
    }
    for name, values in expected.items():
        assert found[name][:, 0].tolist() == values, name
    probabilities = np.stack([one.probabilities for one in predictions])
    np.testing.assert_allclose(found["probabilities"], probabilities, atol=1e-6)
    np.testing.assert_allclose(found["confidence"][:, 0], [one.confidence for one in predictions], atol=1e-6)


class TritonServer:
    """A model repository and its Python model.

    Attributes:
        model: the loaded `TritonPythonModel`.
        calls: name of the model and number of rows of every inference request so far.
        failing: name of a model whose inference requests fail.
    """

    def __init__(self, repository: Path, name: str) -> None:
        """Load the models; `name` is that of the Python model. Raises what its `initialize` raises."""
        self.calls: list[tuple[str, int]] = []
        self.failing = ""
        self._configs = {path.name: read_config(path) for path in repository.iterdir()}
        self._sessions = {
            name: onnxruntime.InferenceSession(repository / name / "1" / "model.onnx", _options(config))
            for name, config in self._configs.items()
            if config.backend == "onnxruntime"
        }
        self.config = self._configs[name]
        spec = importlib.util.spec_from_file_location("triton_model_under_test", repository / name / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "triton_python_backend_utils", self._utils())
            spec.loader.exec_module(module)
        self.model = module.TritonPythonModel()
        self.model.initialize(
            {"model_config": json_format.MessageToJson(self.config, preserving_proto_field_name=True)}
        )

    def infer(self, *requests: ClientRequest) -> list[InferenceResponse]:
        """The responses of one call of `execute`, checked against the configuration."""
        responses = self.model.execute(list(requests))
        assert len(responses) == len(requests)
        for request, response in zip(requests, responses, strict=True):
            if not response.has_error():
                check_tensors(self.config.output, response.output_tensors, self.config.max_batch_size)
                assert len(response.output_tensors[0].array) == len(request.images)
        return responses

    def _utils(self) -> ModuleType:
        server = self

        @dataclass(frozen=True)
        class InferenceRequest:
            model_name: str
            requested_output_names: Sequence[str]
            inputs: Sequence[Tensor]
            preferred_memory: str

            def exec(self) -> InferenceResponse:
                return server._run(self.model_name, self.requested_output_names, self.inputs, self.preferred_memory)

        utils = ModuleType("triton_python_backend_utils")
        members = {
            "TritonModelException": TritonModelException,
            "TritonError": TritonError,
            "Tensor": Tensor,
            "InferenceRequest": InferenceRequest,
            "InferenceResponse": lambda output_tensors, error=None: InferenceResponse(output_tensors, error),
            "TRITONSERVER_MEMORY_CPU": HOST,
            "PreferredMemory": lambda kind, _device: kind,
            "get_input_tensor_by_name": lambda request, name: Tensor(name, request.images),
            "get_output_tensor_by_name": lambda response, name: Tensor(name, response.arrays()[name]),
        }
        for name, member in members.items():
            setattr(utils, name, member)
        return utils

    def _run(self, name: str, outputs: Sequence[str], inputs: Sequence[Tensor], memory: str) -> InferenceResponse:
        if name == self.failing:
            return InferenceResponse([], TritonError("out of memory"))
        config = self._configs[name]
        assert memory == HOST
        check_tensors(config.input, inputs, config.max_batch_size)
        self.calls.append((name, len(inputs[0].array)))
        arrays = self._sessions[name].run(list(outputs), {tensor.name: tensor.array for tensor in inputs})
        tensors = [Tensor(*pair) for pair in zip(outputs, arrays, strict=True)]
        check_tensors(config.output, tensors, config.max_batch_size)
        return InferenceResponse(tensors)


def _options(config: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(config.parameters["intra_op_thread_count"].string_value)
    return options

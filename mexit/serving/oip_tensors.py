"""Tensors of the Open Inference Protocol: the one input, the five outputs; as JSON or as raw bytes.

Raw bytes are little-endian and row-major. Shapes arrive as whole numbers of any size and are compared with
what the model takes before anything is multiplied or allocated, so there is nothing to overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mexit.core.manifest import InputSpec
from mexit.errors import BadInput
from mexit.runtime.prediction import Prediction
from mexit.serving.strict_json import shown

INPUT_DATATYPE = "FP32"
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Output:
    """One output of the model.

    Attributes:
        datatype: as the protocol names it.
        dtype: the same for numpy, little-endian.
        value: what it takes from one prediction.
        per_class: whether that is a row of C numbers, or one.
    """

    datatype: str
    dtype: str
    value: Callable[[Prediction], Any]
    per_class: bool = False


OUTPUTS = {
    "probabilities": Output("FP32", "<f4", lambda answer: answer.probabilities, per_class=True),
    "label": Output("INT64", "<i8", lambda answer: answer.index),
    "confidence": Output("FP32", "<f4", lambda answer: answer.confidence),
    "exit": Output("INT32", "<i4", lambda answer: answer.exit),
    "macs": Output("INT64", "<i8", lambda answer: answer.macs),
}


def output_array(name: str, predictions: Sequence[Prediction]) -> NDArray[Any]:
    """One output of all predictions, (B,) or (B, C)."""
    output = OUTPUTS[name]
    return np.array([output.value(prediction) for prediction in predictions], output.dtype)


def check_shape(shape: Any, spec: InputSpec, max_rows: int) -> tuple[int, int, int, int]:
    """The shape of a request's input, if the model takes it. Raises `BadInput`."""
    expected = [-1, *spec.shape]
    whole = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not whole or len(shape) != len(expected) or tuple(shape[1:]) != spec.shape or shape[0] < 1:
        found = [size if type(size) is int else shown(size) for size in shape[:6]] if whole else shown(shape)
        raise BadInput(f"input '{spec.name}': expected shape {expected} with at least 1 row, found {found}")
    if shape[0] > max_rows:
        raise BadInput(f"input '{spec.name}': at most {max_rows} rows in one request, found {shown(shape[0])}")
    return (shape[0], *spec.shape)


def from_bytes(content: bytes, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    """Raw little-endian floats as a tensor."""
    expected = int(np.prod(shape)) * _FLOAT_BYTES
    if len(content) != expected:
        raise BadInput(
            f"input '{name}': shape {list(shape)} {INPUT_DATATYPE} takes {expected} bytes, found {len(content)}"
        )
    return np.frombuffer(content, "<f4").astype(np.float32, copy=False).reshape(shape)


def from_json(data: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    """Numbers in a list, flat or nested as the shape says, as a tensor."""
    numbers, found = _flattened(data, name, len(shape))
    if found not in ([int(np.prod(shape))], list(shape)):
        raise BadInput(f"input '{name}': shape {list(shape)} does not fit data of shape {found}")
    strangers = set(map(type, numbers)) - {int, float}  # numpy would read true as 1 and "2" as 2
    if strangers:
        raise BadInput(f"input '{name}': data must be numbers, found {strangers.pop().__name__}")
    try:
        with np.errstate(over="ignore"):  # infinity is refused with every other value outside [0, 1]
            return np.array(numbers, np.float32).reshape(shape)
    except OverflowError:
        raise BadInput(f"input '{name}': data must be numbers in [0, 1], found one that no float holds") from None


def _flattened(data: Any, name: str, max_depth: int) -> tuple[list[Any], list[int]]:
    """A nested list as a flat one, and its shape."""
    if not isinstance(data, list):
        raise BadInput(f"input '{name}': data must be a list, found {shown(data)}")
    shape = [len(data)]
    while data and isinstance(data[0], list):
        width = len(data[0])
        even = all(isinstance(row, list) and len(row) == width for row in data)
        if not even or len(shape) == max_depth:
            raise BadInput(f"input '{name}': data must be flat, or nested as its shape says")
        shape.append(width)
        data = list(chain.from_iterable(data))
    return data, shape

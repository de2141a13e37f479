"""The runtime: opens a bundle and answers within a budget. No torch, no onnx, ever."""

from mexit.runtime.prediction import Prediction
from mexit.runtime.runtime import Runtime

__all__ = ["Prediction", "Runtime"]

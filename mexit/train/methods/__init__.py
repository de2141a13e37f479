"""Training methods: one file per paper, what they share, and their registry."""

from mexit.train.methods.base import Outputs, TrainingMethod
from mexit.train.methods.registry import METHODS, build_method, method_class

__all__ = ["METHODS", "Outputs", "TrainingMethod", "build_method", "method_class"]

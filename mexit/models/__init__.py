"""Multi-exit networks: the container `MultiExit`, the backbones, and the registry of names."""

from mexit.models.multi_exit import MultiExit, Stage
from mexit.models.registry import MODELS, ModelSpec, build_model, model_spec

__all__ = ["MODELS", "ModelSpec", "MultiExit", "Stage", "build_model", "model_spec"]

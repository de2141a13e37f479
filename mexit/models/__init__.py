"""Multi-exit networks: the container `MultiExit`, the backbones, and the registry of names."""

from mexit.models.attach_exits import attach_exits
from mexit.models.multi_exit import MultiExit, Stage
from mexit.models.registry import ANY_INPUT, MODELS, ModelSpec, build_model, model_spec

__all__ = ["ANY_INPUT", "MODELS", "ModelSpec", "MultiExit", "Stage", "attach_exits", "build_model", "model_spec"]

"""Multi-exit networks: the container, the backbones of the papers, and their registry."""

from mexit.models.multi_exit import MultiExit, Stage
from mexit.models.registry import PRESETS, Preset, build, preset

__all__ = ["PRESETS", "MultiExit", "Preset", "Stage", "build", "preset"]

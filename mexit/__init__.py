"""Multi-exit networks: robust training, export per exit, calibration to a budget, early-exit inference.

    from mexit import Runtime
    runtime = Runtime.open("bundles/digits", budget="low")
    runtime(images)[0].label

`import mexit` needs numpy alone. `train_model`, `export_bundle`, `calibrate_bundle` and `evaluate_model` import
their packages when they are first used. The names in `__all__` are the public API; every other name is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mexit.core.budget import Budget
from mexit.core.bundle import Bundle
from mexit.core.versions import VERSION
from mexit.errors import (
    ArtifactError,
    BackendError,
    BadInput,
    BudgetInfeasible,
    Damaged,
    DeadlineExceeded,
    Infeasible,
    LoadFailed,
    MexitError,
    MissingExtra,
    NotCalibrated,
    NotFound,
    Overloaded,
    RiskInfeasible,
    SchemaTooNew,
    StalePolicy,
    TooLarge,
    Untrusted,
    UsageError,
)
from mexit.runtime import Prediction, Runtime

if TYPE_CHECKING:
    from mexit.evaluate.config import EvaluateOptions
    from mexit.flows.attach_exits import attach_exits
    from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle
    from mexit.flows.evaluate import evaluate_model
    from mexit.flows.export import ExportOptions, export_bundle
    from mexit.flows.train import TrainOptions, train_model

__version__ = VERSION

__all__ = [
    "ArtifactError",
    "BackendError",
    "BadInput",
    "Budget",
    "BudgetInfeasible",
    "Bundle",
    "CalibrateOptions",
    "Damaged",
    "DeadlineExceeded",
    "EvaluateOptions",
    "ExportOptions",
    "Infeasible",
    "LoadFailed",
    "MexitError",
    "MissingExtra",
    "NotCalibrated",
    "NotFound",
    "Overloaded",
    "Prediction",
    "RiskInfeasible",
    "Runtime",
    "SchemaTooNew",
    "StalePolicy",
    "TooLarge",
    "TrainOptions",
    "Untrusted",
    "UsageError",
    "attach_exits",
    "calibrate_bundle",
    "evaluate_model",
    "export_bundle",
    "train_model",
]

_LAZY = {
    "CalibrateOptions": "mexit.flows.calibrate",
    "EvaluateOptions": "mexit.evaluate.config",
    "ExportOptions": "mexit.flows.export",
    "TrainOptions": "mexit.flows.train",
    "attach_exits": "mexit.flows.attach_exits",
    "calibrate_bundle": "mexit.flows.calibrate",
    "evaluate_model": "mexit.flows.evaluate",
    "export_bundle": "mexit.flows.export",
    "train_model": "mexit.flows.train",
}


def __getattr__(name: str) -> object:
    """Import a pipeline function or its options on first use. Raises `AttributeError` for an unknown name."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mexit' has no attribute '{name}'")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Multi-exit networks: trained against attacks, exported per exit, calibrated to a budget, served.

    from mexit import Runtime
    runtime = Runtime.open("bundles/digits", budget="low")
    runtime(images)[0].label

Importing this needs numpy alone; an engine is loaded when a bundle is opened.
"""

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

__version__ = VERSION

__all__ = [
    "ArtifactError",
    "BackendError",
    "BadInput",
    "Budget",
    "BudgetInfeasible",
    "Bundle",
    "Damaged",
    "DeadlineExceeded",
    "Infeasible",
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
    "Untrusted",
    "UsageError",
]

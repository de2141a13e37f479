"""The error tree: all exceptions that mexit raises on purpose.

    MexitError                      exit code 1   HTTP 500
      UsageError                              2        400
      NotFound                                2        404
      BadInput                                1        400
        TooLarge                              1        413
      Infeasible                              3        400
        BudgetInfeasible
        RiskInfeasible
      NotCalibrated                           3        409
      MissingExtra                            4        501
      ArtifactError                           5        500
        Damaged        bundle, run or data file
        Untrusted      a file that could run code, or a path that leaves its directory
        SchemaTooNew   written by a newer mexit
        StalePolicy    policies that belong to another model
      BackendError                            1        500
      LoadFailed                              1        500
      Overloaded                              1        503   carries retry_after_s
      DeadlineExceeded                        1        504

A message states what was found, what was expected and, if there is one, the command or option that helps. Each class
defines its exit code and its HTTP status.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class MexitError(Exception):
    """Base class of all errors that are not bugs of mexit."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class UsageError(MexitError):
    """Arguments or options are unknown or contradict each other."""

    exit_code = 2
    http_status = 400


class NotFound(MexitError):
    """A named file, run, bundle, model or budget does not exist."""

    exit_code = 2
    http_status = 404


class BadInput(MexitError):
    """An image, array or request is not valid."""

    exit_code = 1
    http_status = 400


class TooLarge(BadInput):
    """An input exceeds a size limit; it is refused before memory is allocated for it."""

    http_status = 413


class Infeasible(MexitError):
    """A budget or risk cannot be met; the message names the nearest that can."""

    exit_code = 3
    http_status = 400


class BudgetInfeasible(Infeasible):
    """No policy of the bundle is within the budget."""


class RiskInfeasible(Infeasible):
    """No policy can be certified at the given risk with the available samples."""


class NotCalibrated(MexitError):
    """The bundle has no thresholds for the engine."""

    exit_code = 3
    http_status = 409


class MissingExtra(MexitError):
    """An optional package is not installed; the message has the command that installs it."""

    exit_code = 4
    http_status = 501


class ArtifactError(MexitError):
    """A stored artifact cannot be used."""

    exit_code = 5
    http_status = 500


class Damaged(ArtifactError):
    """A file differs from its recorded hash, or a field is missing or has another type."""


class Untrusted(ArtifactError):
    """Loading a file could run code, or read outside its directory."""


class SchemaTooNew(ArtifactError):
    """A newer version of mexit wrote the file."""


class StalePolicy(ArtifactError):
    """The policies belong to another model."""


class BackendError(MexitError):
    """An inference engine failed, or cannot run the network."""


class LoadFailed(MexitError):
    """A server could not load a version of a model; the message has the reason, without paths outside its folder."""


class Overloaded(MexitError):
    """There is no capacity now; `retry_after_s` is the time to wait before a retry, in seconds."""

    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MexitError):
    """The deadline passed before the first exit answered."""

    http_status = 504


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtra:
    """The error for a missing optional package: what needs it, its name and the command that installs it."""
    return MissingExtra(f"{purpose} needs the package '{package}': pip install 'mexit[{extra}]'")


# Modules named unlike their package.
_PACKAGES = {
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "grpc": "grpcio",
    "google": "protobuf",
    "paho": "paho-mqtt",
}


@contextmanager
def requires_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn a failed import of an optional package in the `with` block into `MissingExtra`.

    A module that cannot work without an optional package wraps its top-level imports:

        with requires_extra("train", "Training a network"):
            import torch

    Args:
        extra: the extra of mexit that installs the package, such as "train".
        purpose: what needs the package; the subject of the message.
    """
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "mexit"):
            raise
        raise missing_extra(_PACKAGES.get(module, module), extra, purpose) from None

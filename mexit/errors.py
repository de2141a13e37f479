"""Every error that mexit raises on purpose.

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
      Overloaded                              1        503   carries retry_after_s
      DeadlineExceeded                        1        504

A message says what was found, what was expected and, where there is one, what to type next. Each class
knows its process exit code and its HTTP status, so neither the command line nor the server keeps a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class MexitError(Exception):
    """The base of the tree: anything that is not a bug."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class UsageError(MexitError):
    """The call makes no sense as typed."""

    exit_code = 2
    http_status = 400


class NotFound(MexitError):
    """A file, run, bundle, model or budget that was named does not exist."""

    exit_code = 2
    http_status = 404


class BadInput(MexitError):
    """An image, array or request that cannot be what it claims to be."""

    exit_code = 1
    http_status = 400


class TooLarge(BadInput):
    """An input over a size limit; refused before memory is taken for it."""

    http_status = 413


class Infeasible(MexitError):
    """What was asked for cannot be had; the message names the nearest that can."""

    exit_code = 3
    http_status = 400


class BudgetInfeasible(Infeasible):
    """No policy of this bundle costs so little."""


class RiskInfeasible(Infeasible):
    """No policy can be certified at this risk from this many samples."""


class NotCalibrated(MexitError):
    """The engine has no thresholds of its own; thresholds are never guessed."""

    exit_code = 3
    http_status = 409


class MissingExtra(MexitError):
    """An optional part is not installed; the message holds the command that installs it."""

    exit_code = 4
    http_status = 501


class ArtifactError(MexitError):
    """Something on disk is not what was written there."""

    exit_code = 5
    http_status = 500


class Damaged(ArtifactError):
    """Bytes differ from their recorded hash, or a required field is missing."""


class Untrusted(ArtifactError):
    """Loading it could run code or read outside its directory."""


class SchemaTooNew(ArtifactError):
    """Written by a newer version of mexit than this one."""


class StalePolicy(ArtifactError):
    """Policies of another model."""


class BackendError(MexitError):
    """The inference engine failed, or cannot run what it was given."""


class Overloaded(MexitError):
    """No capacity now; `retry_after_s` says when to ask again."""

    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MexitError):
    """The deadline passed before the first exit had an answer."""

    http_status = 504


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtra:
    """The one wording for an absent optional package."""
    return MissingExtra(f"{purpose} needs the package '{package}': pip install 'mexit[{extra}]'")


_PACKAGES = {"PIL": "pillow", "prometheus_client": "prometheus-client"}  # modules named unlike their package


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

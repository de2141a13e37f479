"""The error tree: exit code, HTTP status and parent of each class."""

from __future__ import annotations

import inspect
import sys

import pytest

import mexit
from mexit import errors

TABLE = {
    "MexitError": (1, 500, "Exception"),
    "UsageError": (2, 400, "MexitError"),
    "NotFound": (2, 404, "MexitError"),
    "BadInput": (1, 400, "MexitError"),
    "TooLarge": (1, 413, "BadInput"),
    "Infeasible": (3, 400, "MexitError"),
    "BudgetInfeasible": (3, 400, "Infeasible"),
    "RiskInfeasible": (3, 400, "Infeasible"),
    "NotCalibrated": (3, 409, "MexitError"),
    "MissingExtra": (4, 501, "MexitError"),
    "ArtifactError": (5, 500, "MexitError"),
    "Damaged": (5, 500, "ArtifactError"),
    "Untrusted": (5, 500, "ArtifactError"),
    "SchemaTooNew": (5, 500, "ArtifactError"),
    "StalePolicy": (5, 500, "ArtifactError"),
    "BackendError": (1, 500, "MexitError"),
    "LoadFailed": (1, 500, "MexitError"),
    "Overloaded": (1, 503, "MexitError"),
    "DeadlineExceeded": (1, 504, "MexitError"),
}


def test_the_tree_has_these_classes_and_no_others() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert classes == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_exit_code_http_status_and_parent(name: str) -> None:
    kind = getattr(errors, name)
    assert (kind.exit_code, kind.http_status, kind.__base__.__name__) == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_each_error_is_documented_and_public(name: str) -> None:
    assert errors.__doc__ is not None
    assert name in errors.__doc__
    assert getattr(mexit, name) is getattr(errors, name)


def test_overloaded_has_a_retry_time() -> None:
    assert errors.Overloaded("busy", retry_after_s=2.5).retry_after_s == 2.5
    assert errors.Overloaded("busy").retry_after_s > 0


def test_a_missing_extra_names_the_command() -> None:
    error = errors.missing_extra("onnxruntime", "cpu", "Running a bundle")
    assert str(error) == "Running a bundle needs the package 'onnxruntime': pip install 'mexit[cpu]'"


def test_a_failed_import_in_the_block_is_a_missing_extra() -> None:
    with (
        pytest.raises(errors.MissingExtra, match=r"Testing needs the package 'absent_package': pip install"),
        errors.requires_extra("train", "Testing"),
    ):
        import absent_package.module  # noqa: F401


def test_a_package_is_named_as_pip_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(errors.MissingExtra, match="needs the package 'pillow'"), errors.requires_extra("x", "It"):
        import PIL  # noqa: F401


@pytest.mark.parametrize("statement", ["from mexit.core import absent", "import mexit.absent"])
def test_a_wrong_import_within_mexit_stays_an_import_error(statement: str) -> None:
    with pytest.raises(ImportError), errors.requires_extra("train", "Testing"):
        exec(statement)

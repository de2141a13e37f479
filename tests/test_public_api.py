"""The public names of `mexit`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mexit
from mexit import errors

pytestmark = pytest.mark.slow

ERRORS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.MexitError)
}
CLASSES = {"Budget", "Bundle", "Prediction", "Runtime"}
FUNCTIONS = {"calibrate_bundle", "evaluate_model", "export_bundle", "train_model"}
OPTIONS = {"CalibrateOptions", "EvaluateOptions", "ExportOptions", "TrainOptions"}


def test_these_names_are_exported_and_no_others() -> None:
    assert set(mexit.__all__) == ERRORS | CLASSES | FUNCTIONS | OPTIONS
    assert set(mexit.__all__) <= set(dir(mexit))


def test_pipeline_functions_and_options_are_imported_on_first_use() -> None:
    code = (
        "import importlib, sys, mexit\n"
        "assert not [module for module in sys.modules if module.startswith('mexit.flows')]\n"
        f"for name in {sorted(FUNCTIONS | OPTIONS)!r}:\n"
        "    value = getattr(mexit, name)\n"
        "    assert value.__name__ == name and value.__module__ in sys.modules\n"
        "    assert getattr(importlib.import_module('mexit'), name) is value\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mexit' has no attribute 'train_modle'"):
        mexit.train_modle  # noqa: B018

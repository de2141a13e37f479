"""A bundle whose budgets use every exit, however good each exit happens to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mexit.flows.calibrate import calibrate


@pytest.fixture(scope="session")
def mixed_bundle(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's bundle with geometric thresholds: shares of the images leave at each exit. Read it only."""
    path = Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("mixed") / "digits"))
    calibrate(path, policy="geometric", measure="max-probability", attack="none")
    return path

"""The property tests hold for other random examples than those that `make test` draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
IMPORT = "\nfrom hypothesis import"  # at the beginning of a line, unlike here
FILES = sorted(path for path in TESTS.rglob("test_*.py") if IMPORT in path.read_text())
SEEDS = range(1, 4)

pytestmark = pytest.mark.long


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(TESTS)) for path in FILES])
def test_the_properties_of_a_file_hold_for_other_seeds(path: Path) -> None:
    for seed in SEEDS:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider", path]
        done = subprocess.run(
            [*command, f"--hypothesis-seed={seed}"], cwd=TESTS.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:]

"""The training curves have a panel for CMI in runs that log it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mexit.evaluate import plots

PLAIN = {"epoch": 1, "loss": 2.0, "loss clean": 2.0, "selection": {"clean": [0.5, 0.25, 0.125]}}
MEASURED = PLAIN | {"loss gamma": -1.0, "cmi": [0.5, 0.25], "gamma": [0.5, 0.25], "ncmi": [0.5, 0.25]}


@pytest.mark.slow
def test_runs_that_log_cmi_have_a_third_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def width(record: dict) -> int:
        plots.training_curves([record, record], tmp_path / "curves.png", "title")
        return Image.open(tmp_path / "curves.png").width

    assert width(MEASURED) == pytest.approx(1.5 * width(PLAIN), rel=0.05)

"""Details of generated answers, as `mexit evaluate` measures them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mexit.calibrate.temperature import reliability
from mexit.core.exit_policy import Policy
from mexit.data.dataset import ArrayImages, DataSet, ImageStore
from mexit.evaluate.answers import ScoredExits
from mexit.evaluate.details import Details, describe_answers

POLICY = Policy("max-probability", False, (2.0, 1.5), (2.0,))


@pytest.fixture(scope="session")
def make_details() -> Callable[..., Details]:
    """Details of N answers of two exits; images are noise unless given."""

    def make(
        names: Sequence[str], n: int = 60, images: ImageStore | None = None, groups: np.ndarray | None = None
    ) -> Details:
        rng, classes = np.random.default_rng(0), len(names)
        labels = rng.integers(0, classes, n)
        logits = rng.normal(size=(2, n, classes)).astype(np.float32)
        logits[:, np.arange(n), labels] += 2
        images = images or ArrayImages(rng.integers(0, 256, (n, 8, 8), dtype=np.uint8))
        data = DataSet("folder:/a <b>", tuple(names), images, labels, "0" * 64, None)
        scored = ScoredExits.of(POLICY, logits)
        answers = scored.answers("budget low", POLICY, labels, np.arange(n), groups)
        columns = {"low": scored.correct(POLICY, labels), "full": scored.classes[1] == labels}
        return describe_answers(answers, columns, reliability(POLICY.scorer(classes), logits, labels), data)

    return make


@pytest.fixture
def report() -> dict[str, object]:
    """The parts of a report that the page shows."""
    entry = {"value": 0.75, "n": 60, "stderr": 0.05}
    budget = {"budget_macs": 2e6, "clean": entry | {"mean_macs": 1.5e6, "exits": [40, 20]}}
    return {
        "exits": [{"exit": 1, "clean": entry}, {"exit": 2, "clean": entry}],
        "budgets": {"low": budget},
        "settings": {"n": 60, "of": 120, "data": "folder:/a <b>"},
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """An empty folder for generated pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder

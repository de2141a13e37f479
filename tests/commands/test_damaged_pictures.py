"""A damaged picture that is met late, after training began or by a later command, is named in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from command_line import refused
from PIL import Image

from mexit.data import digits, folder
from mexit.data.groups import find_groups
from mexit.data.picture_scan import scan_pictures
from mexit.data.splits import Splits, split
from mexit.flows import data as flow
from mexit.flows.train import TrainOptions, train_model

pytestmark = pytest.mark.slow


def draw(root: Path, labels: int, count: int) -> Path:
    """Class folders of digits: `count` pictures of each of the first `labels` classes."""
    data = digits.load()
    for label in range(labels):
        (root / str(label)).mkdir(parents=True)
        for place in np.flatnonzero(data.labels == label)[:count]:
            image = np.asarray(data.images.at(np.array([place]))[0])
            Image.fromarray(image.repeat(4, 0).repeat(4, 1)).save(root / str(label) / f"{place:04}.png")
    return root


def splits_of(root: Path) -> tuple[Splits, list[str]]:
    data = folder.load(root)
    return split(data, find_groups(data, "auto")), list(data.images.names)


@pytest.mark.parametrize("part", ["calibration", "certification"])
def test_calibration_names_a_damaged_picture_and_changes_nothing(part: str, bundle_copy: Path, tmp_path: Path) -> None:
    root = draw(tmp_path / "own", 10, 60)
    splits, names = splits_of(root)
    bad = names[splits.part(part)[0]]
    os.truncate(root / bad, 60)
    before = (bundle_copy / "policies.json").read_bytes()
    said = refused("calibrate", bundle_copy, "--data", f"folder:{root}", "--attack", "none", code=1)
    assert f"image {root}/{bad}: the image is damaged" in said
    assert (bundle_copy / "policies.json").read_bytes() == before


def test_evaluation_names_a_damaged_test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training checks a part of a large set; the picture is in none of what it reads."""
    monkeypatch.setattr(flow, "MAX_SCAN_S", 0.0)
    root = draw(tmp_path / "own", 3, 170)
    splits, names = splits_of(root)
    checked = scan_pictures(folder.load(root), most_seconds=0.0).index
    bad = names[next(i for i in splits.part("test") if i not in checked)]
    os.truncate(root / bad, 60)
    settings = {"method": "clean", "model": "digits-cnn", "size": (8, 8), "channels": 1, "epochs": 1}
    train_model(f"folder:{root}", settings=settings, out=tmp_path / "run", options=TrainOptions("cpu", threads=1))
    said = refused("evaluate", tmp_path / "run", "--attacks", "clean", "--device", "cpu", code=1)
    assert f"image {root}/{bad}: the image is damaged" in said

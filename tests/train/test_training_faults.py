"""Images that disappear during training: the error names one, and the run can be resumed once they are back."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import refused
from PIL import Image
from safetensors.numpy import load_file

from mexit.data import digits
from mexit.errors import MexitError
from mexit.flows.train import TrainOptions, train_model
from mexit.train import checkpoint
from mexit.train.checkpoint import read_log

GIVEN = {"model": "digits-cnn", "method": "clean", "epochs": 3, "batch": 32, "precision": "fp32"}
LABELS, EACH = (0, 1, 7), 48


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of digits as PNG files. Plots are off."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data, root = digits.load(), tmp_path / "images"
    for label in LABELS:
        folder = root / str(label)
        folder.mkdir(parents=True)
        chosen = np.flatnonzero(data.labels == label)[:EACH]
        for position, image in zip(chosen, np.asarray(data.images.at(chosen)), strict=True):
            Image.fromarray(image).save(folder / f"{position}.png")
    return root


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_folder_that_disappears_costs_only_the_steps_since_the_checkpoint(images: Path, workers: int) -> None:
    data, away = f"folder:{images}", images.with_name("away")
    train_model(data=data, settings=GIVEN, out=Path("runs/whole"), options=TrainOptions(threads=1, cache=False))
    run, stops = Path("runs/broken"), itertools.count()
    before: list[bytes] = []

    def remove_in_the_second_epoch() -> bool:
        if (run / checkpoint.LOG).exists() and not before:
            before.append((run / checkpoint.CHECKPOINT).read_bytes())
            images.rename(away)
        next(stops)
        return False

    with pytest.raises(MexitError) as caught:
        train_model(
            data=data,
            settings=GIVEN,
            out=run,
            options=TrainOptions(threads=1, workers=workers, should_stop=remove_in_the_second_epoch, cache=False),
        )
    assert f"{images}/" in str(caught.value)
    assert f"mexit train --resume --out {run}" in str(caught.value)
    assert (run / checkpoint.CHECKPOINT).read_bytes() == before[0]
    assert len(read_log(run)) == 1
    assert str(images) in refused("train", "--resume", "--out", run, "--threads", "1", code=2)

    away.rename(images)
    assert train_model(resume=True, out=run, options=TrainOptions(threads=1, workers=workers)).finished
    whole, again = (load_file(Path("runs") / name / checkpoint.WEIGHTS) for name in ("whole", "broken"))
    assert all(whole[name].tobytes() == again[name].tobytes() for name in whole)
    assert read_log(run) == read_log(Path("runs/whole"))

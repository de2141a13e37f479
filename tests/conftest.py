"""What many tests share: one small network, trained for seconds on digits, exported and calibrated."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve the servers under test

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from mexit.core.exit_policy import first_exit
from mexit.data import digits, splits

if TYPE_CHECKING:
    from torch import Tensor

    from mexit.models import MultiExit


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Facts of this device that a session's fixtures find out are not left to the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MEXIT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the person who runs the tests, and a working directory of the test's own."""
    for name in list(os.environ):
        if name.startswith("MEXIT_") and name != "MEXIT_DATA":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MEXIT_CACHE", str(tmp_path / "device-cache"))  # nothing timed yet: `auto` is `ort`
    monkeypatch.setenv("MEXIT_COST", "macs")  # the same policies on every device, and no measurement
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run `runs/digits` and its calibrated bundle `bundles/digits`."""
    from mexit.flows.export import ExportOptions, export_bundle
    from mexit.flows.train import TrainOptions, train_model

    root = tmp_path_factory.mktemp("workspace")
    before = Path.cwd()
    os.chdir(root)
    try:
        train_model(
            settings={"method": "adversarial", "epochs": 8, "steps": 2, "step": 0.08},
            out=Path("runs/digits"),
            options=TrainOptions(threads=1),
        )
        export_bundle(Path("runs/digits"), options=ExportOptions(exits="all"))
    finally:
        os.chdir(before)
    return root


@pytest.fixture(scope="session")
def digits_bundle(workspace: Path) -> Path:
    """The session's bundle. Read it only; tests that change one take `bundle_copy`."""
    return workspace / "bundles" / "digits"


@pytest.fixture(scope="session")
def int8_bundle(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's run with the variants fp32 and int8, not calibrated. Read it only."""
    from mexit.flows.export import ExportOptions, export_bundle

    options = ExportOptions(precision="int8", calibrate=False, exits="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("int8"))
        out = Path("bundles/int8").absolute()
        export_bundle(workspace / "runs" / "digits", out=out, options=options)
    return out


@pytest.fixture
def bundle_copy(digits_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(digits_bundle, tmp_path / "bundles" / "digits"))


@pytest.fixture(scope="session")
def test_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The test split of digits: uint8 (449, 8, 8) and labels."""
    data = digits.load()
    index = splits.split(data).part("test")
    images = data.images.at(index)
    assert isinstance(images, np.ndarray)
    return images, data.labels[index]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of downloaded data sets; the test is skipped where there is none."""
    folder = os.environ.get("MEXIT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs downloaded data sets: set MEXIT_DATA to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def mixed_bundle(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's bundle with geometric thresholds: shares of the images leave at each exit. Read it only."""
    from mexit.flows.calibrate import CalibrateOptions, calibrate_bundle

    path = Path(shutil.copytree(digits_bundle, tmp_path_factory.mktemp("mixed") / "digits"))
    calibrate_bundle(path, options=CalibrateOptions(policy="geometric", measure="max-probability", attack="none"))
    return path


@pytest.fixture(scope="session")
def reject_bundle(mixed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed_bundle` with a reject option that withholds half of the answers that no threshold let leave."""
    from mexit.core.bundle import Bundle
    from mexit.core.policies_file import RejectOutcome, RejectTerms

    bundle = Bundle.open(Path(shutil.copytree(mixed_bundle, tmp_path_factory.mktemp("reject") / "digits")))
    policies = bundle.policies()
    [entry] = policies.entries
    scores = entry.policy(entry.frontier[0]).scorer(10).score(bundle.load_trace(entry.trace).logits)
    points = []
    for point in entry.frontier:
        exits = first_exit(scores, point.thresholds)
        late = [row[exits > min(k, 2)] for k, row in enumerate(scores, start=1)]
        reject = tuple(float(np.median(row)) if len(row) else 0.0 for row in late)
        points.append(replace(point, reject=reject, rejected=RejectOutcome(0.9, 0.01, None, (1, 2, 3))))
    terms = RejectTerms(0.02, 0.95, None, 81, None, None)
    bundle.save_policies(policies.with_entry(replace(entry, frontier=tuple(points), reject=terms)))
    return bundle.path


@pytest.fixture(scope="module")
def model() -> MultiExit:
    """`digits-cnn` as it is initialised."""
    import torch

    from mexit.models import build_model

    torch.manual_seed(0)
    return build_model("digits-cnn", 10)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, places of 48 digits of the selection split."""
    import torch

    from mexit.models import model_spec

    data = digits.load()
    index = splits.split(data).part("selection")[:48]
    images = data.batch(index, model_spec("digits-cnn").input)
    return torch.from_numpy(images), torch.from_numpy(data.labels[index]), torch.from_numpy(index)

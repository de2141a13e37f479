"""The registry of data sets, digits and MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_images import encode, noise, spec

from mexit.data import digits, registry
from mexit.data.splits import split
from mexit.errors import NotFound, UsageError


def test_digits_equal_those_of_scikit_learn() -> None:
    reference = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is needed for the comparison"
    ).load_digits()
    data = digits.load()
    images = np.asarray(data.images.at(np.arange(1797)))
    assert (images == np.rint(reference.images * 255 / 16)).all()
    assert (data.labels == reference.target).all()


def test_digits_span_0_to_1_and_have_no_test_part() -> None:
    data = digits.load()
    tensor = data.batch(np.arange(len(data)), spec(1))
    assert (tensor.shape, tensor.min(), tensor.max()) == ((1797, 1, 8, 8), 0, 1)
    assert data.official_test is None
    assert np.bincount(data.labels).min() >= 174


def test_mnist_has_the_published_statistics(data_dir: Path) -> None:
    data = registry.load("mnist", data_dir)
    assert len(data) == 70_000
    assert data.official_test is not None
    assert data.official_test.tolist() == list(range(60_000, 70_000))
    train, test = data.labels[:60_000], data.labels[60_000:]
    assert np.bincount(train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    images = np.asarray(data.images.at(np.arange(60_000)))
    assert images.shape == (60_000, 28, 28)
    assert images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert images.std() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert train[:5].tolist() == [5, 0, 4, 1, 9]


def test_the_test_split_of_mnist_is_its_official_test_part(data_dir: Path) -> None:
    splits = split(registry.load("mnist", data_dir))
    sizes = {name: len(part) for name, part in splits.parts.items()}
    assert sizes == {
        "train": 48_000, "selection": 2_400, "calibration": 4_800, "certification": 4_800, "test": 10_000,
    }  # fmt: skip
    assert splits.part("test").min() == 60_000
    assert splits.part("train").max() < 60_000


def test_the_data_folder_defaults_to_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEXIT_DATA", str(tmp_path / "from-the-environment"))
    with pytest.raises(NotFound, match="from-the-environment"):
        registry.load("mnist")
    with pytest.raises(NotFound, match="named"):
        registry.load("mnist", tmp_path / "named")


def test_a_folder_is_loaded_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.png").write_bytes(encode(noise(4, 4)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.load("folder:~/pets").classes == ("a", "b")
    assert registry.load(f"folder:{tmp_path}/pets").name == f"folder:{tmp_path}/pets"


def test_a_downloaded_set_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEXIT_DATA", raising=False)
    with pytest.raises(
        UsageError, match="--data mnist needs the folder of the downloaded sets: add --data-dir, or set MEXIT"
    ):
        registry.load("mnist")


@pytest.mark.parametrize("name", ["", "nope", "MNIST", "folder:", "folder", "../mnist"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown data set '.*': choose from digits, mnist, .*or folder:PATH"):
        registry.load(name)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("folder:pictures/", "folder:pictures"),
        ("folder:./pictures//", "folder:pictures"),
        ("folder:pictures", "folder:pictures"),
        ("digits", "digits"),
        ("folder:", "folder:"),
    ],
)
def test_spellings_of_a_folder_have_one_name(name: str, plain: str) -> None:
    assert registry.plain_name(name) == plain

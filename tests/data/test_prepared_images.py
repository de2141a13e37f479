"""Pictures kept in memory are the prepared pictures, for one input only; the others are read as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_pictures import draw

from mexit.core.manifest import InputSpec
from mexit.data import registry
from mexit.data.dataset import DataSet, split_batches
from mexit.data.prepared_images import fits_in_memory, with_prepared
from mexit.errors import NotFound
from mexit.models import model_spec


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return registry.load(f"folder:{draw(tmp_path / 'own', 5)}")


def spec_of(channels: int, side: int = 32) -> InputSpec:
    return model_spec("wide-cnn-10m").with_input((channels, side, side)).input


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_memory_equal_those_read_from_files(data: DataSet, tmp_path: Path, channels: int) -> None:
    spec, index = spec_of(channels), np.array([7, 0, 3, 9])
    expected = data.batch(index, spec)
    kept = with_prepared(data, index, spec, (data.batch(part, spec) for part in split_batches(index, 3)))
    assert not kept.streamed
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    for order in ([0, 1, 2, 3], [2, 0], [3, 3]):
        again = kept.batch(index[order], spec)
        assert again.dtype == np.float32
        assert np.array_equal(again, expected[order])


def test_another_input_and_other_pictures_are_read_from_files(data: DataSet, tmp_path: Path) -> None:
    spec, other, index = spec_of(3), spec_of(3, 48), np.arange(4)
    kept = with_prepared(data, index, spec, [data.batch(index, spec)])
    assert np.array_equal(kept.batch(index, other), data.batch(index, other))
    assert np.array_equal(kept.batch(np.array([1, 8]), spec), data.batch(np.array([1, 8]), spec))
    missing = data.images.name(8)
    Path(missing.removeprefix("image ")).unlink()
    with pytest.raises(NotFound, match="does not exist"):
        kept.batch(np.array([1, 8]), spec)


def test_the_memory_is_bounded() -> None:
    spec = spec_of(3)
    assert fits_in_memory(10_000, spec)
    assert not fits_in_memory(10**9, spec)
    assert not fits_in_memory(10**8, replace(spec, size=(4096, 4096)))

"""The random textures: range, scale of the plasma, mean and tint of the ice."""

from __future__ import annotations

import numpy as np
import pytest

from mexit.attacks.textures import flakes, ice, plasma


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def roughness(texture: np.ndarray) -> float:
    """Difference of neighbours, share of the standard deviation."""
    return float(np.abs(np.diff(texture, axis=-1)).mean() / texture.std())


def test_plasma_fills_the_range_and_wraps_around() -> None:
    for decay in (3, 1.75):
        cloud = plasma((64, 64), decay, rng(0))
        assert (cloud.min(), cloud.max()) == (0, 1)
        seam = np.abs(cloud[:, 0] - cloud[:, -1]).mean()
        assert seam < 3 * np.abs(np.diff(cloud, axis=1)).mean()


def test_plasma_is_smoother_the_faster_its_noise_decays() -> None:
    rough = [np.mean([roughness(plasma((64, 64), decay, rng(seed))) for seed in range(20)]) for decay in (1.4, 2, 3)]
    assert rough[0] > 1.5 * rough[1]
    assert rough[1] > rough[2]


def test_plasma_is_cropped_to_any_shape() -> None:
    assert plasma((28, 28), 2, rng(0)).shape == (28, 28)
    np.testing.assert_array_equal(plasma((28, 20), 2, rng(0)), plasma((32, 32), 2, rng(0))[:28, :20])


def test_ice_has_the_brightness_and_tint_of_frost() -> None:
    panes = np.stack([ice((32, 32), 3, rng(seed)) for seed in range(40)])
    assert panes.min() >= 0
    assert panes.max() <= 1
    red, green, blue = panes.mean(axis=(0, 2, 3))
    assert red < green < blue
    assert panes.mean() == pytest.approx(0.62, abs=0.05)
    assert panes[:, 1].std(axis=(1, 2)).mean() == pytest.approx(0.06, abs=0.01)
    assert ice((32, 48), 1, rng(0)).shape == (1, 32, 48)


def test_flakes_are_sparse_streaks_that_fall() -> None:
    layer = np.stack([flakes((64, 64), (0.1, 0.2), 1.0, 0.6, (10, 4), rng(seed))[0] for seed in range(20)])
    assert 0 < layer.mean() < 0.05
    across, down = (np.abs(np.diff(layer, axis=axis)).mean() for axis in (2, 1))
    assert across > 1.3 * down
    assert not flakes((64, 64), (-1, 0.2), 1.0, 0.6, (10, 4), rng(0)).any()

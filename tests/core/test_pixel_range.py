"""A radius is shown as it was typed."""

from __future__ import annotations

import pytest

from mexit.attacks.pgd import PGDConfig
from mexit.core.pixel_range import format_fraction


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (2 / 255, "2/255"), (1 / 255, "1/255"), (0.1, "0.1"), (0.2, "0.2"), (0.3, "0.3"), (1.0, "1"),
     (0.03, "0.03"), (2 / 3 * 2 / 255, "0.00522876"), (0.0, "0")],
)  # fmt: skip
def test_a_fraction_of_the_levels_is_shown_as_one(value: float, text: str) -> None:
    assert format_fraction(value) == text


def test_an_attack_shows_radius_and_step_as_fractions() -> None:
    assert PGDConfig(8 / 255, 2 / 255, 7).describe() == "Linf eps 8/255, step 2/255, random start"
    assert PGDConfig(0.3, 20 / 255, 7, norm="l2").describe() == "L2 eps 0.3, step 20/255, random start"

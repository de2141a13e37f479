"""The panel of annotated frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from camera_media import prediction

from mexit.camera.overlay import Overlay, describe_cost, format_confidence, to_ascii
from mexit.camera.region import Region

COSTS = (250, 600, 1000)


@pytest.mark.parametrize("grey", [0, 127, 255])
@pytest.mark.parametrize("size", [(320, 320), (432, 768), (1080, 1920)])
def test_the_panel_is_readable_on_any_frame(grey: int, size: tuple[int, int]) -> None:
    frame = np.full((*size, 3), grey, np.uint8)
    drawn = Overlay((1, 2, 3), COSTS).draw(frame, prediction(label="traffic light"))
    assert drawn.shape == frame.shape
    assert (frame == grey).all(), "the caller's frame was changed"
    changed = (drawn != grey).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    linear = (drawn[rows[0] : rows[-1], columns[0] : columns[-1]] / 255.0) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    text, background = np.quantile(luminance, 0.995), np.median(luminance)
    assert (text + 0.05) / (background + 0.05) > 4.5  # WCAG's contrast for text
    assert luminance.size < 0.45 * frame[..., 0].size


def test_the_description_of_the_cost() -> None:
    long, short = prediction(), prediction(reason="deadline")
    assert describe_cost(long, 3, len, 1000) == ["exit 1 of 3  ·  25% of full cost (250 of 1k)"]
    assert describe_cost(short, 3, len, 40) == ["exit 1 of 3 (deadline)", "25% of full cost"]


def test_a_long_label_is_cut() -> None:
    frame = np.zeros((320, 320, 3), np.uint8)
    drawn = Overlay((1, 2, 3), COSTS).draw(frame, prediction(label="a very long label " * 10))
    assert not drawn[:, -4:].any()


def test_an_unsure_answer_is_drawn_as_such() -> None:
    frame = np.zeros((320, 320, 3), np.uint8)
    unsure = prediction(label=None, index=None, reason="unsure")
    overlay = Overlay((1, 2, 3), COSTS)
    drawn = overlay.draw(frame, unsure)
    assert (drawn == overlay.draw(frame, replace(unsure, confidence=0.1))).all(), "no class, so no confidence in one"
    assert (drawn != overlay.draw(frame, prediction(label="unsure"))).any()
    assert (drawn != overlay.draw(frame, prediction(label=""))).any()
    assert describe_cost(prediction(label=None, reason="unsure"), 3, len, 40)[0] == "exit 1 of 3  ·  25% of full cost"


@pytest.mark.parametrize(
    ("label", "drawn"), [("stop sign", "stop sign"), ("größer, façade", "gro?er, facade"), ("猫", "?")]
)
def test_labels_are_transliterated(label: str, drawn: str) -> None:
    assert to_ascii(label) == drawn


@pytest.mark.parametrize(("confidence", "text"), [(0.42, "42%"), (0.994, "99%"), (0.9991, ">99%"), (1.0, "100%")])
def test_confidence_is_not_rounded_up_to_certainty(confidence: float, text: str) -> None:
    assert format_confidence(confidence) == text


@pytest.mark.parametrize("grey", [0, 127, 255])
def test_the_outline_of_the_region(grey: int) -> None:
    frame = np.full((80, 60, 3), grey, np.uint8)
    outlined = Overlay((1, 2, 3), COSTS, Region(20, 30, 16, 40)).outline(frame)
    edges = np.zeros((80, 60), bool)
    edges[30:70, 20:36] = True
    edges[32:68, 22:34] = False
    assert np.array_equal((outlined != frame).any(axis=2) & edges, (outlined != frame).any(axis=2))
    assert (abs(outlined[edges].astype(int) - grey).max(axis=1) > 100).sum() >= edges.sum() // 2 - 4
    assert (frame == grey).all()


def test_the_outline_of_small_and_missing_regions() -> None:
    frame = np.full((8, 8, 3), 127, np.uint8)
    assert Overlay((1,), COSTS[:1]).outline(frame) is frame
    for size in (1, 2, 3, 8):
        drawn = Overlay((1,), COSTS[:1], Region(0, 0, size, max(size, 2))).outline(frame)
        assert (drawn != frame).any(axis=2).sum() == min(size * max(size, 2), 48)

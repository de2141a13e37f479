"""Text in pictures: any script that a font of this system has, and "?" for the rest."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mexit.evaluate.fonts import class_label, draw_text, drawable, fit_width, font_files, text_width, wrap

UNKNOWN = "\U0010fffd"  # never a character


def drawn(text: str) -> np.ndarray:
    image = Image.new("L", (300, 40))
    draw_text(ImageDraw.Draw(image), (4, 4), text, 20, "#ffffff")
    return np.asarray(image)


def test_ascii_is_drawn_on_every_system() -> None:
    assert drawable("stop 50 km/h $5 <b>") == "stop 50 km/h $5 <b>"
    assert drawn("stop").any()
    assert not np.array_equal(drawn("stop"), drawn("step"))


def test_a_character_without_a_font_is_a_question_mark_and_the_class_number_tells_it() -> None:
    assert drawable(f"a{UNKNOWN}b") == "a?b"
    assert class_label(3, f"a{UNKNOWN}") == "a? (class 3)"
    assert class_label(3, "plain") == "plain"
    assert drawable("a\nb") == "a\\x0ab"


def test_marks_of_a_missing_character_are_left_out() -> None:
    devanagari = "दूरी"
    assert drawable(devanagari) in (devanagari, "??")


def test_parts_of_a_text_have_fonts_of_their_own() -> None:
    text = "Stra" + "".join(char for char in "ßЖ猫" if drawable(char) == char)
    assert drawable(text) == text
    assert np.flatnonzero(drawn(text).any(axis=0)).max() < 4 + text_width(text, 20) + 3
    assert np.flatnonzero(drawn(text).any(axis=0)).max() > 4 + text_width("Stra", 20) - 3
    assert all(path.is_file() for path in font_files())


def test_text_is_abbreviated_to_a_width() -> None:
    long = "a very long name of a class of traffic signs"
    shown = fit_width(long, 13, 120)
    assert text_width(shown, 13) <= 120
    assert shown.startswith("a ver")
    assert shown.endswith("s")
    assert fit_width("stop", 13, 120) == "stop"
    assert len(fit_width(long, 13, 1)) == 5


def test_text_is_wrapped_at_words_and_the_last_line_is_abbreviated() -> None:
    assert wrap("stop", 13, 120) == ["stop"]
    assert wrap("Speed limit (80 km/h) zone", 13, 130) == ["Speed limit (80", "km/h) zone"]
    first, second = wrap("x" * 60, 13, 100)
    assert text_width(first, 13) <= 100
    assert text_width(second, 13) <= 100
    assert first == "x" * len(first)
    assert "..." in second
    assert wrap("ab", 13, 1) == ["a", "b"]

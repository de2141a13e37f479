"""Names of files and classes in reports."""

from __future__ import annotations

import os

import pytest

from mexit.evaluate.names import abbreviate, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Straße 猫.png", "Straße 猫.png"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\xe9.jpg"),
        ("\ud800", "\\ud800"),
        ("a\u2028b\x85", "a\\u2028b\\x85"),
    ],
)
def test_what_a_page_or_picture_cannot_show_is_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode()


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    assert abbreviate("abcdefghij", 10) == "abcdefghij"
    assert abbreviate("abcdefghijk", 10) == "abcd...ijk"
    assert abbreviate("abcdefghijk", 5) == "a...k"
    assert all(len(abbreviate("x" * 50, most)) == most for most in range(5, 50))

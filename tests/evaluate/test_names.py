"""Names of files and classes in reports."""

from __future__ import annotations

from mexit.evaluate.names import abbreviate


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    assert abbreviate("abcdefghij", 10) == "abcdefghij"
    assert abbreviate("abcdefghijk", 10) == "abcd...ijk"
    assert abbreviate("abcdefghijk", 5) == "a...k"
    assert all(len(abbreviate("x" * 50, most)) == most for most in range(5, 50))

"""The glossary of reports."""

from __future__ import annotations

from mexit.core.glossary import GLOSSARY, words_in


def test_the_words_of_a_text_are_found_singular_and_plural() -> None:
    assert list(words_in("Mean MACs of all exits; the worst budget")) == ["budget", "exit", "MACs", "worst"]
    assert words_in("existing macs, budgeting") == {}
    assert list(words_in(" ".join(GLOSSARY))) == list(GLOSSARY)

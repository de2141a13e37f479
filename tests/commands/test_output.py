"""Tables and sentences at the width of a terminal."""

from __future__ import annotations

import pytest

from mexit.commands import output

TITLE = "bundles/folder-signs-clean: accuracy per exit, and a title that is longer than the lines of a terminal"
CAPTION = "628 of 628 test images, fp32 on cpu; the caption goes on beyond the narrow table and beyond the terminal too"


def test_title_and_caption_of_a_narrow_table_break_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(TITLE, ["exit", "clean"], [["1", "36.5 ± 3.8%"]], CAPTION + "\nsecond line")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines[:2]) == TITLE
    assert " ".join(lines[-3:-1]) == CAPTION
    assert lines[-1] == "second line"


def test_markup_in_a_title_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.table("runs/[red]: accuracy", ["exit"], [["1"]], "[bold]")
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("runs/[red]: accuracy", "[bold]")


def test_a_share_just_below_zero_has_no_sign() -> None:
    assert [output.percent(share) for share in (-0.0002, 0.0, -0.001, 0.9996)] == ["0.0%", "0.0%", "-0.1%", "100.0%"]

"""The files of the details: pictures for few and many classes in any script, and the page beside them."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mexit.data.dataset import ArrayImages, DataSet
from mexit.evaluate import plots
from mexit.evaluate.details import describe_answers
from mexit.evaluate.report_files import write_details

ODD = ("Straße <b>", "$\\frac{1$", "Знак «Стоп»", "علامة", "速度", "a" * 200, "दूरी", "\U0010fffd")


@pytest.mark.parametrize("classes", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_every_number_of_classes_and_every_script_can_be_drawn(make_details, report, tmp_path, classes: int) -> None:
    pytest.importorskip("matplotlib")
    details = make_details([f"{ODD[i % len(ODD)]} {i}" for i in range(classes)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about characters without a font
        written = write_details(details, report, tmp_path, "run $x_1$ \n {")
    names = ["confusion.png", "classes.png", "reliability.png", "contact_sheet.png", "report.html"]
    assert [path.name for path in written] == names
    for path in written[:-1]:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) >= 300
        assert pixels.std() > 3
    assert max(Image.open(written[0]).size) < 2600
    json.dumps(details.to_json(), allow_nan=False).encode()


def test_without_matplotlib_the_page_is_written_and_says_what_is_missing(
    make_details, report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    assert not plots.available()
    written = write_details(make_details(["a", "b"]), report, tmp_path, "run")
    assert [path.name for path in written] == ["contact_sheet.png", "report.html"]
    page = written[-1].read_text()
    assert "confusion.png, classes.png and reliability.png were not drawn" in page
    assert "pip install &#x27;mexit[train]&#x27;" in page
    assert 'class="matrix' in page
    assert "<svg" in page


def test_a_budget_may_be_named_like_a_field(make_details) -> None:
    details = make_details(["a", "b"])
    hits = details.answers.correct
    data = DataSet("x", ("a", "b"), ArrayImages(np.zeros((60, 8, 8), np.uint8)), details.answers.labels, "", None)
    content = describe_answers(details.answers, {"class": hits, "n": hits}, details.reliability, data).to_json()
    row = content["classes"][0]
    assert (row["class"], row["n"]) == ("a", details.rows[0].n)
    assert row["accuracy_of"] == {"class": row["accuracy"], "n": row["accuracy"]}


def test_the_report_holds_the_details_as_json(make_details) -> None:
    details = make_details(["a", "b", "c"], groups=np.arange(60) // 2)
    content = details.to_json()
    assert content["answers"] == "budget low"
    assert [row["class"] for row in content["classes"]] == ["a", "b", "c"]
    assert sum(row["n"] for row in content["classes"]) == 60
    assert set(content["classes"][0]) == {"class", "n", "groups", "accuracy", "interval", "accuracy_of"}
    assert set(content["classes"][0]["accuracy_of"]) == {"low", "full"}
    wrong = sum(n for _, _, n in content["confusion"])
    assert wrong == 60 - details.answers.correct.sum()
    assert [row["exit"] for row in content["reliability"]] == [1, 2]
    assert all(row["true"] != row["answer"] for row in content["most_wrong"])
    confidences = [row["confidence"] for row in content["least_certain"]]
    assert confidences == sorted(confidences)

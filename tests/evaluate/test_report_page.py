"""The HTML page: complete, self-contained, escaped, accessible, and bounded in size."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from mexit.core.glossary import GLOSSARY
from mexit.data.dataset import ArrayImages, DataSet
from mexit.evaluate.answers import NO_ANSWER
from mexit.evaluate.details import describe_answers
from mexit.evaluate.report_page import MAX_BYTES, report_page

NAMES = ('Straße <b>"x"</b> 猫', "</style><script>alert(1)</script>", "$x_1$ & 'y'", "\u202eright to left")
VOID = {"meta", "img", "rect", "path", "circle"}


class Page(HTMLParser):
    """Checks that elements nest, and collects them."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(make_details, report) -> Page:
    return Page(report_page('a "<run>"', report, make_details(NAMES), ("Something & more is missing.",)))


def test_names_are_text_and_never_markup(page: Page) -> None:
    assert all(name in page.text for name in NAMES)
    assert 'a "<run>"' in page.text
    assert "Something & more is missing." in page.text
    assert not page.all("script")
    assert not page.all("b") or all("style" in attributes for attributes in page.all("b"))


def test_the_page_needs_nothing_from_outside(page: Page, make_details, report) -> None:
    sources = [image["src"] for image in page.all("img")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert all(link["href"].startswith("#") for link in page.all("a"))
    content = report_page("run", report, make_details(NAMES)).decode()
    assert not re.search(r"https?://|url\(|@import|<link|javascript:", content)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


def test_every_picture_and_region_has_a_description_and_every_link_a_target(page: Page) -> None:
    assert all(image["alt"] and image["width"] and image["height"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    regions = [attributes for attributes in page.all("div") if attributes.get("role") == "region"]
    assert regions
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= targets
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_both_colour_schemes_and_narrow_screens_have_a_style(make_details, report) -> None:
    style = report_page("run", report, make_details(NAMES)).decode()
    assert "prefers-color-scheme:dark" in style
    assert "color-scheme:light dark" in style
    assert "max-width:30rem" in style


def test_numbers_of_the_report_are_on_the_page(page: Page, make_details) -> None:
    details = make_details(NAMES)
    assert "75.0 ± 5.0" in page.text
    assert f"{100 * details.answers.correct.mean():.1f} %" in page.text
    assert f"{details.reliability[0]['ece_before']:.3f}" in page.text
    assert len(page.all("img")) == sum(len(sheet.tiles) for sheet in details.sheets)
    cells = [attributes for attributes in page.all("td") if attributes.get("class", "").split()[:1] == ["c"]]
    assert len(cells) == len(NAMES)


def test_the_words_of_the_page_are_explained_on_it(page: Page) -> None:
    explained = page.text.split("Words")[-1]
    assert all(f"{word}{GLOSSARY[word]}" in explained for word in ("MACs", "ECE", "budget", "exit", "standard error"))
    assert "unsure" not in explained
    assert "#words" in {link["href"] for link in page.all("a")}


def test_groups_and_missing_answers_are_shown_where_there_are_some(make_details, report, page: Page) -> None:
    assert "groups" not in page.text
    grouped = Page(report_page("run", report, make_details(NAMES, groups=np.arange(60) // 3)))
    assert "counts groups of images" in grouped.text
    assert "one picture of each group" in grouped.text


def test_a_perfect_network_has_a_page(make_details, report) -> None:
    details = make_details(["a", "b"], n=2)
    labels = details.answers.predicted  # every answer is right
    answers = replace(details.answers, labels=labels)
    data = DataSet("x", ("a", "b"), ArrayImages(np.zeros((2, 8, 8), np.uint8)), labels, "", None)
    text = Page(report_page("run", report, describe_answers(answers, {}, details.reliability, data))).text
    assert "There is no wrong answer." in text
    assert "None: there are no wrong answers with the highest confidence." in text


def test_budgets_that_share_a_policy_are_one_row_and_one_column(make_details, report) -> None:
    report["budgets"]["full"] = report["budgets"]["low"]
    apart = Page(report_page("run", report, make_details(NAMES)))
    report["settings"]["same_policy"] = [["low", "full"]]
    together = Page(report_page("run", report, make_details(NAMES)))
    assert "low, full" in together.text
    assert "low, full" not in apart.text
    assert len(together.all("th")) == len(apart.all("th")) - 1
    assert len(together.all("tr")) == len(apart.all("tr")) - 1


def test_unsure_answers_have_a_column_and_a_count(make_details, report) -> None:
    details = make_details(["a", "b"])
    predicted = np.where(np.arange(60) < 9, NO_ANSWER, details.answers.predicted)
    data = DataSet("x", ("a", "b"), ArrayImages(np.zeros((60, 8, 8), np.uint8)), details.answers.labels, "", None)
    unsure = describe_answers(replace(details.answers, predicted=predicted), {}, details.reliability, data)
    text = Page(report_page("run", report, unsure)).text
    assert "no answer (unsure)9" in text
    assert "of the answers are correct" in text
    assert "true \\ answerabno answer" in text
    assert unsure.to_json()["no_answer"] == 9
    assert "unsure" not in Page(report_page("run", report, details)).text


def test_a_long_name_beside_the_matrix_lacks_its_middle_and_has_a_title(make_details, report) -> None:
    long = 'Vehicles over 3.5 "metric" tons prohibited & end of zone'
    page = Page(report_page("run", report, make_details([long, "Stop"])))
    names = [attributes for attributes in page.all("bdi") if "title" in attributes]
    assert [attributes["title"] for attributes in names] == [long, long], "one in the row and one in the column"
    assert page.text.count("Vehicles ... of zone") == 2
    assert long in page.text, "the table of the classes"


def test_a_thousand_classes_with_long_names_and_noisy_pictures_stay_within_the_bound(make_details, report) -> None:
    noise = ArrayImages(np.random.default_rng(0).integers(0, 256, (60, 160, 160, 3), dtype=np.uint8))
    content = report_page("run", report, make_details([f"{i} " + "&" * 250 for i in range(1000)], images=noise))
    assert len(content) < MAX_BYTES
    text = Page(content).text
    assert "The matrix shows the 50 of 1,000 classes with the most errors." in text
    assert "975 more classes" in text
    more = report_page("run", report, make_details([f"class {i}" for i in range(1500)]))
    assert "500 more classes are in evaluation.json." in Page(more).text

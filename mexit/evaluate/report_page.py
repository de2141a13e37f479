"""The evaluation report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mexit.core.budget import short_macs
from mexit.core.glossary import words_in
from mexit.core.printable import printable
from mexit.core.versions import VERSION
from mexit.evaluate.class_accuracy import ClassAccuracy
from mexit.evaluate.confusion import Confusion, confusions, thin
from mexit.evaluate.contact_sheet import Sheet, Tile, picture_file
from mexit.evaluate.details import Details
from mexit.evaluate.names import abbreviate
from mexit.evaluate.report_charts import matrix_table, reliability_chart
from mexit.evaluate.report_style import STYLE
from mexit.evaluate.reports import merged_budgets, reject_sentence

MAX_BYTES = 4 << 20  # of a page; the numbers below keep every page under it
_OPEN_CLASSES = 25  # classes that are listed without a click
_LISTED_CLASSES = 1000
_OPEN_PAIRS, _LISTED_PAIRS = 10, 50
_NAME = 60  # characters of a name
_SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report_page(title: str, report: Mapping[str, Any], details: Details, notes: Sequence[str] = ()) -> bytes:
    """The page.

    Args:
        title: name of the run or bundle.
        report: of `flows.evaluate`.
        details: of the same evaluation.
        notes: sentences about what is missing.

    Returns:
        UTF-8, at most `MAX_BYTES`.
    """
    sections = {
        "Accuracy and cost": _results(report),
        "Accuracy per class": _classes(details, _columns(report, details)),
        "Confusion": _confusion(details),
        **{sheet.title: _sheet(sheet, details.classes) for sheet in details.sheets},
        "Confidence": _confidence(details),
    }
    sections["Words"] = _words("".join((_lead(report, details), *sections, *sections.values())))
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items())
    body = "".join(
        f'<section aria-labelledby="{anchors[name]}"><h2 id="{anchors[name]}">{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    missing = "".join(f"<p>{_text(note)}</p>" for note in notes)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_SECURITY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}: evaluation</title><style>{STYLE}</style></head><body>"
        f"<header><h1><bdi>{_text(title)}</bdi></h1>{_lead(report, details)}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main>'
        f'<footer class="soft">{missing}<p>mexit {VERSION}. The test images selected nothing. All numbers are in '
        "evaluation.json beside this page.</p></footer></body></html>\n"
    )
    return page.encode()


def _lead(report: Mapping[str, Any], details: Details) -> str:
    settings, answers = report["settings"], details.answers
    n, correct, answered = len(answers), int(answers.correct.sum()), int(answers.answered.sum())
    facts = [
        (f"accuracy, {answers.name}", f"{_percent(correct / n)} %", f"{correct:,} of {n:,}"),
        ("test images", f"{settings['n']:,}", f"of {settings['of']:,}"),
        ("classes", f"{len(details.classes):,}", ""),
        ("wrong answers", f"{answered - correct:,}", ""),
    ]
    if answered < n:
        share = f"{_percent(correct / answered)} % of the answers are correct" if answered else ""
        facts.append(("no answer (unsure)", f"{n - answered:,}", share))
    items = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for name, value, note in facts
    )
    data = f"Data set <bdi>{_text(settings['data'])}</bdi>, split test."
    return f'<p class="soft">{data}</p><dl class="facts">{items}</dl>'


def _results(report: Mapping[str, Any]) -> str:
    """Accuracy of every exit, and accuracy and cost of every budget; under attack where there was one."""
    exits = report["exits"]
    conditions = [name for name in ("clean", "average", "worst") if name in exits[0]]
    titles = {"clean": "clean", "average": "average attack", "worst": "worst attack"}
    heads = [titles[name] for name in conditions]
    parts = []
    if report["budgets"]:
        rows = [
            [f"<bdi>{_text(names)}</bdi>", *(_with_error(row[one]) for one in conditions),
             short_macs(row["budget_macs"]), short_macs(row["clean"]["mean_macs"]), _shares(row["clean"]["exits"])]
            for names, row in merged_budgets(report)
        ]  # fmt: skip
        columns = ["budget", *heads, "MACs allowed", "mean MACs", "exits taken, %"]
        parts.append(_table(columns, rows))
    rows = [[f"exit {row['exit']}", *(_with_error(row[one]) for one in conditions)] for row in exits]
    parts.append(_table(["exit", *heads], rows))
    text = "Accuracy in percent, ± standard error. Each exit is measured as if it answered alone."
    rejected = reject_sentence(report)
    return f"<p>{text}</p>" + "".join(parts) + (f"<p>{_text(rejected)}</p>" if rejected else "")


def _words(content: str) -> str:
    """The glossary of the page."""
    items = "".join(f"<dt>{_text(word)}</dt><dd>{_text(meaning)}</dd>" for word, meaning in words_in(content).items())
    return f'<dl class="words">{items}</dl>'


def _columns(report: Mapping[str, Any], details: Details) -> dict[str, str]:
    """Titles of the further columns of the table of classes, and their names; budgets that share a policy are one."""
    if report["budgets"]:
        return {names: names.split(", ")[0] for names, _ in merged_budgets(report)}
    return {name: name for row in details.rows for name in row.columns}


def _classes(details: Details, others: Mapping[str, str]) -> str:
    """The classes, the worst first."""
    rows = sorted(details.rows, key=lambda row: (row.value is None, row.value, row.high))
    shown, rest = rows[:_OPEN_CLASSES], rows[_OPEN_CLASSES:_LISTED_CLASSES]
    counted = "groups of images" if details.answers.groups is not None else "images"
    text = (
        f"<p>Share of the images of a class that {_text(details.answers.name)} answers correctly, with a 95 % interval "
        f"that counts {counted}. The worst class comes first.</p>"
    )
    text += _class_table(shown, details, others)
    if rest:
        text += f"<details><summary>{len(rest)} more classes</summary>{_class_table(rest, details, others)}</details>"
    left = len(rows) - len(shown) - len(rest)
    return text + (f"<p>{left:,} more classes are in evaluation.json.</p>" if left else "")


def _class_table(rows: Sequence[ClassAccuracy], details: Details, others: Mapping[str, str]) -> str:
    grouped = details.answers.groups is not None
    lowest = min((row.low for row in details.rows if row.low is not None), default=0.0)
    left = min(0.9, math.floor(10 * lowest) / 10)  # where the bars begin: intervals near 1 are short
    columns = ["class", "accuracy, %", f"{100 * left:.0f} to 100 %", "95 % interval", "images"]
    columns += [*(["groups"] if grouped else []), *others]
    lines = []
    for row in rows:
        line = [f"<bdi>{_name(row.name)}</bdi>"]
        if row.value is None or row.low is None or row.high is None:
            line += ["-", "", "-"]
        else:
            ends = [(share - left) / (1 - left) for share in (row.value, row.low, row.high)]
            line += [_percent(row.value), _bar(*ends), f"{_percent(row.low)} to {_percent(row.high)}"]
        line += [f"{row.n:,}", *([f"{row.groups:,}"] if grouped else [])]
        line += [_percent(row.columns[other]) if other in row.columns else "-" for other in others.values()]
        error = row.answered
        line.append("" if error is None else f"<bdi>{_name(details.classes[error[0]])}</bdi>&nbsp;({error[1]:,})")
        lines.append(line)
    return _table([*columns, "most frequent error"], lines, left=(0, len(columns)))


def _bar(value: float, low: float, high: float) -> str:
    """A point and its interval as shares of the width of the bar."""
    return (
        f'<span class="bar" aria-hidden="true"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<b style="left:{100 * value:.1f}%"></b></span>'
    )


def _confusion(details: Details) -> str:
    thinned, pairs = thin(details.matrix), confusions(details.matrix, _LISTED_PAIRS)
    text = (
        "<p>Rows are true classes, columns are answers; cells count images. Blue is correct, red is wrong; a stronger "
        "colour is a larger share of the true class."
    )
    if not thinned.complete:
        text += f" The matrix shows the {len(thinned.classes)} of {thinned.of:,} classes with the most errors."
    text += "</p>"
    if not pairs:
        return f"{text}{matrix_table(thinned, details.classes)}<p>There is no wrong answer.</p>"
    errors = _pair_table(pairs[:_OPEN_PAIRS], details.classes)
    if pairs[_OPEN_PAIRS:]:
        rest = _pair_table(pairs[_OPEN_PAIRS:], details.classes)
        errors += f"<details><summary>{len(pairs) - _OPEN_PAIRS} more errors</summary>{rest}</details>"
    return (
        f'{text}<div class="beside"><div>{matrix_table(thinned, details.classes)}</div>'
        f"<div><h3>Most frequent errors</h3>{errors}</div></div>"
    )


def _pair_table(pairs: Sequence[Confusion], classes: Sequence[str]) -> str:
    rows = [
        [f"<bdi>{_name(classes[pair.true])}</bdi>", f"<bdi>{_name(classes[pair.predicted])}</bdi>", f"{pair.n:,}",
         _percent(pair.share)]
        for pair in pairs
    ]  # fmt: skip
    return _table(["true class", "answer", "images", "of the class, %"], rows, left=(0, 1))


def _sheet(sheet: Sheet, classes: Sequence[str]) -> str:
    if not sheet.tiles:
        return f"<p>None: there are no {_text(sheet.note)}.</p>"
    items = "".join(f"<li>{_tile(tile, classes)}</li>" for tile in sheet.tiles)
    return f'<p>The {len(sheet.tiles)} {_text(sheet.note)}.</p><ul class="tiles">{items}</ul>'


def _tile(tile: Tile, classes: Sequence[str]) -> str:
    content, kind = picture_file(tile.picture)
    small = ' class="small"' if kind == "image/png" else ""
    true = _name(classes[tile.true])
    answer = "no answer" if tile.predicted is None else _name(classes[tile.predicted])
    alt = f"{true}, answered {answer}, {_text(tile.file)}"
    width, height = tile.picture.size
    return (
        f'<figure><div class="frame"><img{small} alt="{alt}" width="{width}" height="{height}" loading="lazy" '
        f'src="data:{kind};base64,{base64.b64encode(content).decode()}"></div><figcaption>'
        f'<span>true: <bdi>{true}</bdi></span><span class="{"right" if tile.correct else "wrong"}">'
        f"{'&#10003;' if tile.correct else '&#10007;'} answer: <bdi>{answer}</bdi></span>"
        f"<span>{100 * tile.confidence:.1f} % at exit {tile.exit}</span>"
        f'<span class="file"><bdi>{_text(tile.file)}</bdi></span></figcaption></figure>'
    )


def _confidence(details: Details) -> str:
    text = (
        "<p>Of the answers with confidence 0.8, 80 % should be correct: points on the dotted line. ECE, the expected "
        "calibration error, is the mean distance from it. Larger points have more images.</p>"
        '<p><span class="key" style="background:var(--before)"></span>before temperature scaling &nbsp; '
        '<span class="key" style="background:rgb(var(--blue))"></span>after</p>'
    )
    charts = "".join(reliability_chart(row) for row in details.reliability)
    rows = [[f"exit {row['exit']}", f"{row['ece_before']:.3f}", f"{row['ece']:.3f}"] for row in details.reliability]
    table = _table(["exit", "ECE before", "ECE after"], rows)
    return f'{text}<div class="charts">{charts}</div>{table}'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table of HTML cells below columns with plain names, in a region that scrolls; the columns `left` hold text."""

    def cells(tag: str, line: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=name' if i in left else ''}{_scope(tag)}>{cell}</{tag}>" for i, cell in enumerate(line)
        )

    label = _text(", ".join(filter(None, columns)))
    head = cells("th", [_text(column) for column in columns])
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _scope(tag: str) -> str:
    return " scope=col" if tag == "th" else ""


def _shares(counts: Sequence[int]) -> str:
    total = max(1, sum(counts))
    return " / ".join(f"{100 * count / total:.0f}" for count in counts)


def _with_error(entry: Mapping[str, Any]) -> str:
    return f"{_percent(entry['value'])} ± {100 * entry['stderr']:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _name(name: str) -> str:
    return _text(abbreviate(name, _NAME))


def _text(text: str) -> str:
    return escape(printable(text))

"""Pictures for people. matplotlib only if it is there: without it a flow writes everything but the picture."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import write_bytes

CLEAN, ATTACKED = "#1f6fb4", "#c8442f"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy on the selection split over epochs; CMI and NCMI where a method logs them."""
    measured = "ncmi" in records[0]
    figure, (left, right, *more) = _figure(3 if measured else 2)
    _draw_losses(left, records, title)
    shades = {"clean": CLEAN, "attacked": ATTACKED}
    selection = [record["selection"] for record in records]
    _draw_exits(right, selection, {name: {"color": colour} for name, colour in shades.items()}, 100)
    right.set(xlabel="epoch", ylabel="accuracy, %", title="selection split")
    right.legend(fontsize=8, loc="best")
    if measured:
        styles = {"cmi": {"color": CLEAN}, "ncmi": {"color": CLEAN, "linestyle": ":"}}
        _draw_exits(more[0], records, styles)
        more[0].set(xlabel="epoch", ylabel="CMI in nats, NCMI", title="spread within classes", yscale="log")
        more[0].legend(fontsize=8, loc="lower right", ncols=2)
    _save(figure, path)


def _draw_losses(axis: Any, records: Sequence[dict[str, Any]], title: str) -> None:
    """The loss and its terms; a term may begin late, and may be negative."""
    names = dict.fromkeys(name for record in records for name in record if name.partition(" ")[0] == "loss")
    lines = {name: [record.get(name, math.nan) for record in records] for name in names}
    for name, values in lines.items():
        style = {"color": "black", "linewidth": 2} if name == "loss" else {"linewidth": 1}
        axis.plot(range(1, len(values) + 1), values, label=name.removeprefix("loss ") or name, **style)
    scale = "symlog" if any(value <= 0 for values in lines.values() for value in values) else "log"
    axis.set(xlabel="epoch", ylabel="training loss", title=title, yscale=scale)
    axis.legend(fontsize=8)


def _draw_exits(
    axis: Any, records: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, str]], factor: float = 1
) -> None:
    """One line an exit for every measure that the records have, the later the exit the darker."""
    for name, style in styles.items():
        if name not in records[0]:
            continue
        per_exit = list(zip(*(record[name] for record in records), strict=True))
        for k, values in enumerate(per_exit, start=1):
            alpha = 0.35 + 0.65 * k / len(per_exit)
            scaled = [factor * value for value in values]
            axis.plot(range(1, len(scaled) + 1), scaled, alpha=alpha, label=f"exit {k}, {name}", **style)


def accuracy_against_macs(
    lines: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, float], path: Path, title: str
) -> None:
    """Accuracy in percent against mean cost.

    Args:
        lines: "clean"/"attacked" and more, each (mean MACs, accuracy in [0, 1]).
        points: named budgets in MACs, drawn as vertical lines.
        path: the PNG.
        title: of the picture.
    """
    figure, (axis,) = _figure(1)
    _draw_accuracy(axis, lines, points, title)
    _save(figure, path)


def calibration(content: Mapping[str, Any], budgets: Mapping[str, float], path: Path, name: str) -> None:
    """Promises per budget, promised against seen, and reliability per exit; see `calibrate.calibration.report`."""
    figure, (left, middle, right) = _figure(3)
    rows = content["promised_against_seen"]
    lines = {}
    for line, key in (("clean, certification split", "held_out"), ("attacked, certification split", "attacked")):
        pairs = [(row[key]["mean_macs"], row[key]["accuracy"]) for row in rows if row[key]]
        if pairs and all(accuracy is not None for _, accuracy in pairs):
            lines[line] = pairs
    if lines:
        _draw_accuracy(left, lines, budgets, f"{name}: promised")
    else:
        left.set(title=f"{name}: accuracy unknown without labels")
    budget = [row["budget_macs"] / 1e6 for row in rows]
    middle.plot(budget, budget, color="grey", linewidth=0.8, label="budget")
    for key, label, colour in (("calibration", "calibration", "black"), ("held_out", "held out", CLEAN),
                               ("attacked", "attacked", ATTACKED)):  # fmt: skip
        if rows[0][key]:
            middle.plot(budget, [row[key]["mean_macs"] / 1e6 for row in rows], ".", color=colour, label=label)
    middle.set(
        xlabel="budget, million MACs", ylabel="mean cost, million MACs", title="cost: promised against seen"
    )
    middle.legend(fontsize=8)
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for place, row in enumerate(content["reliability"], start=1):
        alpha = 0.3 + 0.7 * place / len(content["reliability"])
        label = f"exit {row['exit']}: error {row['ece_before']:.3f} -> {row['ece']:.3f}"
        points = [(bin_["confidence"], bin_["accuracy"]) for bin_ in row["bins"]]
        right.plot(*zip(*points, strict=True), marker="o", color=CLEAN, alpha=alpha, label=label)
    right.set(xlabel="confidence", ylabel="accuracy", title="reliability, held out")
    if content["reliability"]:
        right.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def transfer(accuracy: Sequence[Sequence[float]], path: Path, title: str) -> None:
    """Accuracy in [0, 1], (E, E): rows are the exit that was attacked, columns the exit that answers."""
    figure, (axis,) = _figure(1)
    exits = range(len(accuracy))
    axis.grid(visible=False)
    image = axis.imshow([[100 * value for value in row] for row in accuracy], cmap="viridis", vmin=0, vmax=100)
    for row in exits:
        for column in exits:
            value = 100 * accuracy[row][column]
            shade = "black" if value > 60 else "white"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=shade, fontsize=9)
    names = [f"exit {k + 1}" for k in exits]
    axis.set_xticks(list(exits), names)
    axis.set_yticks(list(exits), names)
    axis.set(xlabel="answers", ylabel="was attacked", title=title)
    figure.colorbar(image, ax=axis, label="accuracy, %")
    _save(figure, path)


def accuracy_against_eps(rows: Sequence[Mapping[str, Any]], eps: float, path: Path, title: str) -> None:
    """Accuracy against the radius of the attack, for every exit and every budget.

    Args:
        rows: of a report's `curve`.
        eps: the radius that the network was made for, drawn as a vertical line.
        path: the PNG.
        title: of the picture.
    """
    named = rows[0]["budgets"]
    figure, axes = _figure(2 if named else 1)
    radii = [row["eps"] for row in rows]
    lines = [{f"exit {k}": [row["exits"][k - 1] for row in rows] for k in range(1, len(rows[0]["exits"]) + 1)}]
    lines.append({name: [row["budgets"][name] for row in rows] for name in named})
    subtitles = ("each exit attacked by itself", "each budget, worst of the attacks on exits")
    for axis, found, subtitle in zip(axes, lines, subtitles, strict=False):
        for place, (name, accuracies) in enumerate(found.items(), start=1):
            values, errors = ([100 * one[key] for one in accuracies] for key in ("value", "stderr"))
            alpha = 0.3 + 0.7 * place / len(found)
            axis.errorbar(radii, values, errors, color=ATTACKED, alpha=alpha, marker=".", capsize=2, label=name)
        axis.axvline(eps, color="grey", linewidth=0.8, linestyle="--")
        axis.set(xlabel="eps, share of the pixel range", ylabel="accuracy, %", title=f"{title}\n{subtitle}")
        axis.set_ylim(-2, 102)
        axis.legend(fontsize=8)
    _save(figure, path)


def _draw_accuracy(
    axis: Any, lines: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, float], title: str
) -> None:
    colours = {"clean": CLEAN, "attacked": ATTACKED}
    for name, pairs in lines.items():
        ordered = sorted(pairs)
        exits = name.endswith("single exits")
        axis.plot(
            [macs / 1e6 for macs, _ in ordered],
            [100 * accuracy for _, accuracy in ordered],
            marker="o" if exits else ".",
            linestyle=":" if exits else "-",
            color=colours.get(name.split(",")[0], "grey"),
            label=name,
        )
    for name, macs in points.items():
        axis.axvline(macs / 1e6, color="grey", linewidth=0.8, linestyle="--")
        axis.text(
            macs / 1e6, 1.01, name, transform=axis.get_xaxis_transform(), fontsize=8, ha="center", color="grey"
        )
    axis.set_ylim(top=min(axis.get_ylim()[1], 100.3))
    axis.set(xlabel="mean cost, million MACs", ylabel="accuracy, %")
    axis.set_title(title, pad=18)
    axis.legend(fontsize=8)


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels + 1, 4), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())

"""Pictures for people. matplotlib only if it is there: without it a flow writes everything but the picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mexit.core.files import write_bytes

CLEAN, ATTACKED = "#1f6fb4", "#c8442f"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy on the selection split over epochs."""
    figure, (left, right) = _figure(2)
    epochs = [record["epoch"] for record in records]
    for name in records[0]:
        if name == "loss" or name.startswith("loss "):
            style = {"color": "black", "linewidth": 2} if name == "loss" else {"linewidth": 1}
            left.plot(
                epochs, [record[name] for record in records], label=name.removeprefix("loss ") or name, **style
            )
    left.set(xlabel="epoch", ylabel="training loss", title=title, yscale="log")
    left.legend(fontsize=8)
    shades = {"clean": CLEAN, "attacked": ATTACKED}
    for condition, colour in shades.items():
        if condition not in records[0]["selection"]:
            continue
        per_exit = list(zip(*(record["selection"][condition] for record in records), strict=True))
        for k, values in enumerate(per_exit, start=1):
            alpha = 0.35 + 0.65 * k / len(per_exit)
            right.plot(
                epochs, [100 * v for v in values], color=colour, alpha=alpha, label=f"exit {k}, {condition}"
            )
    right.set(xlabel="epoch", ylabel="accuracy, %", title="selection split")
    right.legend(fontsize=8, loc="lower right")
    _save(figure, path)


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
    """Promises per budget, promised against seen, and reliability per exit; see `calibrate.report`."""
    figure, (left, middle, right) = _figure(3)
    rows = content["promised_against_seen"]
    lines = {}
    for line, key in (("clean, certification split", "held_out"), ("attacked, certification split", "attacked")):
        pairs = [(row[key]["mean_macs"], row[key]["accuracy"]) for row in rows if row[key]]
        if pairs and all(accuracy is not None for _, accuracy in pairs):
            lines[line] = pairs
    if lines:
        _draw_accuracy(left, lines, budgets, f"{name}: promised")
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
    right.legend(fontsize=8, loc="lower right")
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

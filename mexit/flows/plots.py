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
    colours = {"clean": CLEAN, "attacked": ATTACKED}
    for name, pairs in lines.items():
        ordered = sorted(pairs)
        colour = colours.get(name.split(",")[0], "grey")
        exits = name.endswith("single exits")
        axis.plot(
            [macs / 1e6 for macs, _ in ordered],
            [100 * accuracy for _, accuracy in ordered],
            marker="o" if exits else ".",
            linestyle=":" if exits else "-",
            color=colour,
            label=name,
        )
    low, high = axis.get_ylim()
    for name, macs in points.items():
        axis.axvline(macs / 1e6, color="grey", linewidth=0.8, linestyle="--")
        axis.annotate(name, (macs / 1e6, low + 0.02 * (high - low)), rotation=90, fontsize=8, ha="right")
    axis.set(xlabel="mean cost, million MACs", ylabel="accuracy, %", title=title)
    axis.legend(fontsize=8)
    _save(figure, path)


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

"""The pictures of training, calibration and evaluation, drawn with matplotlib if it is installed."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import write_bytes

CLEAN, ATTACKED = "#1f6fb4", "#c8442f"
Axes = Any  # matplotlib is optional, and its types with it
Figure = Any


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def training_curves(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss and selection accuracy over epochs, and CMI and NCMI where a method logs them, as a PNG."""
    with_cmi = [record for record in records if "ncmi" in record]
    figure, (left, right, *more) = new_figure(3 if with_cmi else 2)
    _draw_losses(left, records, title)
    colours = {"clean": CLEAN, "attacked": ATTACKED}
    selection = [{"epoch": record["epoch"], **record["selection"]} for record in records if "selection" in record]
    _draw_exits(right, selection, {name: {"color": colour} for name, colour in colours.items()}, 100)
    right.set(xlabel="epoch", ylabel="accuracy, %", title="selection split")
    if selection:  # a stopped run may have none yet
        right.legend(fontsize=8, loc="best")
    if with_cmi:
        styles = {"cmi": {"color": CLEAN}, "ncmi": {"color": CLEAN, "linestyle": ":"}}
        _draw_exits(more[0], with_cmi, styles)
        more[0].set(xlabel="epoch", ylabel="CMI in nats, NCMI", title="spread within classes", yscale="log")
        more[0].legend(fontsize=8, loc="lower right", ncols=2)
    save(figure, path)


def accuracy_against_macs(
    lines: Mapping[str, Sequence[tuple[float, float]]], budgets: Mapping[str, float], path: Path, title: str
) -> None:
    """Accuracy in percent against mean cost.

    Args:
        lines: label to points (mean MACs, accuracy in [0, 1]); the label begins with "clean" or "attacked".
        budgets: name to MACs, drawn as vertical lines.
        path, title: the PNG to write, and its title.
    """
    figure, (axes,) = new_figure(1)
    _draw_accuracy(axes, lines, budgets, title)
    save(figure, path)


def calibration(content: Mapping[str, Any], budgets: Mapping[str, float], path: Path, name: str) -> None:
    """Accuracy against cost, measured against promised cost, and reliability per exit.

    Args:
        content: the report of `calibrate.calibration.report`.
        budgets: name to MACs.
        path, name: the PNG to write, and the name of the bundle.
    """
    figure, (left, middle, right) = new_figure(3)
    rows = content["promised_against_seen"]
    lines = {}
    for label, key in (("clean, certification split", "held_out"), ("attacked, certification split", "attacked")):
        points = [(row[key]["mean_macs"], row[key]["accuracy"]) for row in rows if row[key]]
        if points and all(accuracy is not None for _, accuracy in points):
            lines[label] = points
    if lines:
        _draw_accuracy(left, lines, budgets, f"{name}: promised")
    else:
        left.set(title=f"{name}: accuracy unknown without labels")
    _draw_costs(middle, rows)
    _draw_reliability(right, content["reliability"])
    save(figure, path)


def transfer_matrix(accuracy: Sequence[Sequence[float]], numbers: Sequence[int], path: Path, title: str) -> None:
    """Accuracy if one exit is attacked and another answers.

    Args:
        accuracy: (E, E) in [0, 1]; row = the attacked exit, column = the answering exit.
        numbers: of the exits in the network, (E,).
        path, title: the PNG to write, and its title.
    """
    figure, (axes,) = new_figure(1)
    exits = range(len(accuracy))
    axes.grid(visible=False)
    image = axes.imshow([[100 * value for value in row] for row in accuracy], cmap="viridis", vmin=0, vmax=100)
    for row in exits:
        for column in exits:
            value = 100 * accuracy[row][column]
            colour = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
    names = [f"exit {k}" for k in numbers]
    axes.set_xticks(list(exits), names)
    axes.set_yticks(list(exits), names)
    axes.set(xlabel="answers", ylabel="was attacked", title=title)
    figure.colorbar(image, ax=axes, label="accuracy, %")
    save(figure, path)


def accuracy_against_eps(
    rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], eps: float, path: Path, title: str
) -> None:
    """Accuracy against the radius of the attack, for every exit and every budget.

    Args:
        rows: the `curve` of a report.
        numbers: of the exits in the network, (E,).
        eps: radius of the training attack, drawn as a vertical line.
        path, title: the PNG to write, and its title.
    """
    budgets = rows[0]["budgets"]
    figure, panels = new_figure(2 if budgets else 1)
    radii = [row["eps"] for row in rows]
    lines = [{f"exit {number}": [row["exits"][k] for row in rows] for k, number in enumerate(numbers)}]
    lines.append({name: [row["budgets"][name] for row in rows] for name in budgets})
    subtitles = ("each exit attacked by itself", "each budget, worst of the attacks on exits")
    for axes, panel_lines, subtitle in zip(panels, lines, subtitles, strict=False):
        for k, (name, accuracies) in enumerate(panel_lines.items(), start=1):
            values, errors = ([100 * entry[key] for entry in accuracies] for key in ("value", "stderr"))
            alpha = 0.3 + 0.7 * k / len(panel_lines)
            axes.errorbar(radii, values, errors, color=ATTACKED, alpha=alpha, marker=".", capsize=2, label=name)
        axes.axvline(eps, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel="eps, share of the pixel range", ylabel="accuracy, %", title=f"{title}\n{subtitle}")
        axes.set_ylim(-2, 102)
        axes.legend(fontsize=8)
    save(figure, path)


def corruptions(
    content: Mapping[str, Any], numbers: Sequence[int], budgets: Mapping[str, float], path: Path, title: str
) -> None:
    """Accuracy under each corruption; accuracy, and the cost of budgets, against the severity.

    Args:
        content: the `corruptions` of a report.
        numbers: of the exits in the network, (E,).
        budgets: name to MACs; empty for a run, whose exits are drawn instead.
        path, title: the PNG to write, and its title.
    """
    clean, rows = content["clean"], content["per_corruption"]
    names = list(budgets) or [f"exit {k}" for k in numbers]
    kind = "budgets" if budgets else "exits"

    def entries(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [row[kind][name] for name in names] if budgets else list(row[kind])

    figure, (left, middle, *right) = new_figure(3 if budgets else 2)
    severities = sorted({row["severity"] for row in content["conditions"]})
    for k, name in enumerate(names):
        style = {"color": ATTACKED, "alpha": 0.3 + 0.7 * (k + 1) / len(names), "marker": ".", "label": name}
        labels = ["clean", *(row["corruption"].replace("_", " ") for row in rows)]
        left.plot(labels, [100 * entries(row)[k]["value"] for row in (clean, *rows)], linestyle=":", **style)
        by_severity = [[entries(clean)[k]]]
        by_severity += [[entries(row)[k] for row in content["conditions"] if row["severity"] == s] for s in severities]
        middle.plot([0, *severities], [100 * _mean(group, "value") for group in by_severity], **style)
        if budgets:
            right[0].plot([0, *severities], [_mean(group, "mean_macs") / 1e6 for group in by_severity], **style)
            right[0].axhline(budgets[name] / 1e6, color="grey", linewidth=0.8, linestyle="--")
    left.tick_params(axis="x", rotation=90, labelsize=8)
    left.set(ylabel="accuracy, %", title=f"{title}\nmean over severities")
    middle.set(xlabel="severity (0: clean)", ylabel="accuracy, %", title="mean over corruptions")
    middle.legend(fontsize=8)
    if budgets:
        right[0].set(xlabel="severity (0: clean)", ylabel="mean cost, million MACs", title="cost; dashed: budgets")
    save(figure, path)


def _mean(entries: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(entry[key]) for entry in entries) / len(entries)


def _draw_losses(axes: Axes, records: Sequence[dict[str, Any]], title: str) -> None:
    """The loss and its terms. A term may begin at a later epoch, and may be negative."""
    names = dict.fromkeys(name for record in records for name in record if name.partition(" ")[0] == "loss")
    lines = {name: [record.get(name, math.nan) for record in records] for name in names}
    for name, values in lines.items():
        style = {"color": "black", "linewidth": 2} if name == "loss" else {"linewidth": 1}
        axes.plot([record["epoch"] for record in records], values, label=name.removeprefix("loss ") or name, **style)
    scale = "symlog" if any(value <= 0 for values in lines.values() for value in values) else "log"
    axes.set(xlabel="epoch", ylabel="training loss", title=title, yscale=scale)
    if lines:  # the heads of a frozen network have none
        axes.legend(fontsize=8)


def _draw_exits(
    axes: Axes, records: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, str]], factor: float = 1
) -> None:
    """One line per exit for every measure in the records; later exits are darker."""
    for name, style in styles.items():
        if not records or name not in records[0]:
            continue
        per_exit = list(zip(*(record[name] for record in records), strict=True))
        for k, values in enumerate(per_exit, start=1):
            alpha = 0.35 + 0.65 * k / len(per_exit)
            scaled = [factor * value for value in values]
            axes.plot([record["epoch"] for record in records], scaled, alpha=alpha, label=f"exit {k}, {name}", **style)


def _draw_accuracy(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], budgets: Mapping[str, float], title: str
) -> None:
    colours = {"clean": CLEAN, "attacked": ATTACKED}
    for label, points in lines.items():
        ordered = sorted(points)
        exits = label.endswith("single exits")
        axes.plot(
            [macs / 1e6 for macs, _ in ordered],
            [100 * accuracy for _, accuracy in ordered],
            marker="o" if exits else ".",
            linestyle=":" if exits else "-",
            color=colours.get(label.split(",")[0], "grey"),
            label=label,
        )
    for name, macs in budgets.items():
        axes.axvline(macs / 1e6, color="grey", linewidth=0.8, linestyle="--")
        axes.text(macs / 1e6, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=8, ha="center", color="grey")
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.3))
    axes.set(xlabel="mean cost, million MACs", ylabel="accuracy, %")
    axes.set_title(title, pad=18)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # below: lines may lie anywhere


def _draw_costs(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    budgets = [row["budget_macs"] / 1e6 for row in rows]
    axes.plot(budgets, budgets, color="grey", linewidth=0.8, label="budget")
    for key, label, colour in (("calibration", "calibration", "black"), ("held_out", "held out", CLEAN),
                               ("attacked", "attacked", ATTACKED)):  # fmt: skip
        if rows[0][key]:
            axes.plot(budgets, [row[key]["mean_macs"] / 1e6 for row in rows], ".", color=colour, label=label)
    axes.set(xlabel="budget, million MACs", ylabel="mean cost, million MACs", title="cost: promised and measured")
    axes.legend(fontsize=8)


def _draw_reliability(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for k, row in enumerate(rows, start=1):
        alpha = 0.3 + 0.7 * k / len(rows)
        label = f"exit {row['exit']}: error {row['ece_before']:.3f} -> {row['ece']:.3f}"
        points = [(bin_["confidence"], bin_["accuracy"]) for bin_ in row["bins"]]
        axes.plot(*zip(*points, strict=True), marker="o", color=CLEAN, alpha=alpha, label=label)
    axes.set(xlabel="confidence", ylabel="accuracy", title="reliability, held out")
    if rows:
        axes.legend(fontsize=8, loc="center left")  # answers of low confidence are rare


def new_figure(panels: int, rows: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `panels` axes in `rows` rows; `size` is its width and height in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = -(-panels // rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size or (5.2 * columns + 1, 4 * rows), squeeze=False)
    for panel in axes.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[panels:]:
        panel.remove()
    return figure, list(axes.flat[:panels])


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())

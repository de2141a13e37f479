"""The model card: what the network is, what it was trained on, what was measured, and its known limitations.

Markdown for `reports/model_card.md`, after M. Mitchell et al.: Model cards for model reporting, FAT* 2019. All content
comes from the stored settings and the report.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mexit.calibrate.expected import load as load_expected
from mexit.core.budget import format_macs
from mexit.core.glossary import words_in
from mexit.core.pixel_range import format_fraction
from mexit.core.printable import shell_path
from mexit.core.versions import VERSION
from mexit.evaluate.config import GROUPS
from mexit.evaluate.reports import merged_budgets, reject_sentence
from mexit.evaluate.target import EvaluationTarget
from mexit.train.config import TrainSettings, resolve
from mexit.train.option_names import option_name

# Settings whose flag has another name, or that have no flag.
_NO_FLAG = {"data", "preset", "options", "teachers", "craft_train_mode", "changes"}  # written otherwise, or results
# Settings of the attacks, which a run on clean images does not use.
_OF_ATTACKS = {
    "eps", "step", "steps", "test_steps", "selection_steps", "norm", "rule", "restarts", "loss", "craft_train_mode",
    "short_attack_until", "average_attack_until",
}  # fmt: skip


def model_card(
    target: EvaluationTarget, report: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The model card in Markdown.

    Args:
        target: what was evaluated.
        report: of `flows.evaluate`.
        others: file name to an earlier report of other attacks on the same weights.
    """
    sections = [
        f"# {target.path.name}\n\n{_summary(target, report)}",
        "## Network\n\n" + _network(target),
        "## Data\n\n" + _data(target, report["settings"]),
        "## Training\n\n" + _training(target),
        "## Results\n\n" + _results(report),
        *_others(report, others or {}),
        *_expected(target),
        "## Flags\n\n" + _flags(report),
        "## Limitations\n\n" + _limitations(target, report),
        "## Reproduction\n\n" + _commands(target, report["settings"]),
    ]
    sections.append("## Words\n\n" + _words("\n".join(sections)))
    return "\n\n".join(sections) + "\n"


def _words(text: str) -> str:
    lines = [f"- **{word}**: {meaning}." for word, meaning in words_in(text).items()]
    return "\n".join([*lines, '\nThe documentation explains more words: `docs/concepts.md`, "Glossary".'])


def _summary(target: EvaluationTarget, report: Mapping[str, Any]) -> str:
    settings, last = target.source.settings, report["exits"][-1]
    training = "with its backbone frozen" if settings.heads_only else f"with `{settings.method}`"
    worst = f", and {_percent(last['worst'])} in the worst case of all attacks below" if "worst" in last else ""
    return (
        f"A `{settings.model}` network with {len(report['exits'])} exits for the {len(target.data.classes)} classes "
        f"of `{target.data.name}`, trained {training}. The last exit classifies "
        f"{_percent(last['clean'])} of the clean test images correctly{worst}."
    )


def _network(target: EvaluationTarget) -> str:
    shape = " x ".join(str(side) for side in target.source.model.input_shape)
    full = target.cumulative_macs[-1]
    rows = [
        [str(k), format_macs(macs), f"{100 * macs / full:.0f}%", f"{parameters:,}"]
        for k, macs, parameters in zip(target.numbers, target.cumulative_macs, target.parameters, strict=True)
    ]
    columns = ["exit", "cost", "of full", "parameters"]
    text = f"Input {shape}, pixels in [0, 1]. The cost of an exit includes the heads before it."
    return text + "\n\n" + _table(columns, rows)


def _data(target: EvaluationTarget, settings: Mapping[str, Any]) -> str:
    splits, columns = target.splits, ["split", "images"]
    rows = [[name, str(len(part))] for name, part in splits.parts.items()]
    grouping = f" Groups: {splits.grouping}." if splits.grouping else ""
    if splits.groups is not None:
        columns = [*columns, "groups"]
        rows = [[name, n, str(len(np.unique(splits.groups[splits.part(name)])))] for name, n in rows]
    parts = _table(columns, rows)
    return (
        f"`{target.data.name}`, sha256 `{settings['data_sha256'][:16]}`. Nothing was chosen on the test split: "
        "weights come from train, checkpoints from selection, thresholds from calibration, guarantees from "
        f"certification.{grouping}\n\n{parts}"
    )


def _training(target: EvaluationTarget) -> str:
    used = used_settings(target.source.settings)
    rows = [[name, f"`{_flag_value(value)}`".replace("|", "\\|")] for name, value in used.items()]
    return _table(["setting", "value"], rows)


def used_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that the weights of a run depend on, without those that are off or had no effect."""
    unused = set(_OF_ATTACKS) if settings.attack == "none" else set()
    if settings.minutes:
        unused.add("epochs")
    if settings.lr_schedule != "steps":
        unused |= {"decay_at", "decay_factor"}
    values = settings.to_json().items()
    return {name: value for name, value in values if name == "seed" or (value and name not in unused)}


def _results(report: Mapping[str, Any]) -> str:
    settings, exits = report["settings"], report["exits"]
    text = f"{settings['n']} of {settings['of']} test images, accuracy in percent ± standard error."
    if "worst" in exits[0]:
        strong = f"; the stronger attacks ran on {settings['strong_n']} images." if settings["strong_n"] else "."
        text += (
            f" Attack: {settings['attack']}, crafted on {settings['device']}. In the worst case an image counts as "
            f"correct only if every attack failed on it{strong}"
        )
    lines = [text]
    names = [name for name in exits[0] if name != "exit"]
    names += [name for row in exits for name in row if name not in (*names, "exit")]
    rows = [[str(row["exit"]), *(_cell(row.get(name)) for name in names)] for row in exits]
    lines.append(_table(["exit", *names], rows))
    if report["budgets"]:
        lines.append(_budgets(report))
    if report["corruptions"]:
        lines.append(_corruptions(report["corruptions"], [row["exit"] for row in exits]))
    return "\n\n".join(lines)


def _others(report: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The section with the results of earlier evaluations with other attacks, or none."""
    parts = ["## Earlier results with other attacks"]
    for name, other in others.items():
        same = other["settings"].get("policies_sha256") == report["settings"]["policies_sha256"]
        shown = other if same else {**other, "budgets": {}}  # thresholds that are no longer in use
        parts.append(f"`{name}`: {_results(shown)}")
    return ["\n\n".join(parts)] if others else []


def _budgets(report: Mapping[str, Any]) -> str:
    """One row for each policy and condition, with its cost."""
    rows = []
    for name, row in merged_budgets(report):
        for condition, entry in row.items():
            if condition == "budget_macs":
                continue
            macs = format_macs(entry["mean_macs"]) if "mean_macs" in entry else ""
            exits = " / ".join(map(str, entry["exits"])) if "exits" in entry else ""
            efficacy = f"{entry['efficacy']:.2f}" if "efficacy" in entry else ""
            limit = format_macs(row["budget_macs"])
            rows.append([f"{name} ({limit})", condition, _cell(entry), macs, exits, efficacy])
    columns = ["budget", "images", "accuracy", "mean cost", "exits taken", "efficacy"]
    text = "Efficacy is 1 if all images leave at once; a slowdown attack moves it towards 0."
    return "\n\n".join(filter(None, (_table(columns, rows), text, reject_sentence(report))))


def _corruptions(corruptions: Mapping[str, Any], numbers: Sequence[int]) -> str:
    """Accuracy of every exit and budget under each corruption, mean over severities."""
    first = corruptions["clean"]
    columns = ["corruption", *(f"exit {k}" for k in numbers), *first["budgets"]]
    named = [("clean", first), *((row["corruption"], row) for row in corruptions["per_corruption"])]
    named.append(("mean of corruptions", corruptions["mean"]))
    rows = [[name, *map(_cell, (*row["exits"], *row["budgets"].values()))] for name, row in named]
    text = (
        "Common corruptions of D. Hendrycks and T. Dietterich (2019) on the same images, mean over 5 severities. They "
        "are no attack and do not count in the worst case."
    )
    return text + "\n\n" + _table(columns, rows)


def _expected(target: EvaluationTarget) -> list[str]:
    """The section on expected and test results of a calibrated bundle, or none."""
    if target.runtime is None or target.entry is None:
        return []
    table = load_expected(target.path, target.runtime.bundle.id, target.entry)
    if table is None:
        return []
    rows = []
    for row in table["budgets"]:
        accuracy, cost = row["accuracy"] or {}, row["cost"]
        difference = accuracy.get("difference")
        cells = ["" if accuracy.get(part) is None else _cell(accuracy[part]) for part in ("expected", "test")]
        cells.append("" if difference is None else f"{100 * difference:+.1f} ± {_points(accuracy['half_width'])}")
        cells += ["" if cost[part] is None else format_macs(cost[part]["value"]) for part in ("expected", "test")]
        rows.append([", ".join(row["names"]), *cells])
    columns = ["budget", "expected accuracy", "test accuracy", "difference", "expected cost", "test cost"]
    test = f"{table['test']['n']} images of the test split" if table["test"] else f"no test results: {table['missing']}"
    text = (
        f"Measured by the calibration: what the {table['certification']['n']} images of the certification split let "
        f"expect, and {test}. Accuracy in percent ± standard error; difference in points with the half-width of its "
        f"{table['confidence']:.0%} interval."
    )
    lines = [f"- {sentence}." for sentence in table["warnings"]]
    return ["## Expected and test results\n\n" + "\n\n".join([text, _table(columns, rows), *lines])]


def _flags(report: Mapping[str, Any]) -> str:
    checks = report["checks"]
    if not checks:
        return "None: without attacks there is nothing to check."
    if not report["flags"]:
        return f"None: {len(checks)} checks of the evaluation itself passed."
    failed = "\n".join(f"- {flag}" for flag in report["flags"])
    count = f"{len(report['flags'])} of {len(checks)} checks of the evaluation itself failed"
    return f"{count}: accuracies under attack may be too high.\n\n{failed}"


def _limitations(target: EvaluationTarget, report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    size = f"at most {settings['eps']:.4g} of the pixel range in every pixel"
    if target.source.settings.norm == "l2":
        size = f"an L2 norm of at most {settings['eps']:.4g} in units of the pixel range"
    attacked = (
        "Accuracy under attack is measured, not proved: other attacks may succeed more often. It holds for changes of "
        f"{size}, and for no other kind of change."
    )
    lines = [
        attacked if "pgd" in settings["attacks"] else "Nothing was measured under attack.",
        "On data unlike the calibration data neither accuracy nor mean cost is known.",
        "A budget bounds the mean cost on data like the calibration data. Under attack the mean rises; the hard bound "
        "is the rate limiter's, at the price of accuracy.",
        "One training run, one seed.",
    ]
    missing = [name for name in GROUPS if name not in settings["attacks"]]
    if missing:
        lines.append(f"Not run: {', '.join(missing)} (mexit evaluate {shell_path(target.path)} --attacks all).")
    if not target.budgets:
        lines.append("No thresholds were attacked: the results are those of single exits.")
    return "\n".join(f"- {line}" for line in lines)


def _commands(target: EvaluationTarget, report_settings: Mapping[str, Any]) -> str:
    lines = [train_command(target.source.settings)]
    commit = ""
    if target.runtime is not None:
        provenance = target.runtime.bundle.manifest.provenance
        lines.append(f"mexit export {shell_path(str(provenance.get('run')))}")
        commit = f" at commit {str(provenance.get('commit'))[:12]}"
    lines.append(f"mexit evaluate {shell_path(target.path)} " + " ".join(_evaluate_flags(target, report_settings)))
    return "```\n" + "\n".join(lines) + f"\n```\n\nmexit {VERSION}{commit}."


def _evaluate_flags(target: EvaluationTarget, settings: Mapping[str, Any]) -> list[str]:
    flags = [f"--samples {settings['n']}", f"--attacks {','.join(settings['attacks']) or 'clean'}"]
    if "pgd" in settings["attacks"]:
        flags += [f"--eps {format_fraction(settings['eps'])}", f"--steps {settings['steps']}"]
    if settings["strong_n"]:
        flags += [f"--strong-samples {settings['strong_n']}", f"--targets {settings['targets']}"]
        flags += [f"--queries {settings['queries']}", f"--exits {settings['exits']}"]
    if settings["budgets_named"]:
        flags.append(f"--budgets {','.join(settings['budgets'])}")
    if target.runtime is not None:
        flags.append(f"--backend {target.engine}")
    flags += [f"--device {target.source.device.type}", f"--batch {target.batch}"]
    if settings["restarts"] > 1:
        flags.append(f"--restarts {settings['restarts']}")
    if settings["transfer_from"]:
        flags.append(f"--transfer {shell_path(settings['transfer_from'])}")
    return flags


def train_command(settings: TrainSettings) -> str:
    """The training command, with every flag whose value differs from the preset's."""
    given: dict[str, Any] = {} if settings.heads_only else {"method": settings.method}
    if settings.freeze:
        length = {"finetune": settings.finetune, "minutes": settings.minutes}
        given |= {"freeze": True} | {name: value for name, value in length.items() if value}
    preset, values = resolve(settings.data, settings.preset, given).to_json(), settings.to_json()
    words = [f"mexit train --data {shell_path(settings.data)} --preset {settings.preset}"]
    words += [_flag(name, value) for name, value in given.items()]
    without = _NO_FLAG | ({"exit_weights"} if settings.heads_only else set())  # those of a later joint training
    words += [
        _flag(name, value)
        for name, value in values.items()
        if name not in without and option_name(name).startswith("--") and value != preset[name]
    ]
    if settings.craft_train_mode != preset["craft_train_mode"]:
        words.append("--craft-train-mode" if settings.craft_train_mode else "--craft-eval-mode")
    if not settings.heads_only:
        words += [f"--set {name}={_flag_value(value)}" for name, value in values["options"].items()]
    words += [f"--teacher {shell_path(run)}" for run in settings.teachers]
    return " ".join(words)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['value']:.1f}%"


def _points(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f}"


def _cell(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None else f"{100 * entry['value']:.1f} ± {_points(entry['stderr'])}"


def _flag(name: str, value: Any) -> str:
    """A setting as a flag of `mexit train`."""
    flag = name.replace("_", "-")
    if name in ("eps", "step"):
        return f"--{flag} {format_fraction(value)}"
    if name == "size":
        return f"--{flag} {'x'.join(map(str, value))}"
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(_flag_value(value))}"


def _flag_value(value: Any) -> str:
    """A value as it is typed after a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_flag_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(_flag_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

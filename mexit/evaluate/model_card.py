"""The model card: what the network is, what it was trained on, what was measured, and what nobody promises.

Markdown in `reports/model_card.md`, after M. Mitchell et al.: Model cards for model reporting, FAT* 2019.
Everything in it comes from the stored settings and the report; nothing is typed in by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mexit.core.budget import format_macs
from mexit.core.versions import VERSION
from mexit.evaluate.target import EvaluationTarget

# Settings that have another flag than their name, or none.
_NO_FLAG = {"data", "preset", "options", "teachers", "test_steps", "momentum", "weight_decay", "decay_at",
            "decay_factor", "craft_train_mode"}  # fmt: skip


def model_card(subject: EvaluationTarget, report: Mapping[str, Any]) -> str:
    """The whole card.

    Args:
        subject: what was evaluated.
        report: of `flows.evaluate`.
    """
    sections = [
        f"# {subject.path.name}\n\n{_summary(subject, report)}",
        "## Network\n\n" + _network(subject),
        "## Data\n\n" + _data(subject, report["settings"]),
        "## Training\n\n" + _training(subject),
        "## Results\n\n" + _results(report),
        "## Flags\n\n" + _flags(report),
        "## What is not promised\n\n" + _limits(subject, report),
        "## Made with\n\n" + _commands(subject, report["settings"]),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(subject: EvaluationTarget, report: Mapping[str, Any]) -> str:
    settings, last = subject.network.settings, report["exits"][-1]
    return (
        f"A `{settings.model}` network with {len(report['exits'])} exits that tells "
        f"{len(subject.data.classes)} classes of `{subject.data.name}` apart, trained with `{settings.method}`. "
        f"The last exit is right on {_share(last['clean'])} of clean test images, and on {_share(last['worst'])} "
        "under the worst case of all attacks below."
    )


def _network(subject: EvaluationTarget) -> str:
    shape = " x ".join(str(side) for side in subject.network.model.input_shape)
    full = subject.cumulative_macs[-1]
    rows = [
        [str(k), format_macs(macs), f"{100 * macs / full:.0f}%", f"{parameters:,}"]
        for k, (macs, parameters) in enumerate(zip(subject.cumulative_macs, subject.parameters, strict=True), 1)
    ]
    columns = ["exit", "cost", "of full", "parameters"]
    text = f"Input {shape}, pixels in [0, 1]. The cost of an exit includes the heads before it."
    return text + "\n\n" + _table(columns, rows)


def _data(subject: EvaluationTarget, settings: Mapping[str, Any]) -> str:
    parts = _table(["split", "images"], [[name, str(len(part))] for name, part in subject.splits.parts.items()])
    return (
        f"`{subject.data.name}`, sha256 `{settings['data_sha256'][:16]}`. Nothing was chosen on the test split: "
        "weights come from train, checkpoints from selection, thresholds from calibration, promises from "
        f"certification.\n\n{parts}"
    )


def _training(subject: EvaluationTarget) -> str:
    values = subject.network.settings.to_json()
    used = {name: value for name, value in values.items() if value or name == "seed"}
    rows = [[name, f"`{_plain(value)}`"] for name, value in used.items()]
    return _table(["setting", "value"], rows)


def _results(report: Mapping[str, Any]) -> str:
    settings, exits = report["settings"], report["exits"]
    strong = f"; the stronger attacks saw {settings['strong_n']} images." if settings["strong_n"] else "."
    lines = [
        f"{settings['n']} of {settings['of']} test images, accuracy in percent ± standard error. Attack: "
        f"{settings['attack']}. The worst case counts an image as right only if every attack failed on it{strong}"
    ]
    names = [name for name in exits[0] if name != "exit"]
    names += [name for row in exits for name in row if name not in (*names, "exit")]
    rows = [[str(row["exit"]), *(_cell(row.get(name)) for name in names)] for row in exits]
    lines.append(_table(["exit", *names], rows))
    if report["budgets"]:
        lines.append(_budgets(report["budgets"]))
    return "\n\n".join(lines)


def _budgets(budgets: Mapping[str, Any]) -> str:
    """One row for each budget and condition, with what it costs."""
    rows = []
    for name, row in budgets.items():
        for condition, found in row.items():
            if condition == "budget_macs":
                continue
            macs = format_macs(found["mean_macs"]) if "mean_macs" in found else ""
            exits = " / ".join(map(str, found["exits"])) if "exits" in found else ""
            efficacy = f"{found['efficacy']:.2f}" if "efficacy" in found else ""
            promise = format_macs(row["budget_macs"])
            rows.append([f"{name} ({promise})", condition, _cell(found), macs, exits, efficacy])
    columns = ["budget", "images", "accuracy", "mean cost", "exits taken", "efficacy"]
    text = "Efficacy is 1 if all leave at once; a slowdown attack pushes it towards 0."
    return _table(columns, rows) + "\n\n" + text


def _flags(report: Mapping[str, Any]) -> str:
    checks = report["checks"]
    if not report["flags"]:
        return f"None: {len(checks)} checks of the evaluation itself passed."
    failed = "\n".join(f"- {flag}" for flag in report["flags"])
    count = f"{len(report['flags'])} of {len(checks)} checks of the evaluation itself failed"
    return f"{count}: accuracies under attack may be too high.\n\n{failed}"


def _limits(subject: EvaluationTarget, report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        "Accuracy under attack is measured, not proved: other attacks may find more. It holds for changes of at "
        f"most {settings['eps']:.4g} of the pixel range in every pixel, and for no other kind of change.",
        "Data unlike the calibration data: neither accuracy nor mean cost carries over.",
        "A budget bounds the mean cost on data like the calibration data. Under attack the mean rises; the hard "
        "bound is the rate limiter's, at the price of accuracy.",
        "One training run, one seed.",
    ]
    missing = [name for name in ("policy", "autoattack", "slowdown", "sanity") if name not in settings["attacks"]]
    if missing:
        lines.append(f"Not run: {', '.join(missing)} (mexit evaluate {subject.path} --attacks all).")
    if not subject.budgets:
        lines.append("No thresholds were attacked: these are the exits one by one.")
    return "\n".join(f"- {line}" for line in lines)


def _commands(subject: EvaluationTarget, found: Mapping[str, Any]) -> str:
    settings = subject.network.settings
    lines = [_train_command(settings)]
    if subject.runtime is not None:
        run = subject.runtime.bundle.manifest.provenance.get("run")
        lines.append(f"mexit export {run}")
    flags = [f"--samples {found['n']}", f"--eps {found['eps']:.6g}", f"--steps {found['steps']}"]
    flags.append(f"--attacks {','.join(found['attacks'])}")
    if found["strong_n"]:
        flags += [f"--strong-samples {found['strong_n']}", f"--targets {found['targets']}"]
        flags += [f"--queries {found['queries']}", f"--exits {found['exits']}"]
    if found["restarts"] > 1:
        flags.append(f"--restarts {found['restarts']}")
    if found["transfer_from"]:
        flags.append(f"--transfer {found['transfer_from']}")
    lines.append(f"mexit evaluate {subject.path} " + " ".join(flags))
    commit = ""
    if subject.runtime is not None:
        commit = f" at commit {str(subject.runtime.bundle.manifest.provenance.get('commit'))[:12]}"
    return "```\n" + "\n".join(lines) + f"\n```\n\nmexit {VERSION}{commit}."


def _train_command(settings: Any) -> str:
    """With every flag that differs from what the preset gives."""
    from mexit.train.config import resolve

    given = {"method": settings.method, "model": settings.model}
    plain, found = resolve(settings.data, settings.preset, given).to_json(), settings.to_json()
    words = [f"mexit train --data {settings.data} --preset {settings.preset} --method {settings.method}"]
    words += [
        f"--{name.replace('_', '-')} {_plain(value)}"
        for name, value in found.items()
        if name not in _NO_FLAG and value != plain[name]
    ]
    if settings.craft_train_mode != plain["craft_train_mode"]:
        words.append("--craft-train-mode")
    words += [f"--set {name}={_plain(value)}" for name, value in found["options"].items()]
    words += [f"--teacher {run}" for run in settings.teachers]
    return " ".join(words)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:.1f}%"


def _cell(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{100 * found['value']:.1f} ± {100 * found['stderr']:.1f}"


def _plain(value: Any) -> str:
    """As it is typed after a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(_plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

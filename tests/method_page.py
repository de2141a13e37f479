"""docs/methods.md, generated from the classes of the methods: inputs, attack and options of each."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from typing import Any

from mexit.train.methods import METHODS


def method_page() -> str:
    """The content of docs/methods.md."""
    head = [
        "# Methods",
        "Written by `python tests/test_docs.py` from the code. `mexit train --method NAME --set OPTION=VALUE`.",
        "The default attack is used without `--attack` (in the `demo` preset of digits: average). Methods marked "
        "optional train on clean images by default. Every method composes with `--trades`, `--awp`, `--ema`, "
        "`--label-smoothing` and `--craft-train-mode`. Each section says which settings are published and which are "
        "our choices.",
        _overview(),
    ]
    return "\n\n".join([*head, *(_section(name, kind) for name, kind in METHODS.items())]) + "\n"


def _overview() -> str:
    lines = ["| method | trains on | default attack | takes `--teacher` |", "| --- | --- | --- | --- |"]
    for name, kind in METHODS.items():
        attack = kind.default_attack + (" (optional)" if kind.attack_use == "optional" else "")
        teacher = "yes" if kind.uses_teachers else "no"
        lines.append(f"| [`{name}`](#{name}) | {kind.inputs} | {attack} | {teacher} |")
    return "\n".join(lines)


def _section(name: str, kind: type[Any]) -> str:
    about = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    parts = [f"## {name}", about]
    described = _attributes(inspect.getdoc(kind) or "")
    options = [field for field in dataclasses.fields(kind) if field.init]
    if options:
        rows = [f"| `{field.name}` | {_default(field)} | {described.get(field.name, '')} |" for field in options]
        parts.append("\n".join(["| option | default | |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    return f"`{field.default}`"


def _attributes(docstring: str) -> dict[str, str]:
    """Descriptions in the "Attributes:" section by name; `a, b: text` describes both."""
    section = re.search(r"^Attributes:\n((?:    .*\n?)+)", docstring, re.M)
    descriptions: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section else []:
        start = re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            descriptions |= dict.fromkeys(names, start[2])
        else:
            descriptions |= {name: f"{descriptions[name]} {line.strip()}" for name in names}
    return {name: text.replace("|", "\\|") for name, text in descriptions.items()}

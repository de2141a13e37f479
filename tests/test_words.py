"""The prose rule and the names of CONTRIBUTING.md, as far as a program can check them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mexit

ROOT = Path(__file__).parents[1]
PACKAGE = Path(mexit.__file__).parent
TEXTS = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
# Rows, threads and tensors are not persons; and a sentence names its thing.
AVOIDED = re.compile(
    r"\b(nobody|whoever|everybody|strangers?|at hand|of late|so many|who asks|says of itself|told of)\b",
    re.IGNORECASE,
)
# Names of version 0.1.0 that the field's own terms have replaced; no class, function or module may take one again.
REPLACED = frozenset(
    """
    Wishes Desk Ticket Cohort Outlook Waiting BatchCosts Governor Allowance Plan Planner Grant granted
    Ledger Account OneRow Walk Walks Workshop Arrival Shot Mailbox Backlog Subject Verdicts Evidence Range
    Pool Samples Judge Wish Victim Hunt Steps Climbed Turn Gates Judged Objective Recipe AttackCopy Draw
    Amalgam Team Spans hopeless fade rehearse shelf stands ascend leads harm quicken taught agree strangers
    pass_by is_sure never_leave ask_everywhere twin
    """.split()  # noqa: SIM905
)
# The same for modules alone: some of these are ordinary words for functions and methods.
REPLACED_MODULES = frozenset(
    """
    desk ticket cohort outlook waiting governor allowance plan grant ledger one_row walk workshop intake
    replies describe listen access shots stills mailbox backlog address mp4 subject verdicts samples judge
    victim hunt gates aids recipe folded draw soft_labels amalgam times
    """.split()  # noqa: SIM905
)


def test_texts_avoid_words_that_hide_what_is_meant() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if AVOIDED.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_no_module_class_or_function_has_a_replaced_name() -> None:
    taken = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.stem in REPLACED | REPLACED_MODULES]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name in REPLACED:
                taken.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert not taken, "\n".join(taken)


def test_no_docstring_only_points_elsewhere() -> None:
    """A docstring says what the thing does; "See `x`." alone makes the reader look it up."""
    pointers = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if re.fullmatch(r"See [`\w. ]+\.?", text.strip()):
                    pointers.append(f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)} {text}")
    assert not pointers, "\n".join(pointers)

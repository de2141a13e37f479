"""Options that are repeated, misspelt, or have a value that cannot be meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from command_line import refused, typed

from mexit.core.environment import VARIABLES, unknown_variables
from mexit.core.resource_limits import THREADS_PER_PROCESSOR, check_threads
from mexit.errors import UsageError

REPEATED = {
    "camera --source a --rate 1 --rate 2": "--rate",
    "camera --source a --limit 1 --limit 1": "--limit",
    "train --epochs 1 --epochs 2": "--epochs",
    "train --nesterov --no-nesterov": "--nesterov",
    "train --json --json": "--json",
    "export --out a --out b": "--out",
    "evaluate --attacks pgd --attacks policy": "--attacks",
    "calibrate --measure margin --measure entropy": "--measure",
    "run x.png --budget low --budget high": "--budget",
    "serve --port 1 --port 2": "--port",
    "bench --repeats 20 --repeats 30": "--repeats",
}
NAMED_TWICE = {
    "train --set alpha=1 --set alpha=2": "--set alpha is given twice: 1 and 2",
    "calibrate --budget night=30% --budget night=40%": "--budget night is given twice: 30% and 40%",
}


@pytest.mark.parametrize(("line", "option"), REPEATED.items(), ids=REPEATED.keys())
def test_a_repeated_option_is_rejected_by_name(line: str, option: str) -> None:
    said = re.sub("[│ ]+", " ", refused(*line.split(), code=2))
    assert f"Option '{option}' is given 2 times; it takes one value." in said


@pytest.mark.parametrize(("line", "words"), NAMED_TWICE.items(), ids=NAMED_TWICE.keys())
def test_a_name_given_twice_to_a_repeatable_option_is_rejected(line: str, words: str) -> None:
    assert words in refused(*line.split(), code=2)


def test_repeatable_options_are_all_used(bundle_copy: Path) -> None:
    line = ("calibrate", bundle_copy, "--attack", "none", "--budget", "night=60%", "--budget", "day=70%", "--json")
    done = typed(*line)
    assert done.exit_code == 0
    assert '"night"' in done.stdout
    assert '"day"' in done.stdout


@pytest.mark.parametrize(
    ("line", "hint"),
    [("train --theads 2", "--threads"), ("camera --sorce 0", "--source"), ("inspect --jsn", "--json"),
     ("evaluate --atacks pgd", "--attacks"), ("tarin", "Did you mean 'train'?")],
)  # fmt: skip
def test_a_misspelt_option_or_command_has_a_hint(line: str, hint: str) -> None:
    assert hint in refused(*line.split(), code=2)


@pytest.mark.parametrize(
    ("name", "near"),
    [("MEXIT_THREAD", "MEXIT_THREADS"), ("MEXIT_BACKND", "MEXIT_BACKEND"), ("MEXIT_DATA_DIR", "MEXIT_DATA"),
     ("MEXIT_TOKENS", "MEXIT_TOKEN"), ("mexit_budget", "MEXIT_BUDGET"), ("MEXIT_BUNDLE", None), ("MEXIT_VENV", None)],
)  # fmt: skip
def test_a_misspelt_variable_has_a_hint(name: str, near: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables({name: "1", "HOME": "/", **dict.fromkeys(VARIABLES, "x")}) == {name: near}
    monkeypatch.setenv(name, "1")
    said = typed("inspect", "nowhere").stderr
    warned = f"warning: {name} is set, but mexit does not read it: did you mean {near}?"
    assert (warned in " ".join(said.split())) == (near is not None)


@pytest.mark.parametrize("count", [0, -1, THREADS_PER_PROCESSOR * (os.cpu_count() or 1) + 1, 5000])
def test_a_number_of_threads_that_cannot_be_meant_is_rejected(count: int) -> None:
    with pytest.raises(
        UsageError, match=f"threads must be at (least 1|most .* processors of this machine).* found {count}$"
    ):
        check_threads(count)


@pytest.mark.parametrize(
    "line", ["run {bundle} x.png", "bench {bundle}", "calibrate {bundle}", "train", "serve {bundle}"]
)
def test_every_command_rejects_thousands_of_threads(
    line: str, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = line.format(bundle=digits_bundle).split()
    assert "threads must be at most" in refused(*words, "--threads", "5000", code=2)
    if words[0] != "train":
        monkeypatch.setenv("MEXIT_THREADS", "5000")
        assert "threads must be at most" in refused(*words, code=2)


def test_the_number_of_processors_is_accepted() -> None:
    for count in (1, os.cpu_count() or 1, THREADS_PER_PROCESSOR * (os.cpu_count() or 1)):
        check_threads(count)

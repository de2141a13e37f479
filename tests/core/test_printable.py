"""Names with any bytes are shown on one line, and JSON with them is read by every reader."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess

import pytest

from mexit.core.atomic_io import parse_json, to_json
from mexit.core.printable import json_text, printable, printable_lines, shell_path

NAMES = {
    "Latin-1": (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
    "line break": ("a\nb.png", r"a\x0ab.png"),
    "terminal command": ("\x1b[2Jx", r"\x1b[2Jx"),
    "umlaut": ("Größe.png", "Größe.png"),
    "emoji": ("🐱 :cat: [red].png", "🐱 :cat: [red].png"),
    "Japanese space": ("猫\u3000.png", "猫\u3000.png"),
}


@pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES.keys())
def test_a_name_is_shown_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(name).encode().decode() == shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", [*(name for name, _ in NAMES.values()), "my pictures/it's $HOME", "-x", "a\\\x9fb'"])
def test_a_shell_reads_a_path_as_it_is(name: str) -> None:
    read = subprocess.run(["bash", "-c", f"printf %s {shell_path(name)}"], capture_output=True, check=True).stdout
    assert read == os.fsencode(f"./{name}" if name.startswith("-") else name)
    assert printable(shell_path(name)) == shell_path(name)


def test_a_plain_path_is_not_quoted() -> None:
    assert shell_path("folder:/home/me/pictures-2") == "folder:/home/me/pictures-2"


def test_line_breaks_of_a_text_stay() -> None:
    assert printable_lines("one\ntwo\x07") == "one\ntwo\\x07"


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(("name", "shown"), NAMES.values(), ids=NAMES.keys())
def test_json_holds_whole_characters(name: str, shown: str, ascii_only: bool) -> None:
    text = json_text({name: [name, "\\udce9"]}, ascii_only=ascii_only)
    assert text.isascii() or not ascii_only
    expected = name if name.isprintable() or "\udce9" not in name else shown
    assert json.loads(text.encode()) == {expected: [expected, "\\udce9"]}
    assert parse_json(text.encode(), "x", "text") == json.loads(text)  # type: ignore[arg-type]


def test_stored_json_takes_any_name_and_no_infinity() -> None:
    assert json.loads(to_json({"file": os.fsdecode(b"\xff"), "ä": 1})) == {"file": r"\xff", "ä": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json([math.inf])

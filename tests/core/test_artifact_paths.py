"""Names of runs and bundles."""

from __future__ import annotations

import pytest

from mexit.core.artifact_paths import plain_name
from mexit.core.manifest import NAME_PATTERN


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("folder-signs-clean", "folder-signs-clean"),
        ("My Pictures-clean", "My-Pictures-clean"),
        ("Straßen_Übung-neo-kd", "Straen_Ubung-neo-kd"),
        ("_new", "new"),
        ("猫", "pictures"),
        ("x" * 80, "x" * 50),
    ],
)
def test_a_name_from_a_folder_can_be_a_bundle(text: str, name: str) -> None:
    assert plain_name(text) == name
    assert NAME_PATTERN.fullmatch(plain_name(text))

"""The registry of engines."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from mexit.core.bundle import Bundle
from mexit.errors import UsageError
from mexit.runtime.backends import registry


def test_an_unknown_name_is_answered_with_all_names(digits_bundle: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tpu': choose from auto, ort"):
        registry.open_backend(Bundle.open(digits_bundle), "tpu")


def test_a_missing_variant_is_named(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = dataclasses.replace(registry.ENGINES["ort"], precision="half", variant="half")
    monkeypatch.setitem(registry.ENGINES, "ort:half", half)
    with pytest.raises(UsageError, match="has no half segments, which backend ort:half runs: export the run again"):
        registry.open_backend(Bundle.open(digits_bundle), "ort:half")


def test_every_name_contains_its_key() -> None:
    for name, engine in registry.ENGINES.items():
        typed, _, precision = name.partition(":")
        assert typed == engine.engine
        assert precision in ("", engine.precision)


def test_every_engine_has_a_module() -> None:
    for engine in registry.ENGINES.values():
        module, _, class_name = engine.opener.partition(":")
        assert hasattr(importlib.import_module(f"mexit.runtime.backends.{module}"), class_name)

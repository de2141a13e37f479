"""Traces: they come back as they were stored, or an error says why not."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mexit.core.bundle import Bundle
from mexit.core.trace import Origin, Trace
from mexit.errors import BadInput, Damaged, NotFound

ORIGIN = Origin("0" * 64, "fp32", "ort", "fp32", "calibration", "clean", "1" * 64)
LOGITS = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
LABELS, INDEX = np.arange(8, dtype=np.int64) % 4, np.arange(8, dtype=np.int64)


def stored(**arrays: object) -> bytes:
    """A trace file in which these arrays are others; None leaves one out."""
    origin = np.frombuffer(json.dumps(dataclasses.asdict(ORIGIN)).encode(), np.uint8)
    values = {"logits": LOGITS, "labels": LABELS, "index": INDEX, "origin": origin} | arrays
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: value for name, value in values.items() if value is not None})
    return buffer.getvalue()


def text(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "no labels"])
def test_a_trace_comes_back_as_it_was_stored(labels: np.ndarray | None) -> None:
    trace = Trace.from_bytes(Trace(LOGITS, labels, INDEX, ORIGIN).to_bytes(), Path("trace.npz"))
    assert trace.logits.tobytes() == LOGITS.tobytes()
    assert (trace.labels is None) == (labels is None)
    assert labels is None or trace.labels.tolist() == labels.tolist()
    assert trace.index.tolist() == INDEX.tolist()
    assert trace.origin == ORIGIN


def test_groups_are_kept_and_may_be_absent() -> None:
    groups = np.repeat(np.arange(4), 2)
    trace = Trace.from_bytes(Trace(LOGITS, LABELS, INDEX, ORIGIN, groups).to_bytes(), Path("trace.npz"))
    assert trace.groups.tolist() == groups.tolist()
    assert Trace.from_bytes(stored(), Path("trace.npz")).groups is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4 no zip at all",
        stored()[:-40],
        stored(logits=None),
        stored(index=None),
        stored(origin=None),
        stored(logits=np.asarray([object()])),
        stored(logits=LOGITS.astype(np.float64)),
        stored(logits=LOGITS[0]),
        stored(labels=LABELS[:5]),
        stored(labels=LABELS + 1),
        stored(labels=LABELS - 1),
        stored(labels=LABELS.astype(np.float64)),
        stored(index=INDEX.reshape(2, 4)),
        stored(groups=INDEX[:5]),
        stored(groups=INDEX.astype(np.float64)),
        stored(origin=text({"model": "x"})),
        stored(origin=text([1])),
        stored(origin=text({**dataclasses.asdict(ORIGIN), "split": 5})),
        stored(origin=np.frombuffer(b"\xff{", np.uint8)),
    ],
    ids=["empty", "no zip", "cut short", "no logits", "no index", "no origin", "pickle", "float64", "two axes",
         "fewer labels", "label too large", "label negative", "label float", "index of two axes",
         "fewer groups", "group float",
         "origin incomplete", "origin a list", "split a number", "origin no text"],
)  # fmt: skip
def test_a_damaged_trace_file_is_named(content: bytes) -> None:
    with pytest.raises(Damaged, match=r"trace .*bad\.npz (is not readable: .|holds no .)"):
        Trace.from_bytes(content, Path("traces/bad.npz"))


def test_a_missing_trace_file_is_named(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    ref = bundle.policies().entries[0].trace
    (bundle_copy / ref.file).unlink()
    with pytest.raises(NotFound, match=rf"trace {bundle_copy / ref.file} does not exist"):
        bundle.load_trace(ref)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 8, 1)], ids=["no exit", "no sample", "one class"])
def test_a_trace_of_nothing_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="needs an exit, a sample and two classes"):
        Trace(np.zeros(shape, np.float32), None, np.arange(shape[1]), ORIGIN)


def test_a_bundle_keeps_a_trace_under_its_hash(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    trace = Trace(LOGITS, LABELS, INDEX, dataclasses.replace(ORIGIN, model=bundle.id))
    ref = bundle.save_trace(trace)
    assert bundle.save_trace(trace) == ref
    assert (ref.split, ref.condition, ref.n) == ("calibration", "clean", 8)
    assert ref.sha256[:12] in ref.file
    assert bundle.load_trace(ref).logits.tobytes() == LOGITS.tobytes()


def test_a_trace_of_another_model_is_refused(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    ref = bundle.save_trace(Trace(LOGITS, LABELS, INDEX, ORIGIN))
    with pytest.raises(Damaged, match=f"is of model 000000000000, this is {bundle.id[:12]}"):
        bundle.load_trace(ref)


def test_a_trace_changed_after_calibration_is_refused(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    ref = bundle.policies().entries[0].trace
    path = bundle_copy / ref.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=rf"trace {path} was changed after calibration: run mexit calibrate"):
        bundle.load_trace(ref)

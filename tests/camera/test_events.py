"""Events: what is reported, once, and with which durations."""

from __future__ import annotations

import pytest
from camera_media import camera_prediction

from mexit.camera.events import CameraEvent, EventDetector


@pytest.fixture
def detector() -> EventDetector:
    """A detector whose events all happen at second 100."""
    return EventDetector("gate", unsure_s=10.0, clock=lambda: 100.0)


def events(detector: EventDetector, answers: list[tuple[float, str | None]]) -> list[tuple[str, str | None, float]]:
    """Kind, label and seconds of the events of answers with these times and steady labels."""
    found = []
    for captured_s, steady in answers:
        answer = camera_prediction(captured_s=captured_s, steady=steady)
        found += [(event.kind, event.label, event.seconds) for event in detector.update(answer)]
    return found


def test_changes_of_the_steady_label(detector: EventDetector) -> None:
    [first] = detector.update(camera_prediction(captured_s=5.0, label="open"))
    assert first == CameraEvent("gate", "label-changed", 100.0, "open", None, 0.0)
    assert events(detector, [(6.0, "open"), (7.5, "open")]) == []
    [second] = detector.update(camera_prediction(captured_s=9.0, label="shut"))
    assert second == CameraEvent("gate", "label-changed", 100.0, "shut", "open", 4.0)


def test_unsure_is_reported_once_after_its_time(detector: EventDetector) -> None:
    answers = [(0.0, "open"), (1.0, None), (10.9, None), (11.0, None), (30.0, None)]
    assert events(detector, answers) == [("label-changed", "open", 0.0), ("unsure", None, 10.0)]
    assert events(detector, [(31.0, "open")]) == [("sure-again", "open", 30.0)]
    assert events(detector, [(32.0, None), (45.0, None)]) == [("unsure", None, 13.0)]
    assert events(detector, [(46.0, "shut")]) == [("sure-again", "shut", 14.0), ("label-changed", "shut", 46.0)]


def test_short_doubt_is_no_event(detector: EventDetector) -> None:
    answers = [(0.0, "open"), (1.0, None), (9.0, None), (10.5, "open"), (11.0, None), (20.0, None), (20.5, "open")]
    assert events(detector, answers) == [("label-changed", "open", 0.0)]


def test_a_camera_that_starts_unsure(detector: EventDetector) -> None:
    assert events(detector, [(3.0, None), (13.0, None)]) == [("unsure", None, 10.0)]


def test_durations_of_a_recording_are_those_of_its_timestamps() -> None:
    detector = EventDetector("gate", unsure_s=10.0, live=False)
    found = []
    for time_s, label in [(0.0, "open"), (1.0, None), (12.0, None), (14.0, "shut")]:
        found += detector.update(camera_prediction(time_s=time_s, captured_s=500.0, label=label))
    assert [(event.kind, event.seconds) for event in found[1:]] == [
        ("unsure", 11.0),
        ("sure-again", 13.0),
        ("label-changed", 14.0),
    ]


def test_states_of_the_camera(detector: EventDetector) -> None:
    events(detector, [(0.0, "open")])
    states = [
        ("starting", 0.0),
        ("live", 1.0),
        ("lost", 4.0),
        ("lost", 5.0),
        ("frozen", 6.0),
        ("live", 9.0),
        ("live", 9.5),
    ]
    found = [event for state, now_s in states for event in detector.update_state(state, now_s)]
    assert [(event.kind, event.seconds) for event in found] == [
        ("camera-lost", 0.0),
        ("camera-frozen", 2.0),
        ("camera-back", 5.0),
    ]
    assert {(event.camera, event.label, event.previous) for event in found} == {("gate", None, "open")}
    assert events(detector, [(10.0, "open")]) == [], "the same label as before"


def test_json() -> None:
    event = CameraEvent("gate", "unsure", 1.23456, None, "open", 10.00049)
    assert event.to_json() == {
        "camera": "gate",
        "kind": "unsure",
        "time_s": 1.235,
        "label": None,
        "previous": "open",
        "seconds": 10.0,
    }

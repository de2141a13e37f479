"""The one-slot buffer and its reader thread, without video."""

from __future__ import annotations

import threading
from collections.abc import Generator

import numpy as np
import pytest

from mexit.camera.frame import Counters, Frame
from mexit.camera.latest_frame import Closed, LatestFrame, read_in_thread


def frame(index: int) -> Frame:
    return Frame(index, "test", None, 0.0, 0, lambda: index, lambda image: np.asarray(image))


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mexit-camera"]


def test_a_new_item_replaces_one_that_was_not_taken() -> None:
    buffer: LatestFrame[int] = LatestFrame()
    for item in (1, 2, 3):
        buffer.put(item)
    assert buffer.take(0) == (3, 2)
    assert buffer.take(0.01) is None
    buffer.put(4)
    assert buffer.take(0) == (4, 2)


def test_the_last_item_comes_before_the_end() -> None:
    buffer: LatestFrame[int] = LatestFrame()
    buffer.put(1)
    buffer.close()
    assert buffer.take(0) == (1, 0)
    with pytest.raises(Closed):
        buffer.take(10)


def test_an_error_of_the_reader_reaches_the_consumer() -> None:
    def failing() -> Generator[Frame, None, None]:
        yield frame(0)
        raise ValueError("camera on fire")

    frames = read_in_thread(failing(), threading.Event(), Counters(), lambda: False, every_frame=True)
    assert next(frames).index == 0
    with pytest.raises(ValueError, match="camera on fire"):
        next(frames)
    assert not reader_threads()


def test_every_frame_in_order() -> None:
    counters = Counters()
    reader = (frame(i) for i in range(50))
    frames = read_in_thread(reader, threading.Event(), counters, lambda: False, every_frame=True)
    assert [one.index for one in frames] == list(range(50))
    assert counters.replaced == 0


def test_the_newest_frame() -> None:
    """While the consumer holds frame 0, the reader puts 1 to 9 in the slot; the consumer then gets 9."""
    held, put = threading.Event(), threading.Event()

    def reader() -> Generator[Frame, None, None]:
        yield frame(0)
        held.wait(30)
        for i in range(1, 10):
            yield frame(i)
        put.set()  # frame 9 is in the slot, because the generator was resumed after it
        taken.wait(30)
        yield frame(10)

    taken, counters = threading.Event(), Counters()
    frames = read_in_thread(reader(), threading.Event(), counters, lambda: False, every_frame=False)
    results = [next(frames)]
    held.set()
    assert put.wait(30)
    results.append(next(frames))
    taken.set()
    results += frames
    assert [(one.index, one.dropped) for one in results] == [(0, 0), (9, 8), (10, 8)]
    assert counters.replaced == 8


@pytest.mark.parametrize("every_frame", [True, False])
def test_closing_stops_the_thread_and_closes_the_reader(every_frame: bool) -> None:
    closed, stop = threading.Event(), threading.Event()

    def endless() -> Generator[Frame, None, None]:
        try:
            while True:
                yield frame(0)
                stop.wait(0.01)
        finally:
            closed.set()

    frames = read_in_thread(endless(), stop, Counters(), lambda: False, every_frame=every_frame)
    next(frames)
    frames.close()
    assert closed.wait(10)
    assert not reader_threads()


def test_a_frame_that_was_not_taken_is_counted_at_the_end() -> None:
    """Frames 0 and 1 are put; the consumer takes frame 0 and closes."""
    put, counters = threading.Event(), Counters()

    def two() -> Generator[Frame, None, None]:
        yield frame(0)
        yield frame(1)
        put.set()

    frames = read_in_thread(two(), threading.Event(), counters, lambda: False, every_frame=True)
    assert next(frames).index == 0
    assert put.wait(30)
    frames.close()
    assert counters.replaced == 1


def test_a_stop_request_while_no_frame_comes() -> None:
    stop = threading.Event()
    answers = iter([False, False, True])

    def silent() -> Generator[Frame, None, None]:
        stop.wait(60)
        yield from ()

    frames = read_in_thread(silent(), stop, Counters(), lambda: next(answers), every_frame=False)
    assert list(frames) == []
    assert stop.is_set()
    assert not reader_threads()

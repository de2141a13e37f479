"""The one-slot mailbox, the reader thread behind it, and the watch for a backlog: no video, no network."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import numpy as np
import pytest

from mexit.camera.decoder_lag import DecoderLag
from mexit.camera.frame import Counters, Frame
from mexit.camera.latest_frame import Closed, LatestFrame, threaded


def shot(index: int) -> Frame:
    return Frame(index, "test", None, time.monotonic(), 0, lambda: index, lambda image: np.asarray(image))


def camera_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mexit-camera"]


def test_a_new_item_replaces_the_one_nobody_took() -> None:
    latest_frame: LatestFrame[int] = LatestFrame()
    for item in (1, 2, 3):
        latest_frame.put(item)
    assert latest_frame.take(0) == (3, 2)
    assert latest_frame.take(0.01) is None
    latest_frame.put(4)
    assert latest_frame.take(0) == (4, 2)


def test_what_is_in_the_slot_is_given_before_the_end() -> None:
    latest_frame: LatestFrame[int] = LatestFrame()
    latest_frame.put(1)
    latest_frame.close()
    assert latest_frame.take(0) == (1, 0)
    with pytest.raises(Closed):
        latest_frame.take(10)


def test_the_error_of_the_reader_reaches_the_consumer() -> None:
    def broken() -> Generator[Frame, None, None]:
        yield shot(0)
        raise ValueError("camera on fire")

    shots = threaded(broken(), threading.Event(), Counters(), lambda: False, wait=True)
    assert next(shots).index == 0
    with pytest.raises(ValueError, match="camera on fire"):
        next(shots)
    assert not camera_threads()


def test_waiting_gives_every_shot_in_order() -> None:
    counters = Counters()
    shots = threaded((shot(i) for i in range(50)), threading.Event(), counters, lambda: False, wait=True)
    assert [one.index for one in shots] == list(range(50))
    assert counters.replaced == 0


def test_not_waiting_gives_the_newest_and_counts_the_rest() -> None:
    def fast() -> Generator[Frame, None, None]:
        for i in range(100):
            yield shot(i)
            time.sleep(0.002)

    counters = Counters()
    taken = []
    for one in threaded(fast(), threading.Event(), counters, lambda: False, wait=False):
        taken.append(one)
        time.sleep(0.02)
    indices = [one.index for one in taken]
    assert indices == sorted(indices)
    assert indices[-1] == 99
    # Whatever lies before an answered shot was answered or dropped: nothing is lost without being counted.
    assert [one.index - place for place, one in enumerate(taken)] == [one.dropped for one in taken]
    assert counters.replaced == 100 - len(taken) > 50


def test_closing_stops_the_thread_and_closes_the_reader() -> None:
    closed = threading.Event()
    stop = threading.Event()

    def endless() -> Generator[Frame, None, None]:
        try:
            while True:
                yield shot(0)
                stop.wait(0.01)
        finally:
            closed.set()

    for wait in (True, False):
        stop.clear()
        closed.clear()
        shots = threaded(endless(), stop, Counters(), lambda: False, wait=wait)
        next(shots)
        shots.close()
        assert closed.wait(2)
        assert not camera_threads()


def test_a_stop_is_noticed_while_nothing_comes() -> None:
    stop = threading.Event()
    asked = iter([False, False, True])

    def silent() -> Generator[Frame, None, None]:
        stop.wait(10)
        yield from ()

    began = time.monotonic()
    assert list(threaded(silent(), stop, Counters(), lambda: next(asked), wait=False)) == []
    assert time.monotonic() - began < 2


class Clock:
    """Reads of a stream: each takes `wait_s`, then decoding takes `work_s`."""

    def __init__(self, backlog: DecoderLag) -> None:
        self.now = 0.0
        self.backlog = backlog

    def read(self, wait_s: float, work_s: float, key: bool = False) -> bool:
        asked, self.now = self.now, self.now + wait_s
        skips = self.backlog.skips(asked, self.now, key)
        self.now += 0.0 if skips else work_s
        return skips


def test_a_reader_that_waits_for_packets_skips_none() -> None:
    clock = Clock(DecoderLag(1.0))
    assert not any(clock.read(0.01, 0.03, key=i % 10 == 0) for i in range(500))


def test_a_reader_at_120_frames_a_second_that_never_waits_long_skips_none() -> None:
    clock = Clock(DecoderLag(1.0))
    assert not any(clock.read(0.004, 0.004) for i in range(2000))


def test_a_reader_that_never_waits_skips_until_it_has_to_and_then_to_a_key_frame() -> None:
    clock = Clock(DecoderLag(1.0))
    assert not any(clock.read(0.0001, 0.05) for _ in range(20))
    assert clock.now > 1.0
    assert all(clock.read(0.0001, 0.05) for _ in range(10))
    assert clock.read(0.03, 0.05)  # had to wait: caught up, but this is no key frame
    assert clock.read(0.03, 0.05)
    assert not clock.read(0.03, 0.05, key=True)
    assert not clock.read(0.03, 0.05)


def test_a_source_that_never_makes_anyone_wait_still_gives_frames() -> None:
    clock = Clock(DecoderLag(1.0))
    taken = [not clock.read(0.0001, 0.05, key=i % 100 == 0) for i in range(60_000)]
    assert sum(taken[1000:]) > 20

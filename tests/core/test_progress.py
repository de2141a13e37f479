"""The first stop signal is recorded; a later one has its previous effect."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from mexit.core.progress import StopSignal

SIGNALS = """
import signal, sys
from mexit.core import progress
from mexit.core.progress import StopSignal
number, received = int(sys.argv[1]), []
signal.signal(number, lambda got, _: received.append(got))
with StopSignal(lambda: received.append(0)) as stop:
    assert (stop.requested, stop.exit_code) == (False, 0)
    signal.raise_signal(number)
    assert (stop.requested, stop.number, stop.exit_code) == (True, number, int(sys.argv[2]))
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert received == [0], received  # `timeout` signals a program and its group
    progress.SAME_STOP_S = 0
    signal.raise_signal(number)
signal.raise_signal(number)
assert received == [0, number, number], received
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_recorded_and_the_second_has_its_previous_effect(number: int, code: int) -> None:
    """In a process of its own: the one that runs the tests reacts to signals too."""
    arguments = [sys.executable, "-c", SIGNALS, str(int(number)), str(code)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


INTERRUPTS = """
import signal, sys
from mexit.core import progress
from mexit.core.progress import StopSignal
number, received = int(sys.argv[1]), []
stop = StopSignal(lambda: received.append(0), interrupts=True)
try:
    with stop:
        signal.raise_signal(number)
        raise AssertionError
except KeyboardInterrupt:
    assert (stop.number, stop.exit_code, received) == (number, int(sys.argv[2]), [])
with StopSignal(lambda: received.append(0), interrupts=True) as stop:
    stop.defer()
    signal.raise_signal(number)
assert (stop.number, received) == (number, [0])
with StopSignal(lambda: received.append(0)) as stop:
    stop.defer(lambda: received.append(1), received.append)
    signal.raise_signal(number)
    progress.SAME_STOP_S = 0
    signal.raise_signal(number)
assert received == [0, 1, number], received
with StopSignal(interrupts=True) as stop:
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        pass  # as Cython's modules do while they are loaded
    try:
        stop.defer()
        raise AssertionError
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_until_it_is_deferred(number: int, code: int) -> None:
    arguments = [sys.executable, "-c", INTERRUPTS, str(int(number)), str(code)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_handlers_are_restored_without_a_signal() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_keep_their_handlers() -> None:
    handlers = []

    def enter() -> None:
        with StopSignal():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]

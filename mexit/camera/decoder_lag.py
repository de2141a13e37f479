"""Notices that decoding cannot keep up with a camera, and says which packets to skip.

A reader that keeps up waits for nearly every packet. One that finds each packet already there is working off a
backlog in socket buffers, whose age no clock of this process shows. Time stamps would not do as a sign: those of
many cameras are invented.
"""

from __future__ import annotations

from enum import Enum

WAITED_S = 0.006  # a read that took longer waited for the camera, and not only for the interpreter's lock
IDLE_SHARE = 0.3  # a reader that spends more of its time in short waits than this keeps up all the same


class _State(Enum):
    KEEPING_UP = "keeping up"
    SKIPPING = "skipping"
    AWAITING_KEY = "awaiting a key frame"


class DecoderLag:
    """Watches the reads of one connection.

    Behind for `behind_s`, packets are skipped until one has to be waited for, for `behind_s` at most so that a
    source that never makes anyone wait (a file over HTTP) still gives frames; then up to the next key frame,
    from which decoding can start anew.
    """

    def __init__(self, behind_s: float) -> None:
        self._behind_s = behind_s
        self._state = _State.KEEPING_UP
        self._since_s: float | None = None
        self._idle_s = 0.0

    def skips(self, asked_s: float, arrived_s: float, key: bool) -> bool:
        """Whether to skip the packet that was asked for and arrived at these times."""
        since_s = asked_s if self._since_s is None else self._since_s
        waited = arrived_s - asked_s > WAITED_S
        self._idle_s += arrived_s - asked_s
        late = arrived_s - since_s >= self._behind_s
        busy = self._idle_s < IDLE_SHARE * (arrived_s - since_s)
        if self._state is _State.KEEPING_UP and (waited or late or self._since_s is None):
            self._enter(_State.SKIPPING if late and busy and not waited else _State.KEEPING_UP, arrived_s)
        elif self._state is _State.SKIPPING and (waited or late):
            self._enter(_State.AWAITING_KEY, arrived_s)
        if self._state is _State.AWAITING_KEY and key:
            self._enter(_State.KEEPING_UP, arrived_s)
        return self._state is not _State.KEEPING_UP

    def _enter(self, state: _State, now_s: float) -> None:
        self._state, self._since_s, self._idle_s = state, now_s, 0.0

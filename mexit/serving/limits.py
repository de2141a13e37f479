"""Every number that bounds what a client can make the server hold or do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The server's limits.

    Attributes:
        body_bytes: of one request, and of what a compressed one becomes.
        held_bytes: of all request bodies held at once.
        rows: inputs in one request.
        json_values: in one JSON text; each becomes a Python object of some 30 bytes, so text is far more
            costly to read than binary tensors.
        json_depth: brackets within brackets.
        jobs: requests that wait for a worker or are with one; the next is refused.
        share: where the rate limiter tells clients apart, one client may have a fourth (by default) of the jobs and
            of the bytes held.
        wait_s: for the rate limiter's tokens, where a request has no deadline.
        body_s: for the whole body to arrive.
        drain_s: for requests in flight to finish once the server was told to stop.
    """

    body_bytes: int = 64 << 20
    held_bytes: int = 256 << 20
    rows: int = 1024
    json_values: int = 4 << 20
    json_depth: int = 32
    jobs: int = 64
    share: int = 4
    wait_s: float = 5.0
    body_s: float = 60.0
    drain_s: float = 30.0

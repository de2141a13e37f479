"""The limits of a server: sizes, counts and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one server. Sizes are in bytes, times in seconds.

    Attributes:
        body_bytes: one request body, as sent and after decompression.
        held_bytes: all request bodies in memory together.
        rows: inputs in one request.
        json_values: values in one JSON text. Each value becomes a Python object of about 30 bytes.
        json_depth: nesting of one JSON text.
        requests: requests that wait for a worker, run in one, or wait for tokens; a further request gets status 503.
            Those that run in the event loop are bounded by the number of connections.
        client_share: if the rate limiter has a bucket per client, one client may use 1/client_share of
            `requests` and of `held_bytes`.
        workers: worker threads, or worker processes by default, at most.
        short_s: a tensor request that is expected to take less runs in the event loop, not in a worker thread; 0: none.
        token_wait_s: wait for tokens of the rate limiter if the request has no deadline.
        body_s: until the whole body has arrived.
        head_s: until the request line and headers have arrived, from the first byte or the connection.
        keep_alive_s: idle connection between two requests; longer than proxies keep theirs (60 to 75 by default), so
            that a proxy does not send a request on a connection that closes at this moment.
        head_bytes: of a request line and headers, or of other bytes that are no part of a body.
        send_s: until the client has received the response, which stays in memory until then.
        drain_s: after a stop signal, until requests in flight are answered.
        close_s: after that, until their last bytes are sent.
        connections: open connections; half of the usual limit of open files.
    """

    body_bytes: int = 64 << 20
    held_bytes: int = 256 << 20
    rows: int = 1024
    json_values: int = 4 << 20
    json_depth: int = 32
    requests: int = 64
    client_share: int = 4
    workers: int = 4
    short_s: float = 1e-3
    token_wait_s: float = 5.0
    body_s: float = 60.0
    head_s: float = 10.0
    keep_alive_s: int = 90
    head_bytes: int = 64 << 10
    send_s: float = 60.0
    drain_s: float = 30.0
    close_s: int = 5
    connections: int = 512

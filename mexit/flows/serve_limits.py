"""The limits of a server that its options set."""

from __future__ import annotations

from dataclasses import replace

from mexit.serving.limits import Limits

__all__ = ["DEFAULT", "MIB", "with_body"]

DEFAULT = Limits()
MIB = 1 << 20


def with_body(limits: Limits, body_mib: int) -> Limits:
    """Limits with another size of request bodies, MiB; all bodies together may take at least as much."""
    body_bytes = body_mib * MIB
    return replace(limits, body_bytes=body_bytes, held_bytes=max(body_bytes, limits.held_bytes))

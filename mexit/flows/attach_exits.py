"""`mexit.attach_exits`: a torch module as a multi-exit network, see `models.attach_exits`."""

from __future__ import annotations

from mexit.errors import requires_extra

with requires_extra("train", "Attaching exits to a network"):
    from mexit.models.attach_exits import attach_exits

__all__ = ["attach_exits"]

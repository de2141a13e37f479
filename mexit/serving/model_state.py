"""What a process knows of a model: the version in service, the one that is prepared, and the one that was refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mexit.serving.service import Service

StateJson = Mapping[str, Any]
"""A state for another process: `serves`, the identity of the service or None, and `failed`."""


@dataclass
class ModelState:
    """What a process knows of a model.

    Attributes:
        service: the version in service, or None.
        prepared: the version that is ready to replace it, or None.
        failed: number of the newest version that was refused, and the reason; None after a load.
    """

    service: Service | None = None
    prepared: Service | None = None
    failed: tuple[str, str] | None = None

    def to_json(self) -> StateJson:
        """The state for another process."""
        return {"serves": None if self.service is None else self.service.identity, "failed": self.failed}

    def entries(self, name: str) -> Iterator[dict[str, str]]:
        """The model's entries in the index."""
        version, reason = self.failed or ("", "")
        if self.service is not None:
            same = version == self.service.version
            yield entry(name, self.service.version, "READY", f"not replaced: {reason}" if same else "")
            if self.failed is None or same:
                return
        if self.failed is not None:
            yield entry(name, version, "UNAVAILABLE", reason)


def entry(name: str, version: str, state: str, reason: str) -> dict[str, str]:
    """An entry of the index."""
    return {"name": name, "version": version, "state": state, "reason": reason}

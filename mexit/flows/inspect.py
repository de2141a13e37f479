"""`mexit inspect`: what a bundle says of itself, checked byte by byte on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mexit.core.artifact_paths import BUNDLES, newest
from mexit.core.bundle import Bundle
from mexit.core.policies import Policies
from mexit.core.progress import Progress, Silent
from mexit.errors import NotCalibrated
from mexit.flows.tensorrt_engines import EngineRow, rows_json, stored_engines
from mexit.runtime.autotune import Explanation, explain


@dataclass(frozen=True)
class InspectResult:
    """An opened bundle, its policies if it has some, what `--backend auto` takes here, TensorRT engines here."""

    bundle: Bundle
    policies: Policies | None
    tuning: Explanation
    engines: tuple[EngineRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        entries = None
        if self.policies is not None:
            entries = {"model": self.policies.model, "entries": [asdict(entry) for entry in self.policies.entries]}
        return {
            "bundle": self.bundle.manifest.to_json(),
            "policies": entries,
            "tuning": self.tuning.to_json(),
            "engines": rows_json(self.engines),
        }


def inspect_bundle(bundle: Path | None = None, *, progress: Progress | None = None) -> InspectResult:
    """Open and check a bundle, its policies and its traces."""
    opened = Bundle.open(bundle or newest(BUNDLES, progress or Silent()))
    try:
        policies = opened.policies()
    except NotCalibrated:
        return InspectResult(opened, None, explain(opened), stored_engines(opened))
    for entry in policies.entries:
        for ref in (entry.trace, *entry.evidence):
            opened.load_trace(ref)
    return InspectResult(opened, policies, explain(opened), stored_engines(opened))

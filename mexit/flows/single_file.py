"""`mexit export --single-file`: nest the segments in one graph, and check it exit by exit against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mexit.core import single_file
from mexit.core.policy import Policy
from mexit.errors import BackendError
from mexit.runtime.backends.ort import open_session

if TYPE_CHECKING:
    from mexit.export.onnx_export import OnnxSegment

TOLERANCE = 1e-5


def build(segments: Sequence[OnnxSegment]) -> bytes:
    """The single file of these segments. Raises `UsageError`: too many exits; `MissingExtra`: no onnx."""
    from mexit.export.nested_if import single_file as nest

    return nest([segment.model for segment in segments])


def check(content: bytes, images: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
    """Compare a single file, made to leave at each exit in turn, with the logits (E, B, C) of the segments.

    Raises:
        BackendError: another exit answers, or its logits differ by more than `TOLERANCE` of the largest.
    """
    session = open_session(content, "the single file")
    image_name, names = session.get_inputs()[0].name, list(single_file.OUTPUTS)
    for k, expected in enumerate(logits, start=1):
        feeds = leaving_at(k, len(logits))
        allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        for row, image in enumerate(images):
            found, _, place, _ = session.run(names, {image_name: image[None], **feeds})
            difference = float(np.abs(found[0] - expected[row]).max())
            if place[0] != k or not difference <= allowed:
                raise BackendError(
                    f"the single file, told to leave at exit {k}, left at {place[0]} with logits that differ from "
                    f"the segments' by {difference:.1e} (> {allowed:.0e})"
                )


def leaving_at(k: int, exits: int) -> dict[str, NDArray[Any]]:
    """Inputs by which every image leaves at exit `k`, from 1."""
    lowest = float(np.finfo(np.float64).min)
    thresholds = tuple(lowest if place == k else None for place in range(1, exits))
    return single_file.feeds(Policy("max-probability", False, (1.0,) * exits, thresholds))

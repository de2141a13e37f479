"""Classify what a detector found, all boxes of a picture in one batch: python detector_crops.py BUNDLE IMAGE BOXES.json

BOXES.json is a list of boxes [left, top, right, bottom] in pixels. In a program of yours, `classify_boxes` takes the
boxes of any detector as an array (N, 4), and `label_detections` takes the `Detections` of the package supervision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mexit import Prediction, Runtime


def crop(image: NDArray[np.uint8], box: NDArray[np.floating[Any]], margin: float) -> NDArray[np.uint8] | None:
    """The part of a picture in a box, or None where the box has no pixel in the picture.

    Args:
        image: uint8 RGB (H, W, 3).
        box: left, top, right, bottom in pixels, (4,); it may reach beyond the picture.
        margin: share of the box's width and height to add on each side.
    """
    left, top, right, bottom = box
    across, down = margin * (right - left), margin * (bottom - top)
    height, width, _ = image.shape
    first = np.floor([max(0, left - across), max(0, top - down)]).astype(int)
    last = np.ceil([min(width, right + across), min(height, bottom + down)]).astype(int)
    return image[first[1] : last[1], first[0] : last[0]] if (last > first).all() else None


def classify_boxes(
    runtime: Runtime,
    image: NDArray[np.uint8],
    boxes: NDArray[np.floating[Any]],
    margin: float = 0.0,
    budget: str | None = None,
) -> list[Prediction | None]:
    """The answer for each box, in order, computed in one batch; None for a box outside of the picture.

    Args:
        runtime: the opened bundle.
        image: uint8 RGB (H, W, 3); a frame of OpenCV is BGR, so pass frame[:, :, ::-1].
        boxes: left, top, right, bottom in pixels, (N, 4).
        margin: share of a box's width and height to add on each side.
        budget: of these answers; None: that of the runtime.
    """
    crops = [crop(image, box, margin) for box in np.asarray(boxes, float).reshape(-1, 4)]
    found = [one for one in crops if one is not None]
    answers = iter(runtime(found, budget=budget) if found else [])
    return [None if one is None else next(answers) for one in crops]


def label_detections(runtime: Runtime, image: NDArray[np.uint8], detections: Any, **options: Any) -> Any:
    """The `supervision.Detections` with our classes in place of the detector's.

    `class_id` and `confidence` are those of the answers, and `data` has `class_name`, `exit` and `macs`. A detection
    without a label (unsure, or outside of the picture) has the class -1; `detections[detections.class_id >= 0]` is
    the rest. `options` are those of `classify_boxes`.
    """
    answers = classify_boxes(runtime, image, detections.xyxy, **options)
    known = [-1 if one is None or one.index is None else one.index for one in answers]
    detections.class_id = np.array(known, int)
    detections.confidence = np.array([0.0 if one is None else one.confidence for one in answers], np.float32)
    detections.data["class_name"] = np.array([(one and one.label) or "" for one in answers], dtype=str)
    detections.data["exit"] = np.array([0 if one is None else one.exit for one in answers], int)
    detections.data["macs"] = np.array([0 if one is None else one.macs for one in answers], int)
    return detections


def main(bundle: str, picture: str, boxes: str) -> None:
    runtime = Runtime.open(bundle, budget="low")
    image = np.asarray(Image.open(picture).convert("RGB"))
    listed = json.loads(Path(boxes).read_text())
    for box, answer in zip(listed, classify_boxes(runtime, image, np.array(listed)), strict=True):
        if answer is None:
            print(f"{box}: outside of the picture")
        else:
            print(f"{box}: {answer.label or answer.reason} ({answer.confidence:.0%}), exit {answer.exit}")
    stats = runtime.stats.snapshot()
    print(f"{stats.predictions} boxes, exits taken {stats.exits}, {stats.saved:.0%} of the MACs saved")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Classify the frames that OpenCV reads: python opencv_loop.py BUNDLE [SOURCE] [--budget low] [--out annotated.avi]

SOURCE is a video file, an address, or the number of a camera of this machine (default 0). Needs opencv-python-headless.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import cv2

from mexit import Prediction, Runtime


def frames(source: str) -> Iterator[Any]:
    """The frames of a source: uint8 BGR (H, W, 3), the order of OpenCV."""
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        sys.exit(f"OpenCV cannot open {source}: give a video file, an address or the number of a camera")
    # A camera whose frames are answered late is read with a delay that grows up to this buffer.
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    try:
        while True:
            arrived, frame = capture.read()
            if not arrived:
                return
            yield frame
    finally:
        capture.release()


def caption(prediction: Prediction) -> str:
    """One line about an answer."""
    label = prediction.label or prediction.reason  # an unsure answer has no label
    return f"{label} ({prediction.confidence:.0%}), exit {prediction.exit}, {prediction.macs:,} MACs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("source", nargs="?", default="0")
    parser.add_argument("--budget", default="low")
    parser.add_argument("--deadline", type=float, help="milliseconds for each answer, such as the time of one frame")
    parser.add_argument("--out", help="write the frames with their answers to this AVI file, 25 per second")
    arguments = parser.parse_args()
    runtime = Runtime.open(arguments.bundle, budget=arguments.budget)
    writer, last = None, ""
    for index, frame in enumerate(frames(arguments.source)):
        # mexit takes RGB. With BGR every answer would be wrong a little, without any message.
        (prediction,) = runtime(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), deadline_ms=arguments.deadline)
        text = caption(prediction)
        if (answer := prediction.label or prediction.reason) != last:
            last = answer
            print(f"frame {index}: {text}", flush=True)
        if arguments.out is not None:
            if writer is None:
                height, width, _ = frame.shape
                writer = cv2.VideoWriter(arguments.out, cv2.VideoWriter_fourcc(*"MJPG"), 25, (width, height))
            cv2.putText(frame, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 255, 0))
            writer.write(frame)
    if writer is not None:
        writer.release()
    stats = runtime.stats.snapshot()
    print(f"{stats.predictions} frames, exits taken {stats.exits}, {stats.saved:.0%} of the MACs saved")


if __name__ == "__main__":
    main()

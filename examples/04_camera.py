"""Watch a source and print each change of the answer: python 04_camera.py BUNDLE SOURCE [FRAMES]"""

import sys

from mexit import Runtime


def main(bundle: str, source: str, max_frames: str = "0") -> None:
    runtime = Runtime.open(bundle, budget="low")
    last_label = None
    answers = runtime.camera(source, on_event=lambda message: print(message, file=sys.stderr))
    for count, (frame, prediction) in enumerate(answers, start=1):
        if prediction.label != last_label and prediction.confidence > 0.5:
            last_label = prediction.label
            height, width, _ = frame.shape
            print(
                f"frame {prediction.frame_index} ({width} x {height}): {prediction.label or prediction.reason} "
                f"({prediction.confidence:.0%}), exit {prediction.exit}, {prediction.age_ms:.0f} ms old, "
                f"{prediction.dropped} dropped"
            )
        if count == int(max_frames):
            break
    stats = runtime.stats.snapshot()
    print(f"{stats.predictions} frames, exits taken {stats.exits}, {stats.saved:.0%} of the full cost saved")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

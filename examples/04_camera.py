"""Watch a source and report when the answer changes: python 04_camera.py BUNDLE SOURCE [FRAMES]"""

import sys

from mexit import Runtime


def main(bundle: str, source: str, frames: str = "0") -> None:
    runtime = Runtime.open(bundle, budget="low")
    shown = None
    watched = runtime.camera(source, on_event=lambda text: print(text, file=sys.stderr))
    for answers, (frame, found) in enumerate(watched, start=1):
        if found.label != shown and found.confidence > 0.5:
            shown = found.label
            height, width, _ = frame.shape
            print(
                f"frame {found.frame_index} ({width} x {height}): {found.label} ({found.confidence:.0%}), "
                f"exit {found.exit}, {found.age_ms:.0f} ms old, {found.dropped} dropped"
            )
        if answers == int(frames):
            break
    spent = runtime.stats.snapshot()
    print(f"{spent.predictions} frames, exits taken {spent.exits}, {spent.saved:.0%} of the full cost saved")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Classify images within a budget: python 02_predict.py BUNDLE IMAGE..."""

import sys
from pathlib import Path

from mexit import Runtime


def main(bundle: str, *images: str) -> None:
    runtime = Runtime.open(bundle, budget="low")
    predictions = runtime([Path(image).read_bytes() for image in images])
    for image, prediction in zip(images, predictions, strict=True):
        print(
            f"{image}: {prediction.label or prediction.reason} ({prediction.confidence:.1%}), exit {prediction.exit}, "
            f"{prediction.macs:,} MACs"
        )
    stats = runtime.stats.snapshot()
    print(f"{stats.predictions} answers, {stats.macs:,} MACs spent, {stats.saved:.0%} saved")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Classify images within a budget: python 02_predict.py BUNDLE IMAGE..."""

import sys
from pathlib import Path

from mexit import Runtime


def main(bundle: str, *images: str) -> None:
    runtime = Runtime.open(bundle, budget="low")
    for image, found in zip(images, runtime([Path(image).read_bytes() for image in images]), strict=True):
        print(f"{image}: {found.label} ({found.confidence:.1%}), exit {found.exit}, {found.macs:,} MACs")
    spent = runtime.stats.snapshot()
    print(f"{spent.predictions} answers, {spent.macs:,} MACs spent, {spent.saved:.0%} saved")


if __name__ == "__main__":
    main(*sys.argv[1:])

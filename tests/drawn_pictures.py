"""Folders of drawn pictures: discs and squares of any colour and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square")


def draw(root: Path, each: int = 24, side: int = 40, mode: str = "RGB", suffix: str = ".png") -> Path:
    """Draw `each` pictures of either class, about `side` pixels wide and high, into class folders below `root`."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(each):
            width, height = (int(side * rng.uniform(0.8, 1.2)) for _ in range(2))
            dark, bright = (tuple(rng.integers(*bounds, 3).tolist()) for bounds in ((0, 100), (140, 255)))
            picture = Image.new("RGB", (width, height), dark)
            x, y, r = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6), side * rng.uniform(0.2, 0.3)
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if name == "disc" else pen.rectangle)([x - r, y - r, x + r, y + r], fill=bright)
            picture.convert(mode).save(root / name / f"{rng.integers(1 << 60):x}-{number}{suffix}")
    return root

"""A decoder for Pillow of binary PPM and PGM files whose largest value is neither 255 nor 65535, such as 4095.

Pillow's own decoder is a loop in Python, which takes about three seconds for a million pixels; its results are the
same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFile

PILLOWS_NAME, NAME = "ppm", "mexit_ppm"
_WIDE = 256  # largest value from which on a value has two bytes


class PpmDecoder(ImageFile.PyDecoder):
    """Scales values to 8 bits, or those of grey pictures above 255 to 16 bits."""

    _pulls_fd = True

    def decode(self, buffer: Any) -> tuple[int, int]:  # noqa: ARG002
        """Decode the whole picture. Raises `ValueError` for a file that is cut short."""
        assert self.fd is not None
        largest, wide = self.args[-1], self.mode == "I"
        top = 65535 if wide else 255
        kind = np.dtype(">u2" if largest >= _WIDE else np.uint8)
        count = self.state.xsize * self.state.ysize * Image.getmodebands(self.mode)
        content = self.fd.read(count * kind.itemsize)
        levels = np.minimum(np.rint(np.arange(1 << 8 * kind.itemsize) / largest * top), top)
        pixels = levels.astype("<i4" if wide else np.uint8)[np.frombuffer(content, kind, count)]
        self.set_as_raw(pixels.tobytes(), "I;32" if wide else self.mode)
        return -1, 0


Image.register_decoder(NAME, PpmDecoder)

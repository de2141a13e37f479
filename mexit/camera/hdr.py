"""High dynamic range and wide-gamut video to the BT.709 colours of ordinary pictures.

The picture is linearised with the curve of its transfer characteristic, its primaries are converted from BT.2020 to
BT.709, and it is coded with the gamma of BT.1886, so that the reference white of HDR (BT.2408: 203 cd/m2) becomes 255.
Light above the reference white is clipped.

Sources: ITU-R BT.2100 (PQ and HLG), BT.2087 (conversion of primaries), BT.2408 (reference white), BT.1886 (gamma 2.4).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BT2020 = 9  # H.273: colour primaries
_PQ, _HLG = 16, 18  # H.273: transfer characteristics
_WHITE_NITS, _HLG_NITS, _PQ_NITS = 203.0, 1000.0, 10_000.0
_GAMMA = 2.4
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
_LEVELS = 4096  # of the square root of linear light, in the table that codes it


def describe(context: Any) -> str | None:
    """Name of the colours of a video that `to_sdr` converts, such as "HDR (HLG)"; None for ordinary colours.

    Args:
        context: a codec context or a frame of PyAV.
    """
    names = {_PQ: "HDR (PQ)", _HLG: "HDR (HLG)"}
    wide = "wide-gamut (BT.2020)" if context.color_primaries == _BT2020 else None
    return names.get(context.color_trc, wide)


def to_sdr(rgb: NDArray[np.uint16], transfer: int) -> NDArray[np.uint8]:
    """Convert BT.2020 colours to BT.709.

    Args:
        rgb: (H, W, 3) uint16, full range, in the signal's own coding.
        transfer: transfer characteristic by H.273; any but PQ and HLG is taken for a gamma of 2.4.

    Returns:
        (H, W, 3) uint8.
    """
    linear = _linear_table(transfer)[rgb]
    if transfer == _HLG:  # the display's gamma of 1.2 applies to the luminance
        luminance = np.maximum(linear @ _LUMINANCE, np.float32(1e-6))
        linear *= (luminance**0.2 * np.float32(_HLG_NITS / _WHITE_NITS))[..., None]
    light = np.clip(linear @ _TO_BT709.T, 0, 1, out=linear)
    return _code_table()[(np.sqrt(light, out=light) * np.float32(_LEVELS - 1) + np.float32(0.5)).astype(np.int32)]


@lru_cache(maxsize=4)
def _linear_table(transfer: int) -> NDArray[np.float32]:
    """Linear light of each uint16 value: of the scene for HLG, else relative to the reference white."""
    signal = np.linspace(0, 1, 1 << 16)
    if transfer == _PQ:
        root = signal ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        light *= _PQ_NITS / _WHITE_NITS
    elif transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**_GAMMA
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _code_table() -> NDArray[np.uint8]:
    """The coded value of each level of the square root of linear light."""
    return np.rint(255 * np.linspace(0, 1, _LEVELS) ** (2 / _GAMMA)).astype(np.uint8)

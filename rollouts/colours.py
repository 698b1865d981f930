"""The colours that looks paint with, the same in every environment."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray


def paint_of(hue: float) -> NDArray[np.float32]:
    """The colour of a hue in [0, 1): RGB (3,), each in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.85), np.float32)

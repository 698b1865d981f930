"""What is done to a frame once it is rendered, in any environment: sensor noise, and fitting it into a square."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pvrpipe.rollouts.variation import Look

IMAGE_FACTORS = frozenset({"sensor_noise"})  # that need nothing of the environment

Frame = NDArray[np.uint8]


def seen(frame: Frame, look: Look, row: int) -> Frame:
    """The frame (H, W, 3) as a noisy sensor shows it at a row; Gaussian, of its own at each row."""
    deviation = look["sensor_noise"]
    if not deviation:
        return frame
    noise = deviation * look.rng(1, row).standard_normal(frame.shape, np.float32)
    return np.clip(frame + noise + 0.5, 0, 255).astype(np.uint8)


def squared(picture: Frame, size: int) -> Frame:
    """Any picture (H, W, 3) as a square of ``size`` pixels: shrunk or grown whole, black where it does not reach."""
    height, width = picture.shape[:2]
    if height == width == size:
        return np.ascontiguousarray(picture)
    scale = size / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    fitted = Image.fromarray(picture).resize(shape, kind)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(fitted, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(canvas)

"""Films: frames into an mp4 (H.264, by PyAV) or a GIF (by Pillow), whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pvrpipe.schemas.errors import MissingExtraError
from pvrpipe.store.files import replacing

GIF_RATE = 15.0  # frames per second at most; a GIF's clock has hundredths of a second
GIF_COLOURS = 128
PLAYABLE = {"crf": "20", "preset": "fast"}

Frame = NDArray[np.uint8]


def write_film(path: Path, frames: Iterator[Frame], rate: float) -> int:
    """Write frames (H, W, 3), one after another; how many there were.

    Args:
        path: ``.mp4`` or ``.gif``.
        frames: all of one shape.
        rate: frames per second; a GIF leaves some out beyond 15.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    with replacing(path) as temporary:
        return (_gif if path.suffix.lower() == ".gif" else _mp4)(temporary, frames, rate)


def can_write_mp4() -> bool:
    """Whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def _mp4(path: Path, frames: Iterator[Frame], rate: float) -> int:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(".mp4 needs PyAV; pip install 'pvrpipe[video]', or name a .gif") from error
    frames = map(_even, frames)
    first = next(frames)
    count = 0
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000), options=PLAYABLE)
        stream.pix_fmt, (stream.height, stream.width) = "yuv420p", first.shape[:2]
        for frame in itertools.chain([first], frames):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            count += 1
        film.mux(stream.encode())
    return count


def _gif(path: Path, frames: Iterator[Frame], rate: float) -> int:
    step = max(1, round(rate / GIF_RATE))
    kept = [Image.fromarray(f).quantize(GIF_COLOURS) for f in itertools.islice(frames, 0, None, step)]
    duration = round(1000 * step / rate)
    kept[0].save(path, "GIF", save_all=True, append_images=kept[1:], duration=duration, loop=0)
    return len(kept)


def _even(frame: Frame) -> Frame:
    """H.264 halves the colours' resolution, and takes no odd sides."""
    return np.ascontiguousarray(frame[: len(frame) // 2 * 2, : frame.shape[1] // 2 * 2])

"""Frames of video files, read with PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.rollouts.import_source import Array, reading, required
from pvrpipe.schemas.errors import SourceError


def _av() -> Any:
    return required("av", "reading video", "video")


def frames_in(path: Path) -> int:
    """Frames of a video, counted without decoding them.

    Raises:
        SourceError: it is no video, or has none.
        MissingExtraError: PyAV is not installed.
    """
    av = _av()
    with reading(path), av.open(str(path)) as container:
        _refuse_silent(container, path)
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


def rate_of(path: Path) -> float | None:
    """Frames per second, where the video says so."""
    with reading(path), _av().open(str(path)) as container:
        _refuse_silent(container, path)
        rate = container.streams.video[0].average_rate
        return float(rate) if rate else None


def frames_of(path: Path, count: int, start: float | None = None, rate: float = 0.0) -> Array:
    """Frames (count, H, W, 3).

    Args:
        path: of the video.
        count: how many.
        start: seconds at which the first is shown; None takes those that the video begins with.
        rate: frames per second, to tell a frame from its neighbour when there is a ``start``.

    Raises:
        SourceError: there are fewer.
    """
    held: list[Array] = []
    with reading(path), _av().open(str(path)) as container:
        _refuse_silent(container, path)
        stream = container.streams.video[0]
        if start is not None and start > 0:
            container.seek(int(start / stream.time_base), stream=stream)  # to the key frame at or before it
        for frame in container.decode(stream):
            if start is not None and frame.time < start - 0.5 / rate:
                continue
            held.append(frame.to_ndarray(format="rgb24"))
            if len(held) == count:
                return np.stack(held)
    raise SourceError(
        f"{path} has {len(held)} frames where {count} are needed; it is cut short: get it again"
    )


def _refuse_silent(container: Any, path: Path) -> None:
    if not container.streams.video:
        raise SourceError(f"{path} has no pictures in it")

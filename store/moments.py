"""Mean and variance in one pass, merged without loss: Chan, Golub & LeVeque, 1979."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import ColumnStatistics, Moments


@dataclass(frozen=True)
class Part:
    """Count, mean (D,) and sum of squared deviations (D,) of some rows."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]


def moments_of(rows: NDArray[np.generic]) -> Part:
    """Per element of the last axis, of rows (N, D), or of tokens (N, K, D) taken as N·K rows of D."""
    width = rows.shape[-1]
    flat = rows.reshape(-1, width).astype(np.float64)
    if not len(flat):
        return Part(0, np.zeros(width), np.zeros(width))
    mean = flat.mean(axis=0)
    flat -= mean  # in place: fresh memory for each step takes six times as long
    np.square(flat, out=flat)
    return Part(len(flat), mean, flat.sum(axis=0))


class RunningMoments:
    """Moments of rows that come in parts; their order decides the last bits."""

    def __init__(self, width: int) -> None:
        self._so_far = Part(0, np.zeros(width), np.zeros(width))

    def add(self, rows: NDArray[np.generic]) -> None:
        """Count these rows behind those so far."""
        self.merge(moments_of(rows))

    def merge(self, part: Part) -> None:
        """As :meth:`add`, of rows whose moments are known."""
        if not part.count:
            return
        before = self._so_far
        delta, count = part.mean - before.mean, before.count + part.count
        mean = before.mean + delta * (part.count / count)
        m2 = before.m2 + part.m2 + np.square(delta) * (before.count * part.count / count)
        self._so_far = Part(count, mean, m2)

    def told(self) -> Moments:
        """Of all rows so far."""
        all_ = self._so_far
        return Moments(count=all_.count, mean=tuple(all_.mean.tolist()), m2=tuple(all_.m2.tolist()))


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of the rows of all parts together."""
    parts = list(parts)
    running = RunningMoments(len(parts[0].mean))
    for part in parts:
        running.merge(Part(part.count, np.asarray(part.mean), np.asarray(part.m2)))
    return running.told()


def statistics_of(moments: Moments) -> ColumnStatistics:
    """Mean and population standard deviation."""
    std = np.sqrt(np.asarray(moments.m2) / max(moments.count, 1))
    return ColumnStatistics(count=moments.count, mean=moments.mean, std=tuple(std.tolist()))

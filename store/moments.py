"""Mean and variance in one pass, merged without loss: Chan, Golub & LeVeque, 1979."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import ColumnStatistics, Moments


class RunningMoments:
    """Moments per element of the last axis, of rows that come in parts; their order decides the last bits."""

    def __init__(self, width: int) -> None:
        self._count, self._mean, self._m2 = 0, np.zeros(width), np.zeros(width)

    def add(self, rows: NDArray[np.generic]) -> None:
        """Rows (N, D), or tokens (N, K, D) taken as N·K rows of D."""
        flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
        if not len(flat):
            return
        mean = flat.mean(axis=0)
        flat -= mean  # in place: fresh memory for each step takes six times as long
        np.square(flat, out=flat)
        self._merge(len(flat), mean, flat.sum(axis=0))

    def merge(self, part: Moments) -> None:
        """All rows of a part that was counted elsewhere."""
        if part.count:
            self._merge(part.count, np.asarray(part.mean), np.asarray(part.m2))

    def told(self) -> Moments:
        """Of all rows so far."""
        return Moments(count=self._count, mean=tuple(self._mean.tolist()), m2=tuple(self._m2.tolist()))

    def _merge(self, count: int, mean: NDArray[np.float64], m2: NDArray[np.float64]) -> None:
        delta, total = mean - self._mean, self._count + count
        self._mean = self._mean + delta * (count / total)
        self._m2 = self._m2 + m2 + np.square(delta) * (self._count * count / total)
        self._count = total


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of the rows of all parts together."""
    parts = list(parts)
    running = RunningMoments(len(parts[0].mean))
    for part in parts:
        running.merge(part)
    return running.told()


def statistics_of(moments: Moments) -> ColumnStatistics:
    """Mean and population standard deviation."""
    std = np.sqrt(np.asarray(moments.m2) / max(moments.count, 1))
    return ColumnStatistics(count=moments.count, mean=moments.mean, std=tuple(std.tolist()))

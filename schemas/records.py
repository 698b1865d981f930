"""Frozen records for one step and one episode: what environments make and stores hold.

Axes and alignment are in :mod:`pvrpipe.schemas.axes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import InvalidValueError


class Step(TypedDict):
    """What an environment shows on arriving at one row."""

    frame: NDArray[np.uint8]  # (H, W, C)
    state: NDArray[np.float32]  # (S,), S may be 0
    physics: NDArray[np.float64]  # (P,), P may be 0
    reward: float
    is_last: bool
    is_terminal: bool
    success: NotRequired[bool]  # where the environment says so


@dataclass(frozen=True)
class ArraySpec:
    """Name, dtype and shape of one row of a column."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class EpisodeInfo:
    """What is known of one episode besides its rows; one row of ``episodes.parquet``."""

    episode: int
    length: int  # transitions L; the episode has L + 1 rows
    episode_return: float
    seed: int
    policy: str
    variation: str = "none"
    terminated: bool = False  # the environment truly ended, time did not run out
    distribution: Literal["id", "ood"] = "id"
    values: Mapping[str, float] = field(default_factory=dict)  # further columns: factors, success


@dataclass(frozen=True, eq=False)
class Episode:
    """One whole episode of L transitions, hence L + 1 rows.

    ``arrays`` maps a column's name to an array whose first axis is time: ``frame`` (L+1, H, W, C) uint8,
    ``action`` (L+1, A) float32, ``reward`` (L+1,) float32, ``state`` (L+1, S) float32, ``physics``
    (L+1, P) float64, ``is_terminal`` (L+1,) bool. The other flags follow from the bounds.
    """

    info: EpisodeInfo
    arrays: Mapping[str, NDArray[np.generic]]

    def __post_init__(self) -> None:
        """Hold the alignment contract: equal lengths, zero reward first, zero action last."""
        rows = self.info.length + 1
        wrong = {name: array.shape for name, array in self.arrays.items() if len(array) != rows}
        if wrong:
            raise InvalidValueError(
                f"episode {self.info.episode} has {rows} rows, but these columns differ: {wrong}"
            )
        if "reward" in self.arrays and self.arrays["reward"][0] != 0:
            raise InvalidValueError(
                f"episode {self.info.episode}: the first row arrives from nowhere, its reward must be 0"
            )
        if "action" in self.arrays and np.any(self.arrays["action"][-1]):
            raise InvalidValueError(
                f"episode {self.info.episode}: nothing is done from the last row, its action must be 0"
            )

    def __len__(self) -> int:
        """Rows of the episode, L + 1."""
        return self.info.length + 1

    def __repr__(self) -> str:
        """Shapes instead of arrays."""
        shapes = ", ".join(f"{name}{list(a.shape)} {a.dtype}" for name, a in self.arrays.items())
        return f"Episode({self.info.episode}, return={self.info.episode_return:.3f}, {shapes})"

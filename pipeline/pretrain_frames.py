"""The frames that an encoder is trained on: kept in memory, resized, each with its partner some steps later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.schemas.specifications import Recipe
from pvrpipe.store.reading import Store

READ_BATCH = 64  # frames decoded at a time


@dataclass(frozen=True)
class Frames:
    """Frames of one split."""

    pixels: NDArray[np.uint8]
    """(N, side, side, 3)"""
    later: NDArray[np.int64]
    """(N,) which of them is seen later; -1 where the episode ends before"""

    @property
    def anchors(self) -> NDArray[np.int64]:
        """Those that have one."""
        return np.flatnonzero(self.later >= 0)


def frames_of(store: Store, split: str, most: int, recipe: Recipe, ahead: int = 0) -> Frames:
    """At most ``most`` frames of a split, evenly spaced, or pairs of them: partners are ``ahead`` steps later."""
    episodes = store.episodes.filter(store.episodes["split"] == split)
    stride = max(1, -(-int(episodes["rows"].sum()) // most))
    if ahead and stride > 1:
        stride = -(-int(episodes["rows"].sum()) // max(1, most // 2))  # each brings its partner
    pixels: list[NDArray[np.uint8]] = []
    later: list[NDArray[np.int64]] = []
    seen = begun = 0
    for record in episodes.iter_rows(named=True):
        steps = np.arange(-seen % stride, record["rows"], stride)
        seen += record["rows"]
        steps = np.union1d(steps, (steps + ahead)[steps + ahead < record["rows"]])
        pixels += list(_resized(store, record, steps, recipe))
        later.append(
            np.where(np.isin(steps + ahead, steps), begun + np.searchsorted(steps, steps + ahead), -1)
        )
        begun += len(steps)
    side = recipe.crop or 0
    empty: list[NDArray[Any]] = [np.zeros((0, side, side, 3), np.uint8)]
    return Frames(np.concatenate(pixels or empty), np.concatenate([np.zeros(0, np.int64), *later]))


def _resized(store: Store, record: dict[str, Any], steps: NDArray[np.int64], recipe: Recipe) -> Any:
    """Frames of an episode at these steps, 8 bits, in batches."""
    shard = store.shard(record["shard"])
    for at in range(0, record["rows"], READ_BATCH):
        count = min(READ_BATCH, record["rows"] - at)
        wanted = steps[(steps >= at) & (steps < at + count)] - at
        if len(wanted):
            frames = shard.rows("frame", record["row_start"] + at, count)[wanted]
            values = preprocess(torch.from_numpy(np.ascontiguousarray(frames)), recipe)
            yield ((values + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()

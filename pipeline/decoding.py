"""Rows of a shard for those who encode them: decoded ahead, frames into memory that the device copies from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pvrpipe.pipeline.transfers import ReadAhead, Upload, decoding_threads, in_order
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.schemas.manifest import Column
from pvrpipe.store.columns import with_bounds
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

CARRIED = ("action", "reward", "state")


def carried(store: Store) -> tuple[Column, ...]:
    """The columns of rollouts that their embeddings take over as they are."""
    return with_bounds(c for c in store.manifest.columns if c.name in CARRIED)


@dataclass(frozen=True)
class Decoded:
    """Some rows of a shard, and the seconds that it took to read them."""

    rows: dict[str, Rows]
    frames: Callable[[], Tensor]
    """(n, H, W, 3) uint8 on the device, when they have arrived there"""
    seconds: float


class ShardReader:
    """Reads shards of a rollout store for a device; the one that comes next can be begun while another is used."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._columns = [column.name for column in carried(store)]
        self._upload, self._threads = Upload(device), decoding_threads(device)
        self._begun: dict[tuple[int, int], ReadAhead[Decoded]] = {}

    def begin(self, shard: int, size: int) -> None:
        """Begin to read a shard in batches of ``size`` rows."""
        self._begun[shard, size] = ReadAhead(self._batches(shard, size))

    def batches(self, shard: int, size: int) -> ReadAhead[Decoded]:
        """A shard in batches of ``size`` rows, the last of what is left; they never cross into the next shard.

        Raises (when iterated over):
            StoreError: its frames cannot be read; names episode and step.
            torch.OutOfMemoryError: no room on the device.
        """
        return self._begun.pop((shard, size), None) or ReadAhead(self._batches(shard, size))

    def close(self) -> None:
        """Leave what was begun and never asked for."""
        for begun in self._begun.values():
            begun.close()
        self._begun.clear()

    def _batches(self, shard: int, size: int) -> Generator[Decoded, None, None]:
        total = self._store.manifest.shards[shard].rows
        read = in_order(partial(self._batch, shard, size, total), range(0, total, size), self._threads)
        with contextlib.closing(read):
            for rows, frames, seconds in read:
                yield Decoded(rows, self._upload(frames), seconds)

    def _batch(self, shard: int, size: int, total: int, start: int) -> tuple[dict[str, Rows], Tensor, float]:
        """Rows from ``start``, their frames where the device copies from, and how long that took."""
        began = time.perf_counter()
        frames = self._upload.room((min(size, total - start), *self._store.column("frame").shape))
        rows = self._read(shard, start, frames.numpy())
        return rows, frames, time.perf_counter() - began

    def _read(self, shard: int, start: int, frames: Rows) -> dict[str, Rows]:
        """Rows of a shard, the frames into ``frames``; where one cannot be read, its episode and step are named."""
        count = len(frames)
        try:
            opened = self._store.shard(shard)
            opened.rows("frame", start, count, frames)
            return {name: opened.rows(name, start, count) for name in self._columns}
        except PvrpipeError as error:
            if count == 1:
                raise type(error)(f"{self._where(shard, start)} cannot be read: {error}") from None
        half = count // 2
        first = self._read(shard, start, frames[:half])
        rest = self._read(shard, start + half, frames[half:])
        return {name: np.concatenate([first[name], rest[name]]) for name in self._columns}

    def _where(self, shard: int, row: int) -> str:
        record = next(r for r in reversed(self._store.records(shard)) if r.row_start <= row)
        return f"episode {record.episode}, step {row - record.row_start}"

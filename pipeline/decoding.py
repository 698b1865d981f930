"""Rows of a shard for those who encode them: decoded ahead, frames into memory that the device copies from."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvrpipe.pipeline.transfers import ReadAhead, Upload, decoding_threads, in_order
from pvrpipe.schemas.errors import PvrpipeError
from pvrpipe.schemas.manifest import Column
from pvrpipe.store.columns import with_bounds
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows, Shard

CARRIED = ("action", "reward", "state")
OPENED_AHEAD = 2  # shards: one thread may hash fewer frames than a GPU encodes; Ctrl-C waits for both


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


@dataclass(frozen=True)
class Part:
    """Rows of a shard that are read at a time."""

    shard: int
    start: int
    rows: int
    last: bool
    opened: Future[Shard]


Read = tuple[Part, Decoded | Exception]


class ShardReader:
    """Reads shards of a rollout store for a device."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._frame = store, store.column("frame").shape
        self._columns = [column.name for column in carried(store)]
        self._upload, self._threads = Upload(device), decoding_threads(device)
        self._coming: Iterator[Read] = iter(())
        self._announced: dict[int, int] = {}

    @contextlib.contextmanager
    def ahead(self, shards: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Within, these shards are read in this order, each in batches of so many rows, ahead of who asks for them.

        Where one ends makes no difference: so many batches are decoded ahead. And shards are opened ahead of that,
        because to open one is to prove or to fetch its file.
        """
        read = ReadAhead(self._read(shards))
        self._coming, self._announced = iter(read), dict(shards)
        try:
            yield
        finally:
            read.close()
            self._coming, self._announced = iter(()), {}

    def batches(self, shard: int, size: int) -> Generator[Decoded, None, None]:
        """A shard in batches of ``size`` rows, the last of what is left; they never cross into the next shard.

        Raises:
            StoreError: its frames cannot be read; names episode and step.
            torch.OutOfMemoryError: no room on the device.
        """
        if self._announced.pop(shard, None) == size:
            yield from _of(shard, self._coming)
            return
        with contextlib.closing(iter(ReadAhead(self._read([(shard, size)])))) as again:
            yield from _of(shard, again)

    def _read(self, shards: Sequence[tuple[int, int]]) -> Generator[Read, None, None]:
        """All parts of these shards in order; what becomes of one does not stop the others."""
        with (
            ThreadPoolExecutor(OPENED_AHEAD, thread_name_prefix="open") as opening,
            contextlib.closing(in_order(self._decoded, self._parts(shards, opening), self._threads)) as read,
        ):
            for part, found in read:
                try:
                    yield part, found if isinstance(found, Exception) else self._sent(*found)
                except torch.OutOfMemoryError as error:
                    yield part, error

    def _parts(self, shards: Sequence[tuple[int, int]], opening: Executor) -> Iterator[Part]:
        to_open = (opening.submit(self._store.shard, shard) for shard, _ in shards)
        opened = deque(itertools.islice(to_open, OPENED_AHEAD))
        for shard, size in shards:
            opened.extend(itertools.islice(to_open, 1))
            file, total = opened.popleft(), self._store.manifest.shards[shard].rows
            for start in range(0, total, size):
                yield Part(shard, start, min(size, total - start), start + size >= total, file)

    def _decoded(self, part: Part) -> tuple[Part, tuple[dict[str, Rows], Tensor, float] | Exception]:
        """The rows of a part, its frames where the device copies from, and how long that took; or what stopped it.

        Whatever that is: raised here it would end the reading of all shards, and be told before its own is asked for.
        """
        began = time.perf_counter()
        try:
            opened = self._opened(part)
            frames = self._upload.room((part.rows, *self._frame))
            rows = self._rows(opened, part.shard, part.start, frames.numpy())
        except Exception as error:
            return part, error
        return part, (rows, frames, time.perf_counter() - began)

    def _sent(self, rows: dict[str, Rows], frames: Tensor, seconds: float) -> Decoded:
        return Decoded(rows, self._upload(frames), seconds)

    def _opened(self, part: Part) -> Shard:
        try:
            return part.opened.result()
        except PvrpipeError as error:
            raise self._named(error, part.shard, part.start) from None

    def _rows(self, opened: Shard, shard: int, start: int, frames: Rows) -> dict[str, Rows]:
        """Rows of a shard, the frames into ``frames``; where one cannot be read, its episode and step are named."""
        count = len(frames)
        try:
            opened.rows("frame", start, count, frames)
            return {name: opened.rows(name, start, count) for name in self._columns}
        except PvrpipeError as error:
            if count == 1:
                raise self._named(error, shard, start) from None
        half = count // 2
        first = self._rows(opened, shard, start, frames[:half])
        rest = self._rows(opened, shard, start + half, frames[half:])
        return {name: np.concatenate([first[name], rest[name]]) for name in self._columns}

    def _named(self, error: PvrpipeError, shard: int, row: int) -> PvrpipeError:
        record = next(r for r in reversed(self._store.records(shard)) if r.row_start <= row)
        where = f"episode {record.episode}, step {row - record.row_start}"
        return type(error)(f"{where} cannot be read: {error}")


def _of(shard: int, read: Iterator[Read]) -> Generator[Decoded, None, None]:
    """The parts of one shard; before them may come what is left of others that were given up."""
    for part, found in read:
        if part.shard != shard:
            continue
        if isinstance(found, Exception):
            try:
                raise found
            finally:
                del found  # or it would hold the frames that it came through, and what they hold
        yield found
        if part.last:
            return

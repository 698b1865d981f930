"""Rows of a store under one running number over all its shards, gathered into windows."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.store.paging import PageRequests, available_memory
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

Backing = Literal["auto", "mapped", "ram"]
BACKINGS = ("auto", "mapped", "ram")
NARROW = 64  # bytes; below this a row is not worth a copy of its own,
RESIDENT_LIMIT = 64 << 20  # and a whole column of this size is kept in memory and gathered in one call
LARGE = 32 << 20  # bytes; a batch from this size on is written into memory that was used before
KEPT_LARGE = 6  # such batches: three read ahead, one being read, one with the consumer and one to spare
RAM_SHARE = 0.5  # of the available memory, which columns that cannot be mapped may take
CACHED_SHARE = 0.5  # of it, in which pages asked for are taken to be still there


@dataclass(frozen=True, eq=False)
class Pieces:
    """Runs of consecutive rows that make up the windows of a batch: four arrays of equal length."""

    batch: int
    length: int
    window: NDArray[np.int64]
    """the window that a run belongs to"""
    offset: NDArray[np.int64]
    """its first row within the window"""
    start: NDArray[np.int64]
    """its first row in the store"""
    count: NDArray[np.int64]
    """its rows"""

    @classmethod
    def unbroken(cls, starts: NDArray[np.int64], length: int) -> Pieces:
        """Windows of one run each."""
        zero = np.zeros_like(starts)
        return cls(len(starts), length, np.arange(len(starts)), zero, starts, zero + length)

    @property
    def whole(self) -> bool:
        """Whether every window is one run."""
        return len(self.start) == self.batch

    def views(self, out: Rows) -> Iterator[Rows]:
        """The part of a batch (B, T, ...) that each run fills."""
        runs = (a.tolist() for a in (self.window, self.offset, self.count))
        return (out[window, offset : offset + count] for window, offset, count in zip(*runs, strict=True))

    @property
    def rows(self) -> NDArray[np.int64]:
        """The number of every row, (B, T)."""
        if self.whole:
            return self.start[:, None] + np.arange(self.length)
        run = np.repeat(self.start - np.cumsum(self.count) + self.count, self.count)
        return (run + np.arange(self.batch * self.length)).reshape(self.batch, self.length)


class _Memory:
    """All runs of ``size`` bytes that begin in a range of addresses, as NumPy's array interface has it."""

    def __init__(self, first: int, last: int, size: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (first, True),
            "typestr": f"|V{size}",
            "shape": (last - first + 1,),
            "strides": (1,),
        }


def gather_runs(addresses: NDArray[np.int64], size: int) -> NDArray[np.void]:
    """Copy ``size`` bytes from each address, (n,): one call of NumPy, whatever number of files they lie in.

    Row by row, or window by window in Python, takes twice the time. The caller has made sure that every run lies
    whole in an array that it holds on to.
    """
    first = int(addresses.min())
    runs: NDArray[np.void] = np.asarray(_Memory(first, int(addresses.max()), size))
    return runs[addresses - first]


class LargeBatches:
    """Memory for large batches, used again once nobody holds the batch that lay there.

    The C library gives blocks of this size back to the kernel when they are freed; getting the next one page by page
    costs as much as the copy itself.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self._choosing = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Rows:
        """An array that nobody else holds, its content undefined."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._choosing:
            for block in self._blocks:
                if block.nbytes == size and sys.getrefcount(block) == 3:  # the list, the loop, the call
                    return block.view(dtype).reshape(shape)
            self._blocks = [*self._blocks[1 - KEPT_LARGE :], np.empty(size, np.uint8)]
            return self._blocks[-1].view(dtype).reshape(shape)


class RowReader:
    """Windows of columns, from the mapped files or from memory.

    ``auto`` maps what can be mapped; columns that cannot (zstd frames) are decoded once and kept, where
    half of the free memory holds them, and decoded again and again where it does not.
    """

    def __init__(self, store: Store, columns: tuple[str, ...], backing: Backing = "auto") -> None:
        if backing not in BACKINGS:
            raise UnknownNameError.among("backing", backing, BACKINGS)
        self._store = store
        groups = [
            (s, g, rows)
            for s, entry in enumerate(store.manifest.shards)
            for g, rows in enumerate(entry.row_groups)
        ]
        self._group = [(shard, group) for shard, group, _ in groups]
        self._group_first = np.cumsum([0, *(rows for _, _, rows in groups)])
        episodes = store.episodes
        self._episode_first = episodes["row_first"].to_numpy().astype(np.int64)
        self._episode_last = self._episode_first + episodes["rows"].to_numpy() - 1
        self._terminated = episodes["terminated"].to_numpy()
        self._resident: dict[str, Rows] = {}
        self._pieces: dict[str, dict[int, Rows]] = {}
        self._addresses: dict[str, NDArray[np.int64]] = {}
        self._requests: dict[str, PageRequests] = {}
        self._available = available_memory()
        self._large = LargeBatches()
        self._kept = frozenset(self._to_keep(columns, backing))
        self.backing = self._said(columns, backing)

    def windows(self, name: str, pieces: Pieces) -> Rows:
        """The rows of a column, (B, T, *shape)."""
        if name in ("is_first", "is_last", "is_terminal"):
            return self._flags(name, pieces.rows)
        column = self._store.column(name)
        width = column.width
        if width <= NARROW and width * self._store.manifest.rows <= RESIDENT_LIMIT:
            return self._whole(name)[pieces.rows]
        shape = (pieces.batch, pieces.length, *column.shape)
        large = pieces.batch * pieces.length * width >= LARGE
        if name in self._kept:
            out = self._empty(shape, column.dtype, large)
            return np.take(self._whole(name), pieces.rows, axis=0, out=out, mode="clip")
        groups = np.searchsorted(self._group_first, pieces.start, "right") - 1
        at = pieces.start - self._group_first[groups]
        addresses = self._mapped_at(name, groups)
        if addresses is not None:
            self._requests[name].ask(groups, addresses, at * width, pieces.count * width)
            within = bool((pieces.start + pieces.count <= self._group_first[groups + 1]).all())
            if pieces.whole and within and not large:
                runs = gather_runs(addresses + at * width, pieces.length * width)
                return runs.view(column.dtype).reshape(shape)
        out = self._empty(shape, column.dtype, large)
        mapped = self._pieces.setdefault(name, {})
        targets: Iterable[Rows] = out if pieces.whole else pieces.views(out)
        for target, group, first in zip(targets, groups.tolist(), at.tolist(), strict=True):
            piece = mapped.get(group)
            if piece is None:
                piece = self._piece(name, group)
            rows = piece[first : first + len(target)]
            if len(rows) == len(target):
                target[:] = rows
            else:
                self._across(name, group, first, target)
        return out

    def _empty(self, shape: tuple[int, ...], dtype: str, large: bool) -> Rows:
        """Memory for a batch."""
        return self._large.empty(shape, dtype) if large else np.empty(shape, dtype)

    def _mapped_at(self, name: str, groups: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Where row groups are mapped; None unless each of them is."""
        known = self._addresses.get(name)
        if known is None:
            known = self._addresses[name] = np.zeros(len(self._group), np.int64)
            sizes = np.diff(self._group_first) * self._store.column(name).width
            self._requests[name] = PageRequests(sizes, int(CACHED_SHARE * self._available))
        for group in set(groups[known[groups] == 0].tolist()):
            index, _ = self._group[group]
            if self._store.shard(index).mapped(name) is None:
                return None
            piece = self._piece(name, group)
            if len(piece) != self._group_first[group + 1] - self._group_first[group]:
                return None
            known[group] = piece.ctypes.data
        return known[groups]

    def _to_keep(self, columns: tuple[str, ...], backing: Backing) -> list[str]:
        """The columns that are kept in memory."""
        flags = {"is_first", "is_last", "is_terminal"}
        wide = [self._store.column(name) for name in columns if name not in flags]
        if backing == "mapped":
            return []
        if backing == "auto":
            wide = [c for c in wide if c.layout == "packed"]
        wanted = sum(c.width for c in wide) * self._store.manifest.rows
        fits = wanted <= RAM_SHARE * self._available
        if not fits and backing == "ram":
            raise InvalidValueError(
                f"{', '.join(c.name for c in wide)} of {self._store.path} take {wanted >> 20} MiB, more than half "
                "of the available memory; read them mapped"
            )
        return [c.name for c in wide] if fits else []

    def _said(self, columns: tuple[str, ...], backing: Backing) -> str:
        """Where the columns are read from, for a person."""
        if backing == "ram":
            return "in memory"
        packed = [n for n in columns if n in self._store.columns and self._store.column(n).layout == "packed"]
        packed = [n for n in packed if not n.startswith("is_")]
        if not packed:
            return "mapped files"
        where = "in memory" if set(packed) <= self._kept else "decoded when read"
        return f"mapped files, {', '.join(packed)} {where}"

    def _across(self, name: str, group: int, first: int, out: Rows) -> None:
        """Fill a run that does not end in the row group it begins in."""
        done = 0
        while done < len(out):
            piece = self._piece(name, group)[first : first + len(out) - done]
            out[done : done + len(piece)] = piece
            done, group, first = done + len(piece), group + 1, 0

    def _piece(self, name: str, group: int) -> Rows:
        """A column's rows of one row group; a mapped one is remembered, a decoded one is not."""
        index, within = self._group[group]
        shard = self._store.shard(index)
        piece = shard.group(name, within)
        if shard.mapped(name) is not None:
            self._pieces.setdefault(name, {})[group] = piece
        return piece

    def _whole(self, name: str) -> Rows:
        """A column of the whole store, kept in memory."""
        if name not in self._resident:
            self._resident[name] = np.concatenate([self._piece(name, g) for g in range(len(self._group))])
        return self._resident[name]

    def _flags(self, name: str, rows: NDArray[np.int64]) -> Rows:
        """A flag follows from the episode table; no shard is read for it."""
        episode = np.searchsorted(self._episode_first, rows, "right") - 1
        if name == "is_first":
            return rows == self._episode_first[episode]
        is_last = rows == self._episode_last[episode]
        return is_last if name == "is_last" else is_last & self._terminated[episode]

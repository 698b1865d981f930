"""One shard, read: arrays mapped out of the file where it proves them, decoded otherwise."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import CorruptStoreError, UnknownNameError
from pvrpipe.schemas.manifest import Column, Manifest
from pvrpipe.store.mapping import Span, map_file

Rows = NDArray[np.generic]
Group = tuple[int, str, int]  # shard, column, group
DECODED_BYTES = 64 << 20  # of decoded groups that are kept for whoever reads on where he was


class Decoded:
    """The groups that were decoded last, of all shards of a store: memory does not grow with the store."""

    def __init__(self, limit: int = DECODED_BYTES) -> None:
        self._limit, self._held, self._lock = limit, 0, threading.Lock()
        self._groups: dict[Group, Rows] = {}

    def get(self, group: Group) -> Rows | None:
        """A group, if it is still there."""
        with self._lock:
            rows = self._groups.pop(group, None)
            if rows is not None:
                self._groups[group] = rows  # last in order, so dropped last
            return rows

    def keep(self, group: Group, rows: Rows) -> None:
        """Keep a group in place of those used longest ago; one that is larger than the limit is not kept."""
        with self._lock:
            if group in self._groups or rows.nbytes > self._limit:
                return
            self._groups[group] = rows
            self._held += rows.nbytes
            while self._held > self._limit:
                self._held -= self._groups.pop(next(iter(self._groups))).nbytes


class Shard(ABC):
    """One file of a store. Its rows lie in groups: Parquet's row groups, or a tar's episodes."""

    def __init__(self, folder: Path, manifest: Manifest, index: int, decoded: Decoded | None = None) -> None:
        entry = manifest.shards[index]
        self.path, self.manifest, self.groups = folder / entry.file, manifest, entry.row_groups
        if not self.path.is_file() or self.path.stat().st_size != entry.bytes:
            raise self.corrupt(f"is missing or not {entry.bytes} bytes long")
        try:
            self.data = map_file(self.path)  # no descriptor stays open, however many shards there are
        except OSError as error:
            raise self.corrupt(f"cannot be read ({error})") from None
        self.first = np.cumsum((0, *self.groups))  # first row of each group, and the end
        self._mapped: dict[str, tuple[Rows, ...] | None] = {}
        self._number, self._decoded = index, decoded or Decoded()

    @abstractmethod
    def check_layout(self) -> Iterator[tuple[str, str]]:
        """What is not laid out as the manifest says: (column or empty, what is wrong)."""

    @abstractmethod
    def _spans(self, column: Column) -> tuple[Span, ...] | None:
        """Where the groups of a column lie in the file, or None where the file does not prove it."""

    def _read_group(self, name: str, group: int) -> Rows:
        """Decode the rows of one group of a column that cannot be mapped, where the format can do that."""
        raise self.corrupt(f"column '{name}', group {group}: cannot be mapped")

    def _read_into(self, name: str, group: int, out: Rows) -> None:
        """All rows of one group into ``out``, on no detour where the format can do that."""
        out[:] = self.group(name, group)

    def mapped(self, name: str) -> tuple[Rows, ...] | None:
        """The column's groups as arrays in the mapped file, or None if the file does not prove them."""
        if name not in self._mapped:
            column = self.column(name)
            spans = self._spans(column)
            self._mapped[name] = None if spans is None else tuple(self._view(s, column) for s in spans)
        return self._mapped[name]

    def group(self, name: str, group: int) -> Rows:
        """A column's rows of one group, mapped where that is proven, else decoded."""
        mapped = self.mapped(name)
        if mapped is not None:
            return mapped[group]
        rows = self._decoded.get((self._number, name, group))
        if rows is None:
            rows = self._read_group(name, group)
            self._decoded.keep((self._number, name, group), rows)
        return rows

    def rows(self, name: str, start: int, count: int, out: Rows | None = None) -> Rows:
        """``count`` rows from ``start``, as an array of their own or into ``out``."""
        column = self.column(name)
        found = np.empty((count, *column.shape), column.dtype) if out is None else out
        groups = range(
            int(np.searchsorted(self.first, start, "right")) - 1,
            int(np.searchsorted(self.first, start + count)),
        )
        for group in groups:
            first, end = int(self.first[group]), int(self.first[group + 1])
            low, high = max(start, first), min(start + count, end)
            if (low, high) == (first, end):
                self._read_into(name, group, found[low - start : high - start])
            else:
                found[low - start : high - start] = self.group(name, group)[low - first : high - first]
        return found

    def batches(self, columns: Sequence[str], size: int) -> Iterator[dict[str, Rows]]:
        """All rows in order, ``size`` at a time; the last batch may be shorter. Memory: one group."""
        total = int(self.first[-1])
        for start in range(0, total, size):
            count = min(size, total - start)
            yield {name: self.rows(name, start, count) for name in columns}

    def column(self, name: str) -> Column:
        """The column of that name."""
        found = self.manifest.column(name)
        if found is None:
            raise UnknownNameError.among(
                "column", name, [c.name for c in self.manifest.columns], hint=f"of {self.path}"
            )
        return found

    def corrupt(self, what: str) -> CorruptStoreError:
        """The error that says what is wrong with this file."""
        return CorruptStoreError(f"{self.path} {what}; run `pvrpipe verify {self.path.parent.parent}`")

    def _view(self, span: Span, column: Column) -> Rows:
        data = self.data[span.offset : span.offset + span.rows * column.width]
        return data.view(column.dtype).reshape(span.rows, *column.shape)

"""Random windows of consecutive rows, cut straight out of the mapped shards.

The k-th batch is a pure function of the seed and k, so the sampler has no state: a run resumes by
remembering how many batches it has taken, and two readers of one store see the same windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

DRAWN_TOGETHER = 64  # batches whose windows are drawn in one call
NARROW = 64  # bytes; below this a row is not worth a copy of its own,
RESIDENT_LIMIT = 64 << 20  # and a whole column of this size is kept in memory and gathered in one call


class WindowSampler:
    """Batches of B windows of T rows, each within one episode, uniform over all such windows.

    Args:
        store: a sealed store.
        columns: what each batch holds; a column that is not named is never read.
        batch: B, windows in a batch.
        length: T, rows in a window.
        seed: decides every batch.
        split: ``train`` or ``val``.

    Raises:
        InvalidValueError: no episode of the split has T rows.
    """

    def __init__(
        self,
        store: Store,
        columns: Sequence[str],
        *,
        batch: int,
        length: int,
        seed: int,
        split: str = "train",
    ) -> None:
        if batch < 1 or length < 1:
            raise InvalidValueError(f"--batch is {batch} and --length {length}; both must be at least 1")
        of_split = store.episodes.filter(store.episodes["split"] == split)
        episodes = of_split.filter(of_split["rows"] >= length)
        if not len(episodes):
            longest = max(of_split["rows"].to_list(), default=0)
            cure = "give a smaller --length" if longest else "collect more episodes"
            raise InvalidValueError(
                f"no {split} episode of {store.path} has {length} rows (the longest has {longest}); {cure}"
            )
        self.columns, self.batch_size, self.length, self.seed = tuple(columns), batch, length, seed
        self._episode_first = episodes["row_first"].to_numpy().astype(np.int64)
        self._windows_until = np.cumsum(episodes["rows"].to_numpy().astype(np.int64) - length + 1)
        self._rows = RowReader(store)
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    @property
    def windows(self) -> int:
        """How many different windows there are."""
        return int(self._windows_until[-1])

    def starts(self, k: int) -> NDArray[np.int64]:
        """First rows, counted over the whole store, of the windows of batch k, (B,)."""
        block, within = divmod(k, DRAWN_TOGETHER)
        if self._drawn is None or self._drawn[0] != block:
            random = np.random.default_rng((self.seed, block))
            self._drawn = block, random.integers(self.windows, size=(DRAWN_TOGETHER, self.batch_size))
        window = self._drawn[1][within]
        episode = np.searchsorted(self._windows_until, window, "right")
        windows_before = np.where(episode > 0, self._windows_until[episode - 1], 0)
        return self._episode_first[episode] + window - windows_before

    def batch(self, k: int) -> dict[str, Rows]:
        """Batch k: column → array (B, T, *shape)."""
        starts = self.starts(k)
        return {name: self._rows.windows(name, starts, self.length) for name in self.columns}


class RowReader:
    """The rows of a store under one running number, over all its shards."""

    def __init__(self, store: Store) -> None:
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

    def windows(self, name: str, starts: NDArray[np.int64], length: int) -> Rows:
        """Rows ``starts[i] … starts[i] + length`` of a column, (B, T, *shape)."""
        if name in ("is_first", "is_last", "is_terminal"):
            return self._flags(name, starts[:, None] + np.arange(length))
        column = self._store.column(name)
        if column.width <= NARROW and column.width * self._store.manifest.rows <= RESIDENT_LIMIT:
            return self._whole(name)[starts[:, None] + np.arange(length)]
        out = np.empty((len(starts), length, *column.shape), column.dtype)
        groups = np.searchsorted(self._group_first, starts, "right") - 1
        at = starts - self._group_first[groups]
        mapped = self._pieces.setdefault(name, {})
        for i, (group, first) in enumerate(zip(groups.tolist(), at.tolist(), strict=True)):
            piece = mapped.get(group)
            if piece is None:
                piece = self._piece(name, group)
            if first + length <= len(piece):
                out[i] = piece[first : first + length]
            else:
                self._across(name, group, first, out[i])
        return out

    def _across(self, name: str, group: int, first: int, out: Rows) -> None:
        """Fill a window that does not end in the row group it begins in."""
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
        """A narrow column of the whole store, kept in memory."""
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

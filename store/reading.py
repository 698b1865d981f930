"""A sealed store, read: by episode, by batch, or as arrays that windows are cut from."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pvrpipe.schemas.errors import CorruptStoreError, NotAStoreError, UnfinishedStoreError, UnknownNameError
from pvrpipe.schemas.manifest import Column, EpisodeRecord, Manifest
from pvrpipe.store.cache import Cache
from pvrpipe.store.columns import decode
from pvrpipe.store.layout import EPISODES, read_manifest
from pvrpipe.store.mapping import map_file, proven_spans
from pvrpipe.store.places import Place, Url, place_of
from pvrpipe.store.remote import Mirror

Rows = NDArray[np.generic]
SHARDS_OPEN = 256  # mapped at once; a map costs a file descriptor


class Store:
    """A sealed store. Opening it reads the manifest and the episode table, no rows."""

    def __init__(
        self, path: Place, manifest: Manifest, episodes: pl.DataFrame, mirror: Mirror | None = None
    ) -> None:
        self.path, self.manifest, self.episodes, self._mirror = path, manifest, episodes, mirror
        self.shard = functools.lru_cache(maxsize=SHARDS_OPEN)(self._open_shard)

    @classmethod
    def open(
        cls,
        path: Place | str,
        kind: Literal["rollouts", "embeddings"] | None = None,
        cache: Cache | None = None,
    ) -> Store:
        """Open a store, of a given kind where only that will do.

        Args:
            path: a folder, or any URL that fsspec reads; shards behind a URL are fetched when they are opened.
            kind: refuse the other kind.
            cache: where they are fetched to; default: what ``PVRPIPE_CACHE`` says.

        Raises:
            NotAStoreError: there is none, or it is of the other kind.
            UnfinishedStoreError: it was begun and never sealed.
            NewerFormatError, CorruptStoreError: it cannot be read.
            UnreachableError, MissingDriverError: the URL cannot be read.
        """
        path = place_of(path)
        mirror = Mirror(path, cache) if isinstance(path, Url) else None
        manifest = mirror.manifest if mirror is not None else read_manifest(Path(str(path)))
        if kind is not None and manifest.kind != kind:
            cure = (
                "embed it first: `pvrpipe embed`"
                if kind == "embeddings"
                else "give the rollout store it was made from"
            )
            raise NotAStoreError(f"{path} holds {manifest.kind}, but {kind} are needed here; {cure}")
        if manifest.state != "sealed":
            command = "collect" if manifest.kind == "rollouts" else "embed"
            raise UnfinishedStoreError(
                f"{path} was begun and not finished; run the same `pvrpipe {command}` again to finish it"
            )
        episodes = mirror.fetch(EPISODES) if mirror is not None else Path(str(path), EPISODES)
        try:
            table = pl.read_parquet(episodes)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise CorruptStoreError(
                f"{path}/{EPISODES} cannot be read ({error}); run `pvrpipe verify {path}`"
            ) from None
        row_first = pl.col("rows").cum_sum() - pl.col("rows")
        return cls(path, manifest, table.with_columns(row_first=row_first), mirror)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A file of the store on this machine, fetched if need be; behind a URL it may go afterwards.

        Raises:
            CorruptStoreError: what lies behind the URL is not what the manifest promises.
        """
        if self._mirror is None:
            yield Path(str(self.path), name)
        else:
            with self._mirror.holding(name) as path:
                yield path

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(c.name for c in self.manifest.columns)

    def column(self, name: str) -> Column:
        """The column of that name."""
        found = self.manifest.column(name)
        if found is None:
            raise UnknownNameError.among("column", name, self.columns, hint=f"of {self.path}")
        return found

    def _open_shard(self, index: int) -> Shard:
        """One shard; kept open while it is among those used last."""
        with self.file(self.manifest.shards[index].file) as file:
            shard = Shard(file.parent.parent, self.manifest, index)
            if self._mirror is not None:  # the file may go from its cache; its maps stay
                for column in self.manifest.columns:
                    shard.mapped(column.name)
            return shard

    def records(self, shard: int) -> tuple[EpisodeRecord, ...]:
        """The episodes of one shard."""
        rows = self.episodes.filter(self.episodes["shard"] == shard).drop("row_first").to_dicts()
        return tuple(EpisodeRecord.model_validate(row) for row in rows)

    def read_episode(self, episode: int, columns: Sequence[str] | None = None) -> dict[str, Rows]:
        """The rows of one episode: column → array (L+1, ...)."""
        row = self.episodes.row(episode, named=True)
        shard = self.shard(row["shard"])
        return {name: shard.rows(name, row["row_start"], row["rows"]) for name in columns or self.columns}

    def __repr__(self) -> str:
        """Kind, size and place."""
        m = self.manifest
        return (
            f"Store({self.path}, {m.kind}, {m.episodes} episodes, {m.rows} rows, {', '.join(self.columns)})"
        )


class Shard:
    """One Parquet file of a store."""

    def __init__(self, path: Path, manifest: Manifest, index: int) -> None:
        entry = manifest.shards[index]
        self.path = path / entry.file
        if not self.path.is_file() or self.path.stat().st_size != entry.bytes:
            raise CorruptStoreError(
                f"{self.path} is missing or not {entry.bytes} bytes long; run `pvrpipe verify {path}`"
            )
        try:
            self._parquet = pq.ParquetFile(self.path)
        except (OSError, pa.ArrowException) as error:
            raise CorruptStoreError(
                f"{self.path} cannot be read ({error}); run `pvrpipe verify {path}`"
            ) from None
        self._manifest = manifest
        self.groups = entry.row_groups
        footer = self._parquet.metadata
        if tuple(footer.row_group(g).num_rows for g in range(footer.num_row_groups)) != self.groups:
            raise CorruptStoreError(
                f"{self.path} has other row groups than the manifest says; run `pvrpipe verify {path}`"
            )
        self.first = np.cumsum((0, *self.groups))  # first row of each row group, and the end
        self._bytes: NDArray[np.uint8] | None = None
        self._mapped: dict[str, tuple[Rows, ...] | None] = {}
        self._read = functools.lru_cache(maxsize=2)(self._read_group)

    def mapped(self, name: str) -> tuple[Rows, ...] | None:
        """The column's row groups as arrays in the mapped file, or None if the file does not prove them."""
        if name not in self._mapped:
            column = self._column(name)
            spans = proven_spans(self.path, self._parquet.metadata, column)
            if spans is not None:
                if self._bytes is None:
                    self._bytes = map_file(self.path)
                data = self._bytes
                self._mapped[name] = tuple(
                    data[s.offset : s.offset + s.rows * column.width]
                    .view(column.dtype)
                    .reshape(s.rows, *column.shape)
                    for s in spans
                )
            else:
                self._mapped[name] = None
        return self._mapped[name]

    def group(self, name: str, group: int) -> Rows:
        """A column's rows of one row group, mapped where that is proven, else decoded."""
        mapped = self.mapped(name)
        return mapped[group] if mapped is not None else self._read(name, group)

    def rows(self, name: str, start: int, count: int) -> Rows:
        """``count`` rows from ``start``, as an array of its own."""
        column = self._column(name)
        out = np.empty((count, *column.shape), column.dtype)
        done = 0
        while done < count:
            group = int(np.searchsorted(self.first, start + done, "right")) - 1
            at = start + done - int(self.first[group])
            piece = self.group(name, group)[at : at + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def batches(self, columns: Sequence[str], size: int) -> Iterator[dict[str, Rows]]:
        """All rows in order, ``size`` at a time; the last batch may be shorter. Memory: one row group."""
        total = int(self.first[-1])
        for start in range(0, total, size):
            count = min(size, total - start)
            yield {name: self.rows(name, start, count) for name in columns}

    def _column(self, name: str) -> Column:
        found = self._manifest.column(name)
        if found is None:
            raise UnknownNameError.among(
                "column", name, [c.name for c in self._manifest.columns], hint=f"of {self.path}"
            )
        return found

    def _read_group(self, name: str, group: int) -> Rows:
        """Ordinary Parquet: decompress and decode one row group of one column."""
        column = self._column(name)
        try:
            table = self._parquet.read_row_group(group, columns=[name], use_threads=False)
            return decode(column, table.column(name))
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise CorruptStoreError(
                f"{self.path}, column '{name}' cannot be read ({error}); run `pvrpipe verify`"
            ) from None

"""A sealed store, read: by episode, by batch, or as arrays that windows are cut from."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import polars as pl

from pvrpipe.schemas.errors import CorruptStoreError, NotAStoreError, UnfinishedStoreError, UnknownNameError
from pvrpipe.schemas.manifest import Column, EpisodeRecord, Manifest
from pvrpipe.store.cache import Cache
from pvrpipe.store.episodes import read_episodes
from pvrpipe.store.files import sha256_of
from pvrpipe.store.layout import read_manifest
from pvrpipe.store.parquet import ParquetShard
from pvrpipe.store.places import Place, Url, place_of
from pvrpipe.store.remote import Mirror
from pvrpipe.store.shards import Decoded, Rows, Shard
from pvrpipe.store.webdataset import WebDatasetShard

SHARDS_OPEN = 256  # mapped at once; a map costs a file descriptor


class Store:
    """A sealed store. Opening it reads the manifest and the episode table, no rows."""

    def __init__(
        self,
        path: Place,
        manifest: Manifest,
        episodes: pl.DataFrame,
        mirror: Mirror | None = None,
        prove: bool = False,
    ) -> None:
        self.path, self.manifest, self.episodes, self._mirror = path, manifest, episodes, mirror
        self._decoded = Decoded()
        self._prove, self._proven = prove and mirror is None, set[int]()  # what was fetched was proven then
        self._opened = functools.lru_cache(maxsize=SHARDS_OPEN)(self._open_shard)
        self._opening = [threading.Lock() for _ in manifest.shards]

    @classmethod
    def open(
        cls,
        path: Place | str,
        kind: Literal["rollouts", "embeddings"] | None = None,
        revision: int | None = None,
        cache: Cache | None = None,
        prove: bool = False,
    ) -> Store:
        """Open a store, of a given kind where only that will do.

        Args:
            path: a folder, or any URL that fsspec reads; shards behind a URL are fetched when they are opened.
            kind: refuse the other kind.
            revision: the newest, or an earlier one as it was.
            cache: where they are fetched to; default: what ``PVRPIPE_CACHE`` says.
            prove: refuse a local shard whose sha256 is not the manifest's, when it is opened for the first time.
                Behind a URL that is always done.

        Raises:
            NotAStoreError: there is none, or it is of the other kind.
            UnfinishedStoreError: it was begun and never sealed.
            NewerFormatError, CorruptStoreError: it cannot be read.
            UnreachableError, MissingDriverError: the URL cannot be read.
        """
        path = place_of(path)
        mirror = Mirror(path, cache) if isinstance(path, Url) else None
        manifest = (
            mirror.revision(revision) if mirror is not None else read_manifest(Path(str(path)), revision)
        )
        if kind is not None and manifest.kind != kind:
            cure = (
                "embed it first: `pvrpipe embed`"
                if kind == "embeddings"
                else "give the rollout store it was made from"
            )
            raise NotAStoreError(f"{path} holds {manifest.kind}, but {kind} are needed here; {cure}")
        if manifest.state != "sealed":
            command = "collect" if manifest.kind == "rollouts" else "embed"
            command = "merge`, `split` or `convert" if manifest.taken else command
            raise UnfinishedStoreError(
                f"{path} was begun and not finished; run the same `pvrpipe {command}` again to finish it"
            )
        name = manifest.episodes_file
        episodes = mirror.fetch(name) if mirror is not None else Path(str(path), name)
        return cls(path, manifest, read_episodes(episodes, manifest, f"{path}/{name}"), mirror, prove)

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

    def shard(self, index: int) -> Shard:
        """One shard; kept open while it is among those used last. Of threads that ask for it, one opens it."""
        with self._opening[index]:
            return self._opened(index)

    def _open_shard(self, index: int) -> Shard:
        kind = ParquetShard if self.manifest.shard_format == "parquet" else WebDatasetShard
        with self.file(self.manifest.shards[index].file) as file:  # it may go from its cache, its map stays
            if self._prove and index not in self._proven:
                self._refuse_another(file, self.manifest.shards[index].sha256)
                self._proven.add(index)
            return kind(file.parent.parent, self.manifest, index, self._decoded)

    def _refuse_another(self, file: Path, promised: str) -> None:
        """Nobody is to compute with bytes that are not those of the store.

        Raises:
            CorruptStoreError: the file is missing, or has another sha256.
        """
        found = sha256_of(file) if file.is_file() else "no bytes at all"
        if found != promised:
            raise CorruptStoreError(
                f"{file} has sha256 {found[:12]}…, not {promised[:12]}…; run `pvrpipe verify {self.path}`, "
                "then get the shard again"
            )

    def records(self, shard: int) -> tuple[EpisodeRecord, ...]:
        """The episodes of one shard."""
        rows = self.episodes.filter(self.episodes["shard"] == shard).drop("row_first").to_dicts()
        return tuple(EpisodeRecord.of_row(row) for row in rows)

    def read_episode(self, episode: int, columns: Sequence[str] | None = None) -> dict[str, Rows]:
        """The rows of one episode: column → array (L+1, ...)."""
        row = self.episodes.row(episode, named=True)
        shard = self.shard(row["shard"])
        return {name: shard.rows(name, row["row_start"], row["rows"]) for name in columns or self.columns}

    def __reduce__(self) -> tuple[object, ...]:
        """For a process of its own: it opens the store itself, at the same revision."""
        return Store.open, (self.path, self.manifest.kind, self.manifest.revision, None, self._prove)

    def __repr__(self) -> str:
        """Kind, size and place."""
        m = self.manifest
        return (
            f"Store({self.path}, {m.kind}, {m.episodes} episodes, {m.rows} rows, {', '.join(self.columns)})"
        )

"""Episodes of one or several stores, in order, as another store or file is to hold them."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pvrpipe.schemas.errors import CorruptStoreError, InvalidValueError
from pvrpipe.schemas.manifest import Column, EpisodeRecord, Part, Taken
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.casting import cast_embedding
from pvrpipe.store.files import sha256_of
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

Dtype = Literal["float16", "float32"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which episodes, renumbered from 0; their columns are those of the first store."""

    chosen: tuple[tuple[Store, int], ...]
    """store and number of each episode"""
    dtype: Dtype | None = None
    """of embeddings; None: as they are"""
    licence: str | None = None
    """of the weights; None: as it is"""
    _proven: set[tuple[Store, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """A precision is asked only of embeddings."""
        if self.dtype is not None and self.store.manifest.embeddings is None:
            raise InvalidValueError(
                f"{self.store.path} holds rollouts, whose columns have one precision; leave --dtype out"
            )

    @classmethod
    def of(cls, store: Store, episodes: Iterable[int] | None = None, dtype: Dtype | None = None) -> Selection:
        """Some episodes of a store, or all of them."""
        numbers = range(store.manifest.episodes) if episodes is None else episodes
        return cls(tuple((store, int(episode)) for episode in numbers), dtype)

    def __len__(self) -> int:
        """Episodes."""
        return len(self.chosen)

    @property
    def store(self) -> Store:
        """The store that the first episode comes from; it decides columns and format."""
        return self.chosen[0][0]

    @property
    def stores(self) -> tuple[Store, ...]:
        """All stores that episodes come from."""
        return tuple(dict.fromkeys(store for store, _ in self.chosen))

    @property
    def total_rows(self) -> int:
        """Rows of all episodes together."""
        return sum(record.rows for record in self.records)

    @property
    def columns(self) -> tuple[Column, ...]:
        """What each row holds."""
        return tuple(self._column(column) for column in self.store.manifest.columns)

    @property
    def parts(self) -> tuple[Part, ...]:
        """How the episodes were made; those of one part of one store are one part again."""
        parts: list[Part] = []
        known = {store: store.manifest.all_parts for store in self.stores}
        starts = {store: [part.first_episode for part in parts] for store, parts in known.items()}
        places = ((store, bisect.bisect(starts[store], e) - 1) for store, e in self.chosen)
        first = 0
        for (store, index), run in itertools.groupby(places):
            count = sum(1 for _ in run)
            made = self._specification(known[store][index].specification)
            parts.append(Part(first_episode=first, episodes=count, specification=made))
            first += count
        return tuple(parts)

    @property
    def taken(self) -> tuple[Taken, ...]:
        """Where the episodes come from, as runs of consecutive ones."""
        places = ((store, e, e - at) for at, (store, e) in enumerate(self.chosen))
        runs = (list(run) for _, run in itertools.groupby(places, lambda place: (place[0], place[2])))
        return tuple(
            Taken(store=str(store.manifest.id), first_episode=first, episodes=len(run))
            for run in runs
            for store, first, _ in run[:1]
        )

    @functools.cached_property
    def records(self) -> tuple[EpisodeRecord, ...]:
        """What is known of the episodes, under their new numbers."""
        tables = {store: store.episodes.drop("row_first").to_dicts() for store in self.stores}
        return tuple(
            EpisodeRecord.of_row({**tables[store][episode], "episode": number})
            for number, (store, episode) in enumerate(self.chosen)
        )

    def rows(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Rows]:
        """The rows of an episode: column → array (L+1, ...); of all columns, or of some.

        Raises:
            CorruptStoreError: they are not what their store's manifest promises.
            EncodingError: an embedding does not fit the dtype.
        """
        store, episode = self.chosen[number]
        self._prove(store, int(store.episodes["shard"][episode]))
        rows = store.read_episode(episode, columns)
        if self.dtype is not None and "embedding" in rows:
            rows["embedding"] = self.cast(rows["embedding"], rows, str(store.path))
        if "episode" in rows:
            rows["episode"] = np.full_like(rows["episode"], number)
        return rows

    def cast(self, embedding: Rows, rows: Mapping[str, Rows], source: str) -> Rows:
        """Embeddings in the dtype that is asked for."""
        if self.dtype is None:
            return embedding
        return cast_embedding(embedding, self.dtype, rows, source, "keep them in float32")

    def _column(self, column: Column) -> Column:
        changed = self.dtype is not None and column.name == "embedding"
        return column.model_copy(update={"dtype": self.dtype}) if changed else column

    def _specification(self, made: Any) -> Any:
        """How episodes were made, with the precision and the licence that they get here."""
        if not isinstance(made, EmbeddingSpecification):
            return made
        if self.licence is not None:
            weights = made.encoder.weights.model_copy(update={"licence": self.licence})
            encoder = made.encoder.model_copy(update={"weights": weights})
            made = made.model_copy(update={"encoder": encoder})
        return made.model_copy(update={"dtype": self.dtype or made.dtype})

    def _prove(self, store: Store, shard: int) -> None:
        """Read no shard whose bytes have changed; one behind a URL was checked when it was fetched."""
        if (store, shard) in self._proven:
            return
        entry = store.manifest.shards[shard]
        if isinstance(store.path, Path):
            path = store.path / entry.file
            if not path.is_file() or sha256_of(path) != entry.sha256:
                raise CorruptStoreError(f"{path} is not what its manifest promises; get the store again")
        self._proven.add((store, shard))

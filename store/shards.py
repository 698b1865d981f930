"""Writing one shard: a plain callable's work, in any process, that leaves a whole shard or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pvrpipe.schemas.errors import EncodingError, InvalidValueError
from pvrpipe.schemas.manifest import (
    Column,
    EpisodeRecord,
    Manifest,
    Moments,
    ShardCommit,
    ShardPlan,
    canonical_json,
)
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.columns import arrow_schema, check_fits, encode
from pvrpipe.store.files import disk_errors, settle, sha256_of, temporary_beside, write_whole
from pvrpipe.store.layout import commit_file, shard_file
from pvrpipe.store.moments import merged, moments_of
from pvrpipe.store.planning import split_of

MAPPED_GROUP_BYTES = 64 << 20  # a row group is one page, and a page must stay far below 2 GiB
PACKED_GROUP_BYTES = 16 << 20  # what a reader must decompress to see one frame
PAGE_LIMIT = 1 << 30  # never reached: pages end with their row group
COUNTED = ("embedding", "action")  # columns with statistics in the manifest


class ShardWriter:
    """Streams the episodes of one shard to disk; memory does not grow with the shard.

    Use as a context manager: leaving it without :meth:`commit` removes the temporary file.
    """

    def __init__(self, folder: Path, manifest: Manifest, plan: ShardPlan) -> None:
        self.folder, self.plan, self.columns = folder, plan, manifest.columns
        self._path = folder / shard_file(plan.shard)
        self._temporary = temporary_beside(self._path)
        self._parquet: pq.ParquetWriter | None = None
        self._group_rows = rows_per_group(self.columns)
        self._group = {c.name: np.empty((self._group_rows, *c.shape), c.dtype) for c in self.columns}
        self._filled = 0
        self._groups: list[int] = []
        self._infos: list[EpisodeInfo] = []
        self._moments: dict[str, list[Moments]] = {c.name: [] for c in self.columns if c.name in COUNTED}
        total = sum(p.episodes for p in manifest.plan)
        self._splits = {
            e: split_of(e, total) for e in range(plan.first_episode, plan.first_episode + plan.episodes)
        }

    def write_episode(self, episode: Episode) -> None:
        """Append a whole episode; ``episode``, ``step`` and the flags are filled in from its bounds."""
        rows, info = len(episode), episode.info
        step = np.arange(rows, dtype=np.int32)
        is_terminal = np.zeros(rows, bool)
        is_terminal[-1] = info.terminated
        bounds = {
            "episode": np.full(rows, info.episode, np.int32),
            "step": step,
            "is_first": step == 0,
            "is_last": step == rows - 1,
            "is_terminal": is_terminal,
        }
        self.write_rows({**episode.arrays, **bounds})
        self._infos.append(info)

    def write_rows(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Append consecutive rows, all columns at once; where the calls fall does not change the bytes."""
        missing = {c.name for c in self.columns} ^ set(arrays)
        if missing:
            raise InvalidValueError(
                f"rows of a shard need exactly its columns; missing or unknown: {sorted(missing)}"
            )
        rows = len(arrays["step"])
        for column in self.columns:
            check_fits(column, arrays[column.name])
            check_finite(column, arrays)
        self._count(arrays)
        done = 0
        while done < rows:
            take = min(rows - done, self._group_rows - self._filled)
            for column in self.columns:
                self._group[column.name][self._filled : self._filled + take] = arrays[column.name][
                    done : done + take
                ]
            self._filled, done = self._filled + take, done + take
            if self._filled == self._group_rows:
                self._flush()

    def commit(self, episodes: Sequence[EpisodeRecord] | None = None) -> ShardCommit:
        """Make the shard durable, then its commit record; from here on it exists.

        Args:
            episodes: the records of the same episodes in the store these rows were derived from; None
                when the episodes were given to :meth:`write_episode`.
        """
        self._flush()
        records = (
            self._records()
            if episodes is None
            else tuple(r.model_copy(update={"shard": self.plan.shard}) for r in episodes)
        )
        rows = sum(self._groups)
        if rows != sum(r.rows for r in records) or len(records) != self.plan.episodes:
            raise InvalidValueError(
                f"shard {self.plan.shard} was given {rows} rows of {len(records)} episodes; "
                f"planned are {self.plan.episodes} episodes of {sum(r.rows for r in records)} rows"
            )
        with disk_errors(self._path):
            assert self._parquet is not None
            self._parquet.close()
            commit = ShardCommit(
                shard=self.plan.shard,
                file=shard_file(self.plan.shard),
                rows=rows,
                bytes=self._temporary.stat().st_size,
                sha256=sha256_of(self._temporary),
                row_groups=tuple(self._groups),
                episodes=records,
                moments={name: merged(parts) for name, parts in self._moments.items()},
            )
            settle(self._temporary, self._path)
        write_whole(
            self.folder / commit_file(self.plan.shard),
            canonical_json(commit.model_dump(mode="json")).encode(),
        )
        return commit

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and remove what was not committed."""
        if self._parquet is not None and self._parquet.is_open:
            try:
                self._parquet.close()
            except OSError:
                if error is None:
                    raise  # otherwise the first failure is the one to report
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Write the rows gathered so far as one row group."""
        if not self._filled:
            return
        table = pa.Table.from_arrays(
            [encode(c, self._group[c.name][: self._filled]) for c in self.columns],
            schema=arrow_schema(self.columns),
        )
        with disk_errors(self._path):
            if self._parquet is None:
                self._parquet = parquet_writer(self._temporary, self.columns)
            self._parquet.write_table(table, row_group_size=self._filled)
        self._groups.append(self._filled)
        self._filled = 0

    def _count(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Add the training rows to the statistics."""
        strangers = set(np.unique(arrays["episode"]).tolist()) - self._splits.keys()
        if strangers:
            raise InvalidValueError(
                f"shard {self.plan.shard} was not planned to hold episode {min(strangers)}"
            )
        train = np.array([self._splits[int(e)] == "train" for e in arrays["episode"]], bool)
        for name, parts in self._moments.items():
            rows = train & ~arrays["is_last"].astype(bool) if name == "action" else train
            parts.append(moments_of(arrays[name][rows]))

    def _records(self) -> tuple[EpisodeRecord, ...]:
        """What is known of each episode written, with its place in the shard."""
        records, row = [], 0
        for info in self._infos:
            records.append(
                EpisodeRecord(
                    episode=info.episode,
                    shard=self.plan.shard,
                    row_start=row,
                    rows=info.length + 1,
                    length=info.length,
                    episode_return=info.episode_return,
                    seed=info.seed,
                    policy=info.policy,
                    variation=info.variation,
                    terminated=info.terminated,
                    split=self._splits[info.episode],
                    distribution="id",
                )
            )
            row += info.length + 1
        return tuple(records)


def rows_per_group(columns: Sequence[Column]) -> int:
    """Rows of a full row group, from the columns alone."""
    packed = any(c.layout == "packed" and c.shape for c in columns)
    limit = PACKED_GROUP_BYTES if packed else MAPPED_GROUP_BYTES
    return max(1, min(1 << 16, limit // sum(c.width for c in columns)))


def parquet_writer(path: Path, columns: Sequence[Column]) -> pq.ParquetWriter:
    """A Parquet file whose mapped columns are one plain page per row group, and packed ones zstd."""
    return pq.ParquetWriter(
        path,
        arrow_schema(columns),
        use_dictionary=False,
        compression={c.name: "zstd" if c.layout == "packed" else "none" for c in columns},
        compression_level={c.name: 3 for c in columns if c.layout == "packed"},
        data_page_size=PAGE_LIMIT,
        max_rows_per_page=PAGE_LIMIT,
        write_page_checksum=True,
        write_statistics=[c.name for c in columns if not c.shape],
    )


def check_finite(column: Column, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Refuse NaN and infinity, naming the first row that has one."""
    array = arrays[column.name]
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
    where = f"episode {arrays['episode'][row]}, step {arrays['step'][row]}"
    raise EncodingError(
        f"column '{column.name}' is not finite at {where}; mend its source and run the same command again"
    )

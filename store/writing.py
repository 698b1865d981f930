"""Writing one shard: a plain callable's work, in any process, that leaves a whole shard or none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import EncodingError, InvalidValueError
from pvrpipe.schemas.manifest import (
    Column,
    EpisodeRecord,
    Failed,
    Manifest,
    ShardCommit,
    ShardPlan,
)
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.store.casting import is_finite
from pvrpipe.store.columns import check_fits
from pvrpipe.store.files import disk_errors, settle, sha256_of, temporary_beside, write_whole
from pvrpipe.store.layout import commit_file, shard_file
from pvrpipe.store.moments import Part, RunningMoments, moments_of
from pvrpipe.store.parquet import ParquetShardWriter
from pvrpipe.store.planning import split_in
from pvrpipe.store.webdataset import WebDatasetShardWriter

COUNTED = ("embedding", "action")  # columns with statistics in the manifest


@dataclass(frozen=True)
class CheckedRows:
    """Consecutive rows that fit the columns and are finite, and what they add to the statistics."""

    arrays: Mapping[str, NDArray[np.generic]]
    moments: Mapping[str, Part]


class ShardWriter:
    """Streams the episodes of one shard to disk; memory does not grow with the shard.

    Use as a context manager: leaving it without :meth:`commit` removes the temporary file.

    Args:
        folder: of the store.
        manifest: of the store.
        plan: which episodes this shard holds.
        records: of these episodes, where the rows are derived from another store's; None where whole
            episodes are given to :meth:`write_episode`, which makes their records.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        plan: ShardPlan,
        records: Sequence[EpisodeRecord] | None = None,
    ) -> None:
        self.folder, self.manifest, self.plan, self.columns = folder, manifest, plan, manifest.columns
        self._path = folder / shard_file(plan.shard, manifest.shard_format)
        self._temporary = temporary_beside(self._path)
        self._records: dict[int, EpisodeRecord] = {}
        self._rows = 0
        for record in records or ():
            self._add(record)
        self._file = (
            ParquetShardWriter(self._temporary, self.columns)
            if manifest.shard_format == "parquet"
            else WebDatasetShardWriter(self._temporary, self.columns, self._records.__getitem__)
        )
        self._moments = {c.name: RunningMoments(c.shape[-1]) for c in self.columns if c.name in COUNTED}

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
        arrays = {**episode.arrays, **bounds}
        self._check(arrays)  # before the record: of what is not finite, the row is told
        self._add(self._record(info))
        self.append(self._counted(arrays))

    def write_rows(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Append consecutive rows, all columns at once; where the calls fall does not change the bytes."""
        self.append(self.checked(arrays))

    def checked(self, arrays: Mapping[str, NDArray[np.generic]]) -> CheckedRows:
        """What :meth:`append` takes: most of the work, and it may be done in any thread and order."""
        self._check(arrays)
        return self._counted(arrays)

    def append(self, rows: CheckedRows) -> None:
        """Append rows to those before them."""
        for name, part in rows.moments.items():
            self._moments[name].merge(part)
        with disk_errors(self._path):
            self._file.append(rows.arrays)

    def _check(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Refuse what does not fit the columns, or is not finite."""
        missing = {c.name for c in self.columns} ^ set(arrays)
        if missing:
            raise InvalidValueError(
                f"rows of a shard need exactly its columns; missing or unknown: {sorted(missing)}"
            )
        for column in self.columns:
            check_fits(column, arrays[column.name])
            check_finite(column, arrays)

    def commit(self, failed: Sequence[Failed] = (), batch: int | None = None) -> ShardCommit:
        """Make the shard durable, then its commit record; from here on it exists.

        Args:
            failed: what was tried for these episodes, and failed.
            batch: frames per batch, where memory forced fewer than the specification's.
        """
        with disk_errors(self._path):
            groups, records = self._file.finish(), tuple(self._records.values())
            planned = range(self.plan.first_episode, self.plan.first_episode + self.plan.episodes)
            if sum(groups) != self._rows or list(self._records) != list(planned):
                raise InvalidValueError(
                    f"shard {self.plan.shard} was given {sum(groups)} rows of {len(records)} episodes; "
                    f"planned are {self.plan.episodes} episodes of {self._rows} rows"
                )
            commit = ShardCommit(
                shard=self.plan.shard,
                file=shard_file(self.plan.shard, self.manifest.shard_format),
                rows=self._rows,
                bytes=self._temporary.stat().st_size,
                sha256=sha256_of(self._temporary),
                row_groups=groups,
                episodes=records,
                moments={name: running.told() for name, running in self._moments.items()},
                failed=tuple(failed),
                batch=batch,
            )
            settle(self._temporary, self._path)
        # Python's json, indented, takes 3 ms for 2,048 means, in which who encodes waits for the interpreter
        write_whole(self.folder / commit_file(self.plan.shard), commit.model_dump_json().encode())
        return commit

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and remove what was not committed."""
        try:
            self._file.close()
        except OSError:
            if error is None:
                raise  # otherwise the first failure is the one to report
        finally:
            with contextlib.suppress(
                OSError
            ):  # what keeps it there is told by the first failure, or by the next writer
                self._temporary.unlink(missing_ok=True)

    def _add(self, record: EpisodeRecord) -> None:
        """An episode that this shard holds, behind those before it."""
        if not 0 <= record.episode - self.plan.first_episode < self.plan.episodes:
            raise InvalidValueError(
                f"shard {self.plan.shard} was not planned to hold episode {record.episode}"
            )
        self._records[record.episode] = record.model_copy(
            update={"shard": self.plan.shard, "row_start": self._rows}
        )
        self._rows += record.rows

    def _record(self, info: EpisodeInfo) -> EpisodeRecord:
        """What is known of an episode that comes from an environment."""
        return EpisodeRecord(
            episode=info.episode,
            shard=self.plan.shard,
            row_start=self._rows,
            rows=info.length + 1,
            length=info.length,
            episode_return=info.episode_return,
            seed=info.seed,
            policy=info.policy,
            variation=info.variation,
            terminated=info.terminated,
            split=split_in(self.manifest, info.episode),
            distribution=info.distribution,
            values=dict(info.values),
        )

    def _counted(self, arrays: Mapping[str, NDArray[np.generic]]) -> CheckedRows:
        """Rows with the moments of those that are trained on."""
        episodes, of = np.unique(arrays["episode"], return_inverse=True)
        if strangers := set(episodes.tolist()) - self._records.keys():
            raise InvalidValueError(
                f"shard {self.plan.shard} was not planned to hold episode {min(strangers)}"
            )
        train = np.array([self._records[e].split == "train" for e in episodes.tolist()], bool)[of]
        acted = train & ~arrays["is_last"].astype(bool)
        counted = {name: acted if name == "action" else train for name in self._moments}
        return CheckedRows(arrays, {name: moments_of(arrays[name][rows]) for name, rows in counted.items()})


def check_finite(column: Column, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Refuse NaN and infinity, naming the first row that has one."""
    array = arrays[column.name]
    if array.dtype.kind != "f" or is_finite(array):
        return
    row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
    where = f"episode {arrays['episode'][row]}, step {arrays['step'][row]}"
    raise EncodingError(
        f"column '{column.name}' is not finite at {where}; mend its source and run the same command again"
    )

"""Episodes of other stores written as a store of their own: what merging, splitting and converting share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pvrpipe.schemas.manifest import Column, Manifest, ShardPlan
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column
from pvrpipe.store.golden import golden_of
from pvrpipe.store.places import refuse_source
from pvrpipe.store.selection import Selection
from pvrpipe.store.writing import ShardWriter

ShardFormat = Literal["parquet", "webdataset"]


@dataclass(frozen=True)
class Rewritten:
    """A store made from others, and what it cost."""

    store: Path
    id: str
    kind: str
    format: str
    episodes: int
    rows: int
    shards: int
    resumed_shards: int
    bytes: int
    licence: str | None
    """of the weights, where these are embeddings"""
    seconds: float


def rewrite(
    selection: Selection,
    out: Path,
    plan: tuple[ShardPlan, ...],
    *,
    splits: Literal["hash", "recorded"] = "recorded",
    shard_format: ShardFormat | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Rewritten:
    """Write the episodes as a store; killed and run again, it ends with the same bytes.

    Args:
        selection: which episodes, in order.
        out: folder of the new store.
        plan: its shards.
        splits: how the episodes' splits were found.
        shard_format: of the shards; default: as in the first store.
        overwrite: replace another store that is there.
        progress: told rows.

    Raises:
        InvalidValueError: ``out`` is one of the stores to read.
        OutputExistsError, StoreBusyError: ``out`` is something else's; it is left as it is.
        CorruptStoreError, EncodingError: a shard cannot be read, or does not fit its new precision.
    """
    began = time.monotonic()
    for store in selection.stores:
        refuse_source(store.path, out)
    draft = _draft(selection, plan, splits, shard_format or selection.store.manifest.shard_format)
    with PendingStore.begin(out, draft, overwrite) as pending:
        rows, total = 0, selection.total_rows
        for shard in pending.todo:
            rows += _write_shard(selection, out, pending.manifest, shard)
            progress(rows, total, f"shard {shard.shard}")
        sealed = pending.seal(golden_of(selection))
        return _result(out, sealed, pending.resumed, time.monotonic() - began)


def _draft(
    selection: Selection, plan: tuple[ShardPlan, ...], splits: str, shard_format: ShardFormat
) -> Manifest:
    """What the store is to be."""
    first, *later = selection.parts
    columns = selection.columns
    if selection.store.manifest.shard_format == "webdataset" and shard_format == "parquet":
        columns = tuple(_laid_out(c) for c in columns)
    draft = new_manifest(first.specification, columns, plan, shard_format)
    return draft.model_copy(update={"parts": tuple(later), "splits": splits, "taken": selection.taken})


def _laid_out(like: Column) -> Column:
    """A column of a tar with the layout that suits it in Parquet."""
    return column(like.name, like.dtype, like.shape)


def _write_shard(selection: Selection, out: Path, manifest: Manifest, plan: ShardPlan) -> int:
    """Write and commit one shard, an episode in memory at a time; its rows."""
    numbers = range(plan.first_episode, plan.first_episode + plan.episodes)
    with ShardWriter(out, manifest, plan, [selection.records[n] for n in numbers]) as writer:
        for number in numbers:
            writer.write_rows(selection.rows(number))
        return writer.commit().rows


def _result(out: Path, manifest: Manifest, resumed: int, seconds: float) -> Rewritten:
    embeddings = manifest.embeddings
    return Rewritten(
        store=out,
        id=str(manifest.id),
        kind=manifest.kind,
        format=manifest.shard_format,
        episodes=manifest.episodes,
        rows=manifest.rows,
        shards=len(manifest.shards),
        resumed_shards=resumed,
        bytes=manifest.bytes,
        licence=embeddings.encoder.weights.licence if embeddings is not None else None,
        seconds=seconds,
    )

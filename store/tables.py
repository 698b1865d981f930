"""Whole columns as tables with their arrays decoded: polars and Arrow, for analysis rather than training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from pvrpipe.store.reading import Store
from pvrpipe.store.selecting import Condition, select_episodes
from pvrpipe.store.shards import Rows


def to_arrow(
    store: Store, columns: Sequence[str] | None = None, split: str | None = None, where: Condition = None
) -> pa.Table:
    """Rows of the chosen episodes; an array column is Arrow's FixedShapeTensor.

    Args:
        store: a sealed store.
        columns: which; None is all of them.
        split: ``train``, ``val``, or None for both.
        where: a condition on the episode table, as in :func:`pvrpipe.store.selecting.select_episodes`.
    """
    names = store.columns if columns is None else tuple(columns)
    arrays = [_as_arrow(whole_column(store, name, split, where)) for name in names]
    return pa.Table.from_arrays(arrays, names=list(names))


def to_polars(
    store: Store, columns: Sequence[str] | None = None, split: str | None = None, where: Condition = None
) -> pl.DataFrame:
    """Rows of the chosen episodes; an array column is polars' Array. Arguments as :func:`to_arrow`."""
    names = store.columns if columns is None else tuple(columns)
    found = {name: whole_column(store, name, split, where) for name in names}
    return pl.DataFrame({name: pl.Series(name, rows) for name, rows in found.items()})


def whole_column(store: Store, name: str, split: str | None = None, where: Condition = None) -> Rows:
    """A column of the chosen episodes, one after the other, (N, *shape)."""
    column = store.column(name)
    chosen = select_episodes(store.episodes, split, where)
    out = np.empty((int(chosen["rows"].sum()), *column.shape), column.dtype)
    done = 0
    for shard, start, rows in chosen.select("shard", "row_start", "rows").iter_rows():
        out[done : done + rows] = store.shard(shard).rows(name, start, rows)
        done += rows
    return out


def _as_arrow(rows: Rows) -> pa.Array:
    if rows.ndim == 1:
        return pa.array(rows)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(rows)

"""What several exports need: the episode table, and arrays as Arrow lists and PNG images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from PIL import Image

from pvrpipe.schemas.manifest import Column
from pvrpipe.store.columns import SCALARS
from pvrpipe.store.episodes import episode_rows
from pvrpipe.store.selection import Selection
from pvrpipe.store.shards import Rows
from pvrpipe.store.webdataset import PLACE

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the Hugging Face Hub shows images


def write_episode_table(selection: Selection, path: Path) -> None:
    """One row per episode, with the first of its rows among all that are exported."""
    table = pl.DataFrame(episode_rows(selection.records)).drop(PLACE)
    table.with_columns(row_first=pl.col("rows").cum_sum() - pl.col("rows")).write_parquet(path)


def is_image(column: Column) -> bool:
    """Whether the rows of a column are pictures."""
    return column.dtype == "uint8" and len(column.shape) == 3 and column.shape[2] in (1, 3)


def list_type(column: Column) -> pa.DataType:
    """A column's Arrow type: a number, lists of numbers, or an image."""
    if is_image(column):
        return IMAGE
    kind = SCALARS[column.dtype]
    for _ in column.shape:
        kind = pa.list_(kind)
    return kind


def as_lists(column: Column, rows: Rows) -> pa.Array:
    """Rows (n, *shape) as Arrow lists; images as lossless PNG."""
    if is_image(column):
        return pa.array([{"bytes": png(row), "path": None} for row in rows], IMAGE)
    values = pa.array(rows.reshape(-1), SCALARS[column.dtype])
    for length in reversed(column.shape):
        offsets = np.arange(0, len(values) + 1, length, dtype=np.int32)
        values = pa.ListArray.from_arrays(pa.array(offsets), values)
    return values


def png(frame: Rows) -> bytes:
    """A frame (H, W, C) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(frame, np.uint8).squeeze(-1) if frame.shape[-1] == 1 else frame).save(
        buffer, "PNG"
    )
    return buffer.getvalue()

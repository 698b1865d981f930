"""The episode table of a store: read whole, and believed only where it fits the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pvrpipe.schemas.errors import CorruptStoreError, one_line
from pvrpipe.schemas.manifest import EpisodeRecord, Manifest, is_value

TABLE_LIMIT = 1 << 30  # bytes once decompressed; a hundred bytes an episode is usual
KINDS: dict[Any, tuple[pl.DataType, ...]] = {
    int: (pl.Int64(), pl.Int32(), pl.UInt32(), pl.UInt64()),
    float: (pl.Float64(),),
    str: (pl.String(),),
    bool: (pl.Boolean(),),
}


def read_episodes(path: Path, manifest: Manifest, where: object) -> pl.DataFrame:
    """One row per episode, as :class:`EpisodeRecord` has it, and ``row_first``, its first row in the store.

    Args:
        path: the file.
        manifest: of its store.
        where: for messages.

    Raises:
        CorruptStoreError: it cannot be read, or lists rows that the shards do not have.
    """
    try:
        footer = pq.read_metadata(path)
        size = sum(footer.row_group(g).total_byte_size for g in range(footer.num_row_groups))
        if footer.num_rows != manifest.episodes or size > TABLE_LIMIT:
            raise _corrupt(where, f"has {footer.num_rows} episodes in {size} bytes, not {manifest.episodes}")
        table = pl.DataFrame(
            pq.read_table(path, use_threads=False)
        )  # polars' own reader panics on forged pages
    except (OSError, ValueError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise _corrupt(where, f"cannot be read ({one_line(error)[:100]})") from None
    expected = {n: _kinds(f.annotation) for n, f in EpisodeRecord.model_fields.items() if n != "values"}
    expected |= {name: KINDS[float] for name in table.columns if is_value(name)}
    wrong = sorted(
        name
        for name in expected.keys() | set(table.columns)
        if name not in expected or name not in table.columns or table.schema[name] not in expected[name]
    )
    if wrong or any(table.null_count().row(0)):
        raise _corrupt(where, f"has other columns than episodes have ({', '.join(wrong[:3]) or 'nulls'})")
    table = table.with_columns(row_first=pl.col("rows").cum_sum() - pl.col("rows"))
    if problem := _problem(table, manifest):
        raise _corrupt(where, problem)
    return table


def episode_rows(records: Sequence[EpisodeRecord]) -> list[dict[str, Any]]:
    """The rows of the table: every value that any episode has is a column of all, 0 where one has it not."""
    names = dict.fromkeys(name for record in records for name in sorted(record.values))
    return [{**record.row(), **{n: record.values.get(n, 0.0) for n in names}} for record in records]


def _problem(table: pl.DataFrame, manifest: Manifest) -> str | None:
    """What of the table does not fit the shards: together they must hold each row once, in order."""
    numbers = pl.DataFrame({"episode": range(len(table))}, schema={"episode": pl.Int64})
    if not table["episode"].cast(pl.Int64).equals(numbers["episode"]):
        return "does not number the episodes in order"
    if (table["rows"] != table["length"] + 1).any() or (table["length"] < 1).any():
        return "has an episode whose rows are not its length and one"
    shards = pl.DataFrame(
        {
            "shard": list(range(len(manifest.shards))),
            "held": [entry.rows for entry in manifest.shards],
            "count": [entry.episodes for entry in manifest.shards],
        },
        schema={"shard": pl.Int64, "held": pl.Int64, "count": pl.Int64},
    )
    within = pl.col("rows").cum_sum().over("shard") - pl.col("rows")
    if (table["row_start"] != table.select(within)["rows"]).any():
        return "has an episode that does not begin where the one before it ends"
    found = table.group_by(pl.col("shard").cast(pl.Int64), maintain_order=True).agg(
        held=pl.col("rows").sum().cast(pl.Int64), count=pl.len().cast(pl.Int64)
    )
    return None if found.equals(shards) else "does not list the rows that the shards hold"


def _kinds(annotation: Any) -> tuple[pl.DataType, ...]:
    """What a column of the table may be; a Literal is text."""
    return KINDS.get(annotation, KINDS[str])


def _corrupt(where: object, what: str) -> CorruptStoreError:
    return CorruptStoreError(f"{where} {what}; run `pvrpipe verify`, or get the store again")

"""The episode table of a store: read whole, and believed only where it fits the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pvrpipe.schemas.errors import CorruptStoreError, StoreError, one_line
from pvrpipe.schemas.manifest import EpisodeRecord, Manifest, is_value
from pvrpipe.store.files import FILES_OPEN
from pvrpipe.store.mapping import map_file
from pvrpipe.store.pages import decoded_bytes, read_chunks

TABLE_LIMIT = 1 << 30  # bytes once decompressed; a hundred bytes an episode is usual
EPISODE_BYTES = 64  # of one, at least
TEXT = tuple(
    pa.dictionary(pa.int32(), kind) for kind in (pa.string(), pa.large_string())
)  # as it is read here
KINDS: dict[Any, tuple[pa.DataType, ...]] = {
    int: (pa.int64(), pa.int32(), pa.uint32(), pa.uint64()),
    float: (pa.float64(),),
    bool: (pa.bool_(),),
}
#: What each column of the table may be; a Literal is text.
COLUMNS = {
    name: KINDS.get(field.annotation, TEXT)
    for name, field in EpisodeRecord.model_fields.items()
    if name != "values"
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
        found = _read(path, manifest)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _corrupt(where, f"cannot be read ({one_line(error)[:200]})") from None
    # polars' own reader panics on forged pages, and its import on names that are no text
    try:
        table = pl.DataFrame({name: pl.from_arrow(column) for name, column in found.items()})
        table = table.with_columns(row_first=pl.col("rows").cum_sum() - pl.col("rows"))
        problem = _problem(table, manifest)
    except pl.exceptions.PanicException as error:  # it cannot even begin where no file can be opened
        cause = FILES_OPEN if "TooManyOpenFiles" in str(error) else f"polars fails ({one_line(error)[:200]})"
        raise StoreError(f"cannot read {where}: {cause}, then run the same command again") from error
    if problem:
        raise _corrupt(where, problem)
    return table


def episode_rows(records: Sequence[EpisodeRecord]) -> list[dict[str, Any]]:
    """The rows of the table: every value that any episode has is a column of all, 0 where one has it not."""
    names = dict.fromkeys(name for record in records for name in sorted(record.values))
    return [{**record.row(), **{n: record.values.get(n, 0.0) for n in names}} for record in records]


def _read(path: Path, manifest: Manifest) -> dict[str, pa.ChunkedArray]:
    """The columns of the table, none of which takes more memory than such a table may.

    Raises:
        ValueError, KeyError, OSError, ArrowException: it is no such table.
    """
    data, texts = map_file(path), [name for name, kinds in COLUMNS.items() if kinds is TEXT]
    file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)), read_dictionary=texts)
    footer, schema = file.metadata, file.schema_arrow
    if footer.num_rows != manifest.episodes or footer.num_rows * EPISODE_BYTES > TABLE_LIMIT:
        raise ValueError(f"it has {footer.num_rows} episodes, not {manifest.episodes}")
    columns = COLUMNS | {name: KINDS[float] for name in schema.names if is_value(name)}
    if sorted(schema.names) != sorted(columns):
        raise ValueError(
            f"it has other columns than episodes have: {sorted(set(schema.names) ^ set(columns))[:3]}"
        )
    for name, kinds in columns.items():
        if schema.field(name).type not in kinds:
            raise ValueError(f"'{name}' is {schema.field(name).type}")
    size = sum(decoded_bytes(data, chunk) for group in read_chunks(data) for chunk in group.values())
    if size > TABLE_LIMIT:
        raise ValueError(f"its pages claim {size} bytes")
    table = file.read(use_threads=False)
    table.validate(full=True)  # text is UTF-8, indices are within their dictionary
    if len(table) != footer.num_rows or any(column.null_count for column in table.columns):
        raise ValueError("it has nulls, or other rows than its footer says")
    return {name: _text(table[name]) if name in texts else table[name] for name in columns}


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text out of its dictionary, of which one long entry may stand for every episode."""
    size = sum(pc.sum(pc.binary_length(c.dictionary).take(c.indices)).as_py() or 0 for c in column.chunks)
    if size > TABLE_LIMIT:
        raise ValueError(f"its text takes {size} bytes")
    return column.cast(pa.string())


def _problem(table: pl.DataFrame, manifest: Manifest) -> str | None:
    """What of the table does not fit the shards: together they must hold each row once, in order."""
    numbers = pl.DataFrame({"episode": range(len(table))}, schema={"episode": pl.Int64})
    if not table["episode"].cast(pl.Int64).equals(numbers["episode"]):
        return "does not number the episodes in order"
    if (table["rows"] != table["length"] + 1).any() or (table["length"] < 1).any():
        return "has an episode whose rows are not its length and one"
    if not table["episode_return"].is_finite().all():
        return "has an episode whose return is not finite"
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


def _corrupt(where: object, what: str) -> CorruptStoreError:
    return CorruptStoreError(f"{where} {what}; run `pvrpipe verify`, or get the store again")

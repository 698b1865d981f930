"""A shard as Parquet: mapped columns are one plain page per row group, packed ones are zstd pages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pvrpipe.schemas.errors import CorruptStoreError, one_line
from pvrpipe.schemas.manifest import Column, Manifest
from pvrpipe.store.columns import arrow_field, arrow_schema, decode, encode
from pvrpipe.store.mapping import Span, proven_spans, zstd_page
from pvrpipe.store.pages import decoded_bytes, read_chunks
from pvrpipe.store.shards import Decoded, Rows, Shard

MAPPED_GROUP_BYTES = 64 << 20  # a row group is one page, and a page must stay far below 2 GiB
PACKED_GROUP_BYTES = 4 << 20  # what a reader must decompress to see one frame
DECODED_LIMIT = 1 << 30  # of a row group that has to be decoded; ours have 4 MiB
SCALARS_LIMIT = 16 << 20  # bytes of a column of scalars that is read at once, and kept
SLACK = 1 << 20  # bytes that pages may hold beyond the values that they should
PAGE_LIMIT = 1 << 30  # never reached: pages end with their row group


class ParquetShard(Shard):
    """A Parquet file, mapped where its footer and page headers prove the layout, else read as anyone would."""

    def __init__(self, folder: Path, manifest: Manifest, index: int, decoded: Decoded | None = None) -> None:
        super().__init__(folder, manifest, index, decoded)
        self._kept: dict[str, Rows | None] = {}
        self._one_at_a_time = threading.Lock()  # threads may share a shard, not pyarrow's reader
        try:
            self._chunks = read_chunks(self.data)
            self._parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self.data)))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self.corrupt(f"cannot be read ({one_line(error)[:200]})") from None
        footer = self._parquet.metadata
        if tuple(footer.row_group(g).num_rows for g in range(footer.num_row_groups)) != self.groups:
            raise self.corrupt("has other row groups than the manifest says")

    def check_layout(self) -> Iterator[tuple[str, str]]:
        """Columns as in the manifest, and those to be mapped can be."""
        found, expected = (
            {f.name: f.type for f in schema}
            for schema in (self._parquet.schema_arrow, arrow_schema(self.manifest.columns))
        )
        if list(found.items()) != list(expected.items()):
            names = found.keys() | expected.keys()
            differing = sorted(n for n in names if found.get(n) != expected.get(n))
            yield "", f"has other columns than the manifest: {', '.join(differing) or 'in another order'}"
            return
        for column in self.manifest.columns:
            if column.layout == "mapped" and self.mapped(column.name) is None:
                yield column.name, "cannot be mapped; someone has rewritten its pages"

    def _spans(self, column: Column) -> tuple[Span, ...] | None:
        return proven_spans(self.data, self._parquet.metadata.schema, self._chunks, column)

    def _read_group(self, name: str, group: int) -> Rows:
        """Decompress the page of one row group of one column; ordinary Parquet where it is not one page."""
        column, count = self.column(name), self.groups[group]
        if column.width * count > DECODED_LIMIT:
            raise self.corrupt(f"column '{name}' has a row group of more than {DECODED_LIMIT >> 20} MiB")
        if column.shape == ():
            scalars = self._scalars(column)
            if scalars is not None:
                return scalars[self.first[group] : self.first[group + 1]]
        rows = np.empty((count, *column.shape), column.dtype)
        if self._decompressed(column, group, rows):
            return rows
        with self._one_at_a_time:
            return self._read_groups(column, group, group + 1)

    def _scalars(self, column: Column) -> Rows | None:
        """All rows of a column of scalars, read once; None where they are too many, or not all can be read."""
        with self._one_at_a_time:
            if column.name not in self._kept:
                rows = None
                if column.width * int(self.first[-1]) <= SCALARS_LIMIT:
                    with contextlib.suppress(CorruptStoreError):
                        rows = self._read_groups(column, 0, len(self.groups))
                self._kept[column.name] = rows
            return self._kept[column.name]

    def _read_groups(self, column: Column, begin: int, end: int) -> Rows:
        """Decode row groups of a column, however they are written."""
        name, count = column.name, int(self.first[end] - self.first[begin])
        try:
            for group in range(begin, end):
                self._refuse_bomb(column, group)
            table = self._parquet.read_row_groups(range(begin, end), columns=[name], use_threads=False)
            rows = decode(column, table.column(name))
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise self.corrupt(f"column '{name}' cannot be read ({one_line(error)[:200]})") from None
        if len(rows) != count:
            raise self.corrupt(f"column '{name}' has {len(rows)} rows in groups of {count}")
        return rows

    def _read_into(self, name: str, group: int, out: Rows) -> None:
        if self.mapped(name) is not None or not self._decompressed(self.column(name), group, out):
            super()._read_into(name, group, out)

    def _decompressed(self, column: Column, group: int, out: Rows) -> bool:
        """Decompress the page of one row group into ``out``, unless it is not one plain zstd page."""
        try:
            chunk = self._chunks[group][column.name]
            page = zstd_page(self.data, self._parquet.metadata.schema, chunk, column)
            if page is None or len(out) != chunk.values or not out.flags.c_contiguous:
                return False
            with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(page)), "zstd") as stream:
                if stream.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes or stream.read(1):
                    raise ValueError(f"its page does not hold {out.nbytes} bytes")
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise self.corrupt(f"column '{column.name}' cannot be read ({one_line(error)[:200]})") from None
        return True

    def _refuse_bomb(self, column: Column, group: int) -> None:
        """Before anything is decompressed: the type is the column's, and the pages hold about its rows.

        Raises:
            ValueError, KeyError: they do not.
        """
        found, expected = self._parquet.schema_arrow.field(column.name).type, arrow_field(column).type
        if found != expected:
            raise ValueError(f"it holds {found}, not {expected}")
        size = decoded_bytes(self.data, self._chunks[group][column.name])
        # values, a dictionary of them, and indices; Parquet stores a uint8 in four bytes
        if size > (2 * column.width + 8) * self.groups[group] + SLACK:
            raise ValueError(f"its pages claim {size} bytes for {self.groups[group]} rows")


class ParquetShardWriter:
    """Gathers rows into full row groups; where the calls fall does not change the bytes."""

    def __init__(self, path: Path, columns: Sequence[Column]) -> None:
        self._path, self._columns = path, columns
        self._file: pq.ParquetWriter | None = None
        self._group_rows = rows_per_group(columns)
        self._group = {c.name: np.empty((self._group_rows, *c.shape), c.dtype) for c in columns}
        self._filled = 0
        self._groups: list[int] = []

    def append(self, arrays: Mapping[str, Rows]) -> None:
        """Consecutive rows, all columns at once."""
        rows, done = len(arrays["step"]), 0
        while done < rows:
            take = min(rows - done, self._group_rows - self._filled)
            for name, group in self._group.items():
                group[self._filled : self._filled + take] = arrays[name][done : done + take]
            self._filled, done = self._filled + take, done + take
            if self._filled == self._group_rows:
                self._flush()

    def finish(self) -> tuple[int, ...]:
        """Write the footer; the rows of each row group."""
        self._flush()
        self.close()
        return tuple(self._groups)

    def close(self) -> None:
        """Let the file go, finished or not."""
        if self._file is not None and self._file.is_open:
            self._file.close()

    def _flush(self) -> None:
        """Write the rows gathered so far as one row group."""
        if not self._filled:
            return
        schema = arrow_schema(self._columns)
        arrays = [encode(c, self._group[c.name][: self._filled]) for c in self._columns]
        if self._file is None:
            self._file = _parquet_file(self._path, self._columns)
        self._file.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=self._filled)
        self._groups.append(self._filled)
        self._filled = 0


def rows_per_group(columns: Sequence[Column]) -> int:
    """Rows of a full row group, from the columns alone."""
    packed = any(c.layout == "packed" and c.shape for c in columns)
    limit = PACKED_GROUP_BYTES if packed else MAPPED_GROUP_BYTES
    return max(1, min(1 << 16, limit // sum(c.width for c in columns)))


def _parquet_file(path: Path, columns: Sequence[Column]) -> pq.ParquetWriter:
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

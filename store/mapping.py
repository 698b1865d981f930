"""Arrays mapped straight out of a Parquet file, once the file itself proves that they lie there whole.

A required column of PLAIN, uncompressed values in one page per row group is, byte for byte, the array
(N, *shape) behind a page header of about 30 bytes. Nothing is taken on trust: the footer must say so,
and the page header is parsed and must agree. A file that someone has rewritten does not pass, and is
read with ordinary Parquet calls instead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import Column
from pvrpipe.store.files import read_errors
from pvrpipe.store.pages import UNCOMPRESSED, ZSTD, Chunk, header_length, is_one_plain_page

HEADER_LIMIT = 256  # bytes; a page header with a checksum has about 30
PHYSICAL = {"float32": "FLOAT", "float64": "DOUBLE", "int32": "INT32"}
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class Span:
    """Where the rows of one row group lie in the file."""

    offset: int
    rows: int


def proven_spans(
    data: NDArray[np.uint8], schema: pq.ParquetSchema, groups: Sequence[Mapping[str, Chunk]], column: Column
) -> tuple[Span, ...] | None:
    """The spans of a column, or None if any row group is not one plain page."""
    if not _is_plain(schema, column):
        return None
    spans = []
    for group in groups:
        if (chunk := group.get(column.name)) is None:
            return None
        payload = chunk.values * column.width
        header, page = chunk.size - payload, chunk.page
        fits = 0 < header <= HEADER_LIMIT and page >= 0 and page + header + payload <= len(data)
        if not fits or chunk.codec != UNCOMPRESSED or chunk.dictionary is not None:
            return None
        if not is_one_plain_page(data[page : page + header].tobytes(), chunk.values, payload, payload):
            return None
        spans.append(Span(page + header, chunk.values))
    return tuple(spans)


def zstd_page(
    data: NDArray[np.uint8], schema: pq.ParquetSchema, chunk: Chunk, column: Column
) -> NDArray[np.uint8] | None:
    """The compressed bytes of a row group's values, or None if they are not one plain zstd page."""
    fits = chunk.page >= 0 and chunk.size > 0 and chunk.page + chunk.size <= len(data)
    if not fits or chunk.codec != ZSTD or chunk.dictionary is not None or not _is_plain(schema, column):
        return None
    header = header_length(data[chunk.page : chunk.page + min(chunk.size, HEADER_LIMIT)].tobytes())
    head, stored = data[chunk.page : chunk.page + header].tobytes(), chunk.size - header
    if not is_one_plain_page(head, chunk.values, chunk.values * column.width, stored):
        return None
    return data[chunk.page + header : chunk.page + chunk.size]


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read only, paged in as they are touched, for as long as an array of them lives.

    Python's own mmap keeps a file descriptor for each map, of which a process may have a thousand; a store
    may have ten thousand shards.
    """
    with read_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, _LIBC.munmap, address, size)
    data = np.frombuffer(memoryview(memory), np.uint8)
    data.flags.writeable = False
    return data


def _is_plain(schema: pq.ParquetSchema, column: Column) -> bool:
    """The file has the column, and of that type."""
    found = next((schema.column(i) for i in range(len(schema)) if schema.column(i).path == column.name), None)
    return found is not None and _physically_plain(found, column)


def _physically_plain(schema: pq.ColumnSchema, column: Column) -> bool:
    """The declared type has no levels and the width that the manifest promises."""
    if schema.max_definition_level or schema.max_repetition_level:
        return False
    if column.shape == ():
        return bool(schema.physical_type == PHYSICAL.get(column.dtype))
    return bool(schema.physical_type == "FIXED_LEN_BYTE_ARRAY" and schema.length == column.width)

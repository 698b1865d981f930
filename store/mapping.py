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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import Column

HEADER_LIMIT = 256  # bytes; a page header with a checksum has about 30
PHYSICAL = {"float32": "FLOAT", "float64": "DOUBLE", "int32": "INT32"}
_DATA_PAGE, _PLAIN = 0, 0
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
    data: NDArray[np.uint8], metadata: pq.FileMetaData, column: Column
) -> tuple[Span, ...] | None:
    """The spans of a column, or None if any row group is not one plain page."""
    index = _index_of(metadata, column)
    if index is None:
        return None
    spans = []
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(index)
        payload = chunk.num_values * column.width
        header = chunk.total_compressed_size - payload
        page = chunk.data_page_offset
        fits = 0 < header <= HEADER_LIMIT and page >= 0 and page + header + payload <= len(data)
        if not fits or chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
            return None
        if not _is_one_plain_page(data[page : page + header].tobytes(), chunk.num_values, payload, payload):
            return None
        spans.append(Span(page + header, chunk.num_values))
    return tuple(spans)


def zstd_page(
    data: NDArray[np.uint8], metadata: pq.FileMetaData, column: Column, group: int
) -> NDArray[np.uint8] | None:
    """The compressed bytes of a row group's values, or None if they are not one plain zstd page."""
    index = _index_of(metadata, column)
    if index is None:
        return None
    chunk = metadata.row_group(group).column(index)
    page, stored, payload = (
        chunk.data_page_offset,
        chunk.total_compressed_size,
        chunk.num_values * column.width,
    )
    fits = page >= 0 and stored > 0 and page + stored <= len(data)
    if not fits or chunk.compression != "ZSTD" or chunk.has_dictionary_page:
        return None
    header = _header_length(data[page : page + min(stored, HEADER_LIMIT)].tobytes())
    head = data[page : page + header].tobytes()
    if not _is_one_plain_page(head, chunk.num_values, payload, stored - header):
        return None
    return data[page + header : page + stored]


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, read only, paged in as they are touched, for as long as an array of them lives.

    Python's own mmap keeps a file descriptor for each map, of which a process may have a thousand; a store
    may have ten thousand shards.
    """
    with path.open("rb") as file:
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


def _physically_plain(schema: pq.ColumnSchema, column: Column) -> bool:
    """The declared type has no levels and the width that the manifest promises."""
    if schema.max_definition_level or schema.max_repetition_level:
        return False
    if column.shape == ():
        return bool(schema.physical_type == PHYSICAL.get(column.dtype))
    return bool(schema.physical_type == "FIXED_LEN_BYTE_ARRAY" and schema.length == column.width)


def _index_of(metadata: pq.FileMetaData, column: Column) -> int | None:
    """Which of the file's columns it is, if that one has the declared type."""
    for index in range(metadata.num_columns):
        schema = metadata.schema.column(index)
        if schema.path == column.name:
            return index if _physically_plain(schema, column) else None
    return None


def _header_length(head: bytes) -> int:
    """Bytes of the Parquet ``PageHeader`` that these begin with; 0 if they begin with none."""
    try:
        return _struct(head, 0)[1]
    except (IndexError, ValueError):
        return 0


def _is_one_plain_page(header: bytes, rows: int, payload: int, stored: int) -> bool:
    """Parse a Parquet ``PageHeader`` and see that it announces exactly the payload and ends with it."""
    try:
        fields, end = _struct(header, 0)
    except (IndexError, ValueError):
        return False
    page = fields.get(5)
    return (
        end == len(header)
        and fields.get(1) == _DATA_PAGE
        and fields.get(2) == payload
        and fields.get(3) == stored
        and isinstance(page, dict)
        and page.get(1) == rows
        and page.get(2) == _PLAIN
    )


def _struct(data: bytes, at: int) -> tuple[dict[int, object], int]:
    """A struct of Thrift's compact protocol, as far as page headers use it: field number → value."""
    fields: dict[int, object] = {}
    number = 0
    while data[at]:
        delta, kind = data[at] >> 4, data[at] & 15
        at += 1
        if delta:
            number += delta
        else:
            number, at = _zigzag(data, at)
        if kind in (1, 2):  # a boolean is its own type
            fields[number] = kind == 1
        elif kind in (3, 4, 5, 6):
            fields[number], at = _zigzag(data, at)
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            fields[number], at = _struct(data, at)
        else:
            raise ValueError(f"type {kind} does not occur in a page header")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while shift < 64:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7
    raise ValueError("a number without an end")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at

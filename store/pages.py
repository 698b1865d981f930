"""Parquet page headers, parsed here: what a page holds is known before anything of it is decompressed.

They are structs of Thrift's compact protocol. A footer may say anything of a column's size; a decoder allocates what
the page headers say.
"""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

HEADER_LIMIT = 64 << 10  # bytes; statistics in a page header make it longer than the usual 30
NESTED_LIMIT = 8
_DATA_PAGE, _PLAIN = 0, 0


def decoded_bytes(data: NDArray[np.uint8], chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes of all pages of a column chunk once they are decompressed, as their headers say.

    Raises:
        ValueError: they are no pages that follow one another within the file.
    """
    at, total = _begin(chunk), 0
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= len(data):
        raise ValueError("a column chunk lies outside the file")
    while at < end:
        try:
            fields, length = _struct(data[at : at + HEADER_LIMIT].tobytes(), 0)
        except IndexError:
            raise ValueError("a page header without an end") from None
        plain, packed = fields.get(2), fields.get(3)
        if not isinstance(plain, int) or not isinstance(packed, int) or min(plain, packed) < 0:
            raise ValueError("a page without a size")
        total, at = total + plain, at + length + packed
    return total


def _begin(chunk: pq.ColumnChunkMetaData) -> int:
    """Where the first page lies: that of the dictionary, if there is one."""
    first: int = chunk.data_page_offset
    dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    return dictionary if dictionary and 0 < dictionary < first else first


def is_one_plain_page(header: bytes, rows: int, payload: int) -> bool:
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
        and fields.get(3) == payload
        and isinstance(page, dict)
        and page.get(1) == rows
        and page.get(2) == _PLAIN
    )


def _struct(data: bytes, at: int, nested: int = 0) -> tuple[dict[int, object], int]:
    """A struct of Thrift's compact protocol, as far as page headers use it: field number → value."""
    if nested > NESTED_LIMIT:
        raise ValueError("structs within structs")
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
            fields[number], at = _struct(data, at, nested + 1)
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

"""Parquet's footers and page headers, parsed here.

What a page holds is known before anything of it is decompressed: a footer may say anything of a column's size, a
decoder allocates what the page headers say. And pyarrow cannot be asked for a column chunk of a stranger's footer: what
it finds wrong there is a C++ exception that nobody catches, and the process dies (docs/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvrpipe.store.thrift import Fields, read_struct

HEADER_LIMIT = 64 << 10  # bytes; statistics in a page header make it longer than the usual 30
FOOTER_LIMIT = 64 << 20  # bytes; ours have some thousands
UNCOMPRESSED, ZSTD = 0, 6  # codecs
_DATA_PAGE, _PLAIN = 0, 0


@dataclass(frozen=True)
class Chunk:
    """A column's values of one row group, as the footer describes them."""

    path: str
    codec: int
    values: int
    size: int
    """bytes in the file, page headers included"""
    page: int
    """offset of the first data page"""
    dictionary: int | None
    """offset of the dictionary page, if there is one"""

    @property
    def begin(self) -> int:
        """Where the first page lies."""
        return self.dictionary if self.dictionary and 0 < self.dictionary < self.page else self.page


def read_chunks(data: NDArray[np.uint8]) -> list[dict[str, Chunk]]:
    """The column chunks of every row group, by path.

    Raises:
        ValueError: the file does not end with such a footer.
    """
    size = int.from_bytes(data[-8:-4].tobytes(), "little")
    if not 0 < size <= min(len(data) - 8, FOOTER_LIMIT):
        raise ValueError("a footer without an end")
    try:
        footer, _ = read_struct(data[-8 - size : -8].tobytes(), 0)
    except IndexError:
        raise ValueError("a footer without an end") from None
    return [
        {chunk.path: chunk for chunk in (_chunk(_of(column, 3, dict)) for column in _of(group, 1, list))}
        for group in _of(footer, 4, list)
    ]


def _chunk(fields: Fields) -> Chunk:
    codec, values, size, page = (_of(fields, number, int) for number in (4, 5, 7, 9))
    dictionary = _of(fields, 11, int) if 11 in fields else None
    path = ".".join(part.decode() for part in _of(fields, 3, list) if isinstance(part, bytes))
    return Chunk(path, codec, values, size, page, dictionary)


def _of(fields: object, number: int, kind: type) -> Any:
    """A field of a struct that must be there.

    Raises:
        ValueError: it is not, or of another type.
    """
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"a footer without field {number}")
    return value


def decoded_bytes(data: NDArray[np.uint8], chunk: Chunk) -> int:
    """Bytes of all pages of a column chunk once they are decompressed, as their headers say.

    Raises:
        ValueError: they are no pages that follow one another within the file.
    """
    at, total = chunk.begin, 0
    end = at + chunk.size
    if not 0 <= at <= end <= len(data):
        raise ValueError("a column chunk lies outside the file")
    while at < end:
        try:
            fields, length = read_struct(data[at : at + HEADER_LIMIT].tobytes(), 0)
        except IndexError:
            raise ValueError("a page header without an end") from None
        plain, packed = fields.get(2), fields.get(3)
        if not isinstance(plain, int) or not isinstance(packed, int) or min(plain, packed) < 0:
            raise ValueError("a page without a size")
        total, at = total + plain, at + length + packed
    return total


def header_length(head: bytes) -> int:
    """Bytes of the ``PageHeader`` that these begin with; 0 if they begin with none."""
    try:
        return read_struct(head, 0)[1]
    except (IndexError, ValueError):
        return 0


def is_one_plain_page(header: bytes, rows: int, payload: int, stored: int) -> bool:
    """Parse a Parquet ``PageHeader`` and see that it announces exactly the payload, and ends with it."""
    try:
        fields, end = read_struct(header, 0)
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

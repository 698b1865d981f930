"""From the bytes of a fuzzer to a damaged store: which store, which edits of its files, which hashes forged.

Edits know the formats, so that what is damaged is not only the hash in front of it: values within JSON,
varints within a Parquet footer, fields of tar headers with their checksums, the header of an ``.npy`` array,
or a whole Parquet file written anew with other options. Bytes that run out are zeros.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .stores import Files

EDITS_AT_MOST = 6
#: Values that a field may lie with.
VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 53) - 1, 1 << 62, 1 << 64, 10**30, 0.5, -0.0, 1e308,
    None, True, "", "a", "../../x", "/etc/passwd", "a" * 70_000, "\u0000", "\ud800", "0" * 64, "shards/00000.parquet",
    "shards/00000.tar", "float64", "bool", "mapped", "packed", "val", "embeddings", [], {}, [[]], [0] * 300, {"": 0},
)  # fmt: skip
NPY_HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (5,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (6, 2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-6, -2), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6, 2), }",
    "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (6,), }",
    "{'descr': 1, 'fortran_order': 0, 'shape': 6}",
    "(" * 60,
)
#: Ways to write a Parquet file anew.
REWRITES: tuple[dict[str, Any], ...] = (
    {"compression": "none", "use_dictionary": False},
    {"compression": "snappy"},
    {"compression": "gzip", "use_dictionary": False},
    {"compression": "lz4", "use_dictionary": False},
    {"compression": "brotli", "use_dictionary": False},
    {"data_page_version": "2.0", "compression": "zstd"},
    {"data_page_version": "2.0", "compression": "none", "use_dictionary": False},
    {"row_group_size": 2, "compression": "none", "use_dictionary": False},
    {"data_page_size": 8, "max_rows_per_page": 2, "compression": "none", "use_dictionary": False},
    {"write_page_index": True, "write_statistics": True, "compression": "none", "use_dictionary": False},
    {"use_byte_stream_split": True, "use_dictionary": False, "compression": "none"},
)


class Bytes:
    """A cursor over an input."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self._at += count
        return self._data[self._at - count : self._at].ljust(count, b"\0")

    def number(self, below: int, width: int = 1) -> int:
        """A number from 0 up to ``below``, exclusive; 0 if there is none."""
        return int.from_bytes(self.take(width), "little") % max(below, 1)


@dataclass(frozen=True)
class Damaged:
    """A store with some of its files replaced; None is a file that is not there."""

    store: int
    action: int
    changed: dict[str, bytes | None]


def damage(data: bytes, stores: list[Files], actions: int) -> Damaged:
    """What an input says: first store, action and forging, then edit after edit."""
    source = Bytes(data)
    number, action, forged = source.number(len(stores)), source.number(actions), source.number(4)
    files, names = stores[number], sorted(stores[number])
    changed: dict[str, bytes | None] = {}
    for _ in range(EDITS_AT_MOST):
        if not source:
            break
        name, edit = names[source.number(len(names))], EDITS[source.number(len(EDITS))]
        before = changed.get(name, files[name])
        if edit is _swap:
            changed[name] = files[names[source.number(len(names))]]
        elif edit is _remove or before is None:
            changed[name] = None
        else:
            changed[name] = edit(before, source)
    if forged != 3:
        _forge(files, changed, with_id=forged != 2)
    return Damaged(number, action, changed)


def _forge(files: Files, changed: dict[str, bytes | None], with_id: bool) -> None:
    """Make sizes, hashes and the id of the manifest those of the files as they are now."""
    try:
        manifest = json.loads(changed.get("store.json", files["store.json"]) or b"")
        for entry in manifest["shards"]:
            told = {**entry, **_told(changed.get(entry["file"]))}
            record = entry["file"].rsplit(".", 1)[0] + ".json"
            if told != entry and changed.get(record, b"") is not None:
                commit = json.loads(changed.get(record, files[record]) or b"")
                changed[record] = json.dumps({**commit, **_told(changed[entry["file"]])}).encode()
            entry.update(told)
        for name in manifest["files"]:
            if (data := changed.get(name)) is not None:
                manifest["files"][name] = hashlib.sha256(data).hexdigest()
        if with_id:
            made = {
                "specification": manifest["specification"],
                "shards": [e["sha256"] for e in manifest["shards"]],
            }
            made |= {"parts": manifest["parts"]} if manifest["parts"] else {}
            text = json.dumps(made, sort_keys=True, indent=1, ensure_ascii=False)
            manifest["id"] = hashlib.sha256(text.encode()).hexdigest()
        forged = json.dumps(manifest).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # too damaged to be forged
    if changed:
        changed["store.json"] = forged


def _told(data: bytes | None) -> dict[str, Any]:
    return {} if data is None else {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _overwrite(data: bytes, source: Bytes) -> bytes:
    at, new = source.number(len(data), 3), source.take(1 + source.number(12))
    return data[:at] + new + data[at + len(new) :]


def _overwrite_end(data: bytes, source: Bytes) -> bytes:
    at, new = len(data) - source.number(min(len(data), 2000), 2), source.take(1 + source.number(4))
    return data[:at] + new + data[at + len(new) :]


def _insert(data: bytes, source: Bytes) -> bytes:
    at = source.number(len(data), 3)
    return data[:at] + source.take(1 + source.number(12)) + data[at:]


def _delete(data: bytes, source: Bytes) -> bytes:
    at = source.number(len(data), 3)
    return data[:at] + data[at + 1 + source.number(64) :]


def _truncate(data: bytes, source: Bytes) -> bytes:
    return data[: source.number(len(data), 3)]


def _integer(data: bytes, source: Bytes) -> bytes:
    at, width = source.number(len(data), 3), (1, 2, 4, 8)[source.number(4)]
    value = (0, 1, -1, 1 << (8 * width - 2), (1 << (8 * width - 1)) - 1)[source.number(5)]
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def _json(data: bytes, source: Bytes) -> bytes:
    """Replace, drop, double or move one value of a JSON document, or of the JSON at the head of safetensors."""
    head, body, tail = b"", data, b""
    if data[8:9] == b"{" and data[:1] != b"{":
        size = int.from_bytes(data[:8], "little")
        head, body, tail = data[:8], data[8 : 8 + size], data[8 + size :]
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return _overwrite(data, source)
    places = list(_places(document))
    if not places:
        return data
    parent, key = places[source.number(len(places), 2)]
    how, value = source.number(4), VALUES[source.number(len(VALUES))]
    if how == 1:
        del parent[key]
    elif how == 2:
        other, place = places[source.number(len(places), 2)]
        value = json.loads(json.dumps(parent[key]))
        if isinstance(other, list):
            other.insert(place, value)
        else:
            other[place] = value
    elif how == 3 and isinstance(parent[key], int):
        parent[key] += source.number(7) - 3
    else:
        parent[key] = value
    new = json.dumps(document).encode()
    return (len(new).to_bytes(8, "little") if head else b"") + new + tail


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)


def _footer(data: bytes, source: Bytes) -> bytes:
    """Put a varint into a Parquet footer, and let its length follow."""
    size = int.from_bytes(data[-8:-4], "little")
    if data[-4:] != b"PAR1" or not 0 < size < len(data):
        return _tar(data, source)
    footer = data[-8 - size : -8]
    at, taken = source.number(size, 2), source.number(4)
    value = VALUES[source.number(12)] * (-1 if source.number(2) else 1)
    zigzag = ((value << 1) ^ (value >> 63)) % (1 << 64)
    varint = b""
    while zigzag > 127:
        varint, zigzag = varint + bytes([zigzag & 127 | 128]), zigzag >> 7
    footer = footer[:at] + varint + bytes([zigzag]) + footer[at + taken :]
    return data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _tar(data: bytes, source: Bytes) -> bytes:
    """Write into a tar header, checksum included; elsewhere, just write."""
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return _overwrite(data, source)
    at = headers[source.number(len(headers))]
    header = bytearray(data[at : at + 512])
    where, width = ((0, 20), (124, 12), (156, 1), (157, 20), (345, 20), (257, 8))[source.number(6)]
    new = (
        source.take(width),
        b"../../x\0",
        b"/etc/passwd",
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"1",
        b"L",
        b"x",
    )
    new_bytes = new[source.number(len(new))][:width]
    header[where : where + len(new_bytes)] = new_bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def _npy(data: bytes, source: Bytes) -> bytes:
    """Another header of the same length in front of an array."""
    found = [at for at in range(0, len(data), 64) if data[at : at + 6] == b"\x93NUMPY"]
    if not found:
        return _rewrite(data, source)
    at = found[source.number(len(found))]
    length = int.from_bytes(data[at + 8 : at + 10], "little")
    text = NPY_HEADERS[source.number(len(NPY_HEADERS))].encode()
    if source.number(2):  # a small change of the true header instead
        text = _overwrite(data[at + 10 : at + 10 + length], source)
    header = text[: length - 1].ljust(length - 1) + b"\n"
    return data[: at + 10] + header + data[at + 10 + length :]


def _rewrite(data: bytes, source: Bytes) -> bytes:
    """A Parquet file with other options, columns, types or rows."""
    if data[:4] != b"PAR1":
        return _json(data, source)
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        column, how = source.number(table.num_columns), source.number(7)
        if how == 1:
            table = table.drop_columns([table.column_names[column]])
        elif how == 2:
            table = table.slice(source.number(len(table)))
        elif how == 3:
            table = pa.concat_tables([table] * (1 + source.number(4)))
        elif how == 4:
            kind = (pa.string(), pa.int8(), pa.float64(), pa.list_(pa.int32()), pa.null(), pa.large_binary())
            empty = pa.nulls(len(table), kind[source.number(len(kind))])
            table = table.set_column(column, table.column_names[column], empty)
        elif how == 5:
            table = table.cast(pa.schema([f.with_nullable(True) for f in table.schema]))
        elif how == 6:
            table = table.select([*range(column, table.num_columns), *range(column)])
        out = io.BytesIO()
        pq.write_table(table, out, **REWRITES[source.number(len(REWRITES))])
    except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError):
        return _overwrite(data, source)
    return out.getvalue()


def _swap(data: bytes, source: Bytes) -> bytes:
    raise AssertionError("done by damage(), which knows the other files")


def _remove(data: bytes, source: Bytes) -> bytes:
    raise AssertionError("done by damage()")


EDITS: tuple[Callable[[bytes, Bytes], bytes], ...] = (
    _json, _footer, _tar, _npy, _rewrite, _overwrite, _overwrite_end, _insert, _delete, _truncate, _integer,
    _json, _footer, _swap, _remove, _json,
)  # fmt: skip

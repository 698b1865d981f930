"""Thrift's compact protocol, as far as Parquet's footers and page headers use it.

Whoever made the bytes: what is parsed holds no more values than they have bytes.
"""

from __future__ import annotations

NESTED_LIMIT = 12

Fields = dict[int, object]


def read_struct(data: bytes, at: int, nested: int = 0) -> tuple[Fields, int]:
    """A struct as field number → value, and where it ends.

    Raises:
        IndexError, ValueError: the bytes are none.
    """
    if nested > NESTED_LIMIT:
        raise ValueError("structs within structs")
    fields: Fields = {}
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
        else:
            fields[number], at = _value(data, at, kind, nested)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, nested: int) -> tuple[object, int]:
    """A value that is no field's boolean."""
    if kind in (1, 2, 3):  # within a list a boolean is a byte
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        if at + length > len(data):
            raise IndexError("text without an end")
        return data[at : at + length], at + length
    if kind == 9:
        return _list(data, at, nested)
    if kind == 12:
        return read_struct(data, at, nested + 1)
    raise ValueError(f"type {kind} does not occur in Parquet's headers")


def _list(data: bytes, at: int, nested: int) -> tuple[list[object], int]:
    if nested > NESTED_LIMIT:
        raise ValueError("lists within lists")
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    values = []
    for _ in range(count):  # each takes a byte at least, so this ends with the bytes
        value, at = _value(data, at, kind, nested + 1)
        values.append(value)
    return values, at


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

"""Files that are small and would be huge: refused before anything is parsed, decompressed or decoded."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pvrpipe.schemas.errors import CorruptStoreError, PvrpipeError, StoreError
from pvrpipe.store import parquet
from pvrpipe.store.layout import VALUES_LIMIT
from pvrpipe.store.merging import split
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .killing import run_killed
from .test_store_strangers import read_all, reseal

GROWTH = 400 << 20  # bytes that refusing may take


def refused(folder: Path, cause: str) -> None:
    """In a process of its own, whose memory is measured."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptStoreError, match=cause):
        read_all(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < GROWTH


@pytest.mark.parametrize("value", ["[],", "0,", '{"":[]},'])
def test_a_manifest_of_millions_of_values(write_rollouts: WriteStore, value: str) -> None:
    folder = write_rollouts()
    (folder / "store.json").write_text('{"files":[' + value * (VALUES_LIMIT + 1) + "0]}")
    assert not run_killed(refused, folder, "has more than 8388608 values")


def test_a_manifest_in_which_everything_is_wrong(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    (folder / "store.json").write_text('{"files":[' + "[]," * 1_000_000 + "0]}")
    assert not run_killed(refused, folder, "not a valid manifest")


def one_text(size: int, rows: int) -> pa.Array:
    """A dictionary with one long text, a few bits an occurrence."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))


def write_shard(folder: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    path = folder / "shards" / "00000.parquet"
    pq.write_table(change(pq.read_table(path)), path, **options)
    reseal(folder, "shards/00000.parquet")


def test_a_column_of_another_type_is_not_decoded(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()

    def long_text(table: pa.Table) -> pa.Table:
        at = table.column_names.index("reward")
        return table.set_column(at, "reward", one_text(24 << 20, len(table)))

    write_shard(folder, long_text, compression="zstd", store_schema=False)
    assert not run_killed(refused, folder, "it holds string, not float")


def varint(number: int) -> bytes:
    """As Thrift's compact protocol writes an int32."""
    left, out = number << 1, b""
    while left > 127:
        out, left = out + bytes([left & 127 | 128]), left >> 7
    return out + bytes([left])


def test_pages_that_claim_more_than_their_rows(write_rollouts: WriteStore) -> None:
    """A page header that promises 1 GiB, which a decoder would make room for."""
    folder = write_rollouts()
    path = folder / "shards" / "00000.parquet"
    data, chunk = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0)
    at, plain = chunk.data_page_offset, 31 * 8 * 8 * 3
    for packed in range(chunk.total_compressed_size):  # of the page: without its header
        before = b"\x15\x00\x15" + varint(plain) + b"\x15" + varint(packed)
        if data[at:].startswith(before):
            break
    cut = len(varint(1 << 30)) - len(varint(plain))
    after = b"\x15\x00\x15" + varint(1 << 30) + b"\x15" + varint(packed - cut)
    end = at + chunk.total_compressed_size
    path.write_bytes(data[:at] + after + data[at + len(before) : end - cut] + data[end:])
    assert path.stat().st_size == len(data)
    reseal(folder, "shards/00000.parquet")
    assert not run_killed(refused, folder, "its pages claim 1073741824 bytes for 31 rows")


def test_an_episode_table_of_one_long_text(write_rollouts: WriteStore) -> None:
    folder = write_rollouts([5] * 64)
    table = pq.read_table(folder / "episodes.parquet")
    at = table.column_names.index("policy")
    table = table.set_column(at, "policy", one_text(20 << 20, 64))
    pq.write_table(table, folder / "episodes.parquet", compression="zstd", store_schema=False)
    reseal(folder, "episodes.parquet")
    assert (folder / "episodes.parquet").stat().st_size < 1 << 20
    assert not run_killed(refused, folder, "its text takes")


def test_a_store_without_training_rows_verifies(write_rollouts: WriteStore, tmp_path: Path) -> None:
    split(write_rollouts(), tmp_path / "val", of="val")
    assert verify(tmp_path / "val") == []


def test_a_message_is_one_printable_line(write_rollouts: WriteStore) -> None:
    assert str(StoreError("a\nb\x1b[2J\udcff")) == "a b [2J "
    folder = write_rollouts()
    raw = json.loads((folder / "store.json").read_text())
    raw["two\n\x1b[31mlines"] = 1
    (folder / "store.json").write_text(json.dumps(raw))
    with pytest.raises(PvrpipeError, match="two  "):
        Store.open(folder)


@pytest.mark.parametrize("more", [-1, 1, 1 << 24])
@pytest.mark.parametrize("rows", ["all of a group", "one"])
def test_a_page_that_holds_more_or_less_than_it_should_is_refused(
    more: int, rows: str, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decompressed straight into the reader's array, which must neither overflow nor keep old bytes."""
    shard = Store.open(write_rollouts(size=24)).shard(0)
    size = shard.column("frame").width * shard.groups[0]
    page = np.frombuffer(pa.compress(bytes(size + more), codec="zstd", asbytes=True), np.uint8)
    monkeypatch.setattr(parquet, "zstd_page", lambda *_: page)
    with pytest.raises(CorruptStoreError, match="column 'frame' cannot be read"):
        shard.rows("frame", 0, 1 if rows == "one" else shard.groups[0])

"""docs/format.md is enough: readers that know nothing of pvrpipe decode the same arrays by its recipe."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store

from .conftest import WriteStore, draft, random_episode, rollout_specification

D = 24


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A shard with an embedding column, and what was written to it."""
    episode = random_episode(0, 60)
    embedding = np.random.default_rng(1).normal(size=(61, D)).astype(np.float16)
    columns = (
        column("embedding", "float16", (D,)),
        column("action", "float32", (2,)),
        column("reward", "float32", ()),
    )
    manifest = new_manifest(rollout_specification(1, 60), with_bounds(columns), plan_shards(1, 61))
    arrays = {"embedding": embedding, "action": episode.arrays["action"], "reward": episode.arrays["reward"]}
    with PendingStore.begin(tmp_path / "s", manifest) as pending:
        with ShardWriter(pending.folder, manifest, pending.todo[0]) as writer:
            writer.write_episode(type(episode)(episode.info, arrays))
            writer.commit()
        pending.seal()
    return tmp_path / "s" / "shards" / "00000.parquet", embedding


def test_plain_pyarrow(shard: tuple[Path, np.ndarray]) -> None:
    path, embedding = shard
    table = pq.read_table(path)
    metadata = table.schema.field("embedding").metadata
    shape = json.loads(metadata[b"pvrpipe.shape"])
    dtype = np.dtype(metadata[b"pvrpipe.dtype"].decode()).newbyteorder("<")
    values = table.column("embedding").combine_chunks()
    read = np.frombuffer(values.buffers()[1], dtype).reshape(len(values), *shape)
    np.testing.assert_array_equal(read, embedding)


def test_polars(shard: tuple[Path, np.ndarray]) -> None:
    path, embedding = shard
    rows = pl.read_parquet(path)["embedding"].to_list()
    np.testing.assert_array_equal(np.frombuffer(b"".join(rows), "<f2").reshape(-1, D), embedding)


def test_duckdb(shard: tuple[Path, np.ndarray]) -> None:
    path, embedding = shard
    rows = duckdb.sql(f"select embedding, reward, step from '{path}' order by step").fetchall()
    np.testing.assert_array_equal(np.stack([np.frombuffer(r[0], "<f2") for r in rows]), embedding)


def test_a_few_lines_of_struct_and_mmap(shard: tuple[Path, np.ndarray]) -> None:
    """The last D·N·2 bytes of the column chunk are the array; its place is in the manifest's own reader."""
    path, embedding = shard
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    end = chunk.data_page_offset + chunk.total_compressed_size
    raw = path.read_bytes()[end - embedding.nbytes : end]
    first = struct.unpack(f"<{D}e", raw[: 2 * D])
    np.testing.assert_array_equal(np.array(first, np.float16), embedding[0])
    mapped = Store.open(path.parent.parent).shard(0).mapped("embedding")
    assert mapped is not None
    assert mapped[0].tobytes() == raw


def test_the_webdataset_library_reads_what_was_written(tmp_path: Path) -> None:
    import webdataset

    episodes = [random_episode(i, length) for i, length in enumerate((30, 41, 25))]
    manifest = draft(episodes, shard_format="webdataset", shard_rows=1000)
    with PendingStore.begin(tmp_path / "s", manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(pending.folder, manifest, plan) as writer:
                for number in range(plan.first_episode, plan.first_episode + plan.episodes):
                    writer.write_episode(episodes[number])
                writer.commit()
        pending.seal()
    urls = [str(path) for path in sorted((tmp_path / "s" / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    for sample, episode in zip(samples, episodes, strict=True):
        assert sample["json"]["episode_return"] == episode.info.episode_return
        for name, array in episode.arrays.items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], array)


class Compact:
    """Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return struct.unpack_from("B", self.data, self.at - 1)[0]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (3, 4, 5, 6):
            return self.byte() if kind == 3 else self.zigzag()
        if kind == 7:
            self.at += 8
            return struct.unpack_from("<d", self.data, self.at - 8)[0]
        if kind == 8:
            length = self.varint()
            self.at += length
            return self.data[self.at - length : self.at]
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.byte() == 1 if head & 15 in (1, 2) else self.value(head & 15) for _ in range(count)]
        assert kind == 12
        return self.struct()

    def struct(self) -> dict[int, Any]:
        fields, number = {}, 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            fields[number] = self.value(head & 15)
        return fields


@pytest.mark.parametrize("name", ["action", "state", "physics", "reward", "step"])
def test_a_mapped_column_by_hand_with_nothing_but_struct(write_rollouts: WriteStore, name: str) -> None:
    folder = write_rollouts((700, 500), size=16, shard_rows=10_000)
    manifest = json.loads((folder / "store.json").read_text())
    column = next(c for c in manifest["columns"] if c["name"] == name)
    letter = {"float32": "f", "float64": "d", "int32": "i"}[column["dtype"]]
    per_row = math.prod(column["shape"])
    width = per_row * struct.calcsize(letter)
    data = (folder / manifest["shards"][0]["file"]).read_bytes()
    (length,) = struct.unpack_from("<I", data, len(data) - 8)
    assert data[-4:] == b"PAR1"
    footer = Compact(data[-8 - length : -8]).struct()
    rows: list[tuple[float, ...]] = []
    for group in footer[4]:
        chunk = next(c[3] for c in group[1] if c[3][3] == [name.encode()])
        count, compressed, page = chunk[5], chunk[7], chunk[9]
        end = page + compressed
        start = end - count * width
        header = Compact(data[page:start])
        found = header.struct()
        assert header.at == start - page
        assert (chunk[4], found[1], found[2], found[3]) == (0, 0, count * width, count * width)
        assert (found[5][1], found[5][2]) == (count, 0)
        rows += struct.iter_unpack(f"<{per_row}{letter}", data[start:end])
    store = Store.open(folder)
    expected = np.concatenate([store.read_episode(e, [name])[name] for e in (0, 1)])
    np.testing.assert_array_equal(np.array(rows).reshape(expected.shape), expected)

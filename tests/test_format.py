"""docs/format.md is enough: readers that know nothing of pvrpipe decode the same arrays by its recipe."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store

from .conftest import draft, random_episode, rollout_specification

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

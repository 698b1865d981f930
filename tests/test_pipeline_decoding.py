"""Reading a rollout store ahead of who encodes it: in order, across the ends of shards, past what is damaged."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pvrpipe.pipeline import decoding
from pvrpipe.pipeline.decoding import Decoded, ShardReader
from pvrpipe.pipeline.transfers import Upload
from pvrpipe.schemas.errors import CorruptStoreError
from pvrpipe.store import reading
from pvrpipe.store.files import sha256_of
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows, Shard

from .conftest import WriteStore


def frames_of(batches: Iterable[Decoded]) -> Rows:
    return np.concatenate([batch.frames().numpy() for batch in batches])


def test_shards_are_read_ahead_whatever_their_size(
    write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one batch each, so that who reads one shard ahead would read one batch ahead."""
    store, read, arrived = Store.open(write_rollouts((6,) * 8, shard_rows=6)), Shard.rows, set[Path]()
    fourth = threading.Event()

    def rows(data: Shard, name: str, start: int, count: int, *into: Rows) -> Rows:
        arrived.add(data.path)
        if len(arrived) == 4:
            fourth.set()
        return read(data, name, start, count, *into)

    monkeypatch.setattr(Shard, "rows", rows)
    monkeypatch.setattr(decoding, "decoding_threads", lambda device: 3)
    reader, expected = (
        ShardReader(store, torch.device("cpu")),
        [store.read_episode(episode)["frame"] for episode in range(8)],
    )
    arrived.clear()
    fourth.clear()
    with reader.ahead([(shard, 6) for shard in range(8)]):
        np.testing.assert_array_equal(frames_of(reader.batches(0, 6)), expected[0])
        assert fourth.wait(60)
        for shard in range(1, 8):
            np.testing.assert_array_equal(frames_of(reader.batches(shard, 6)), expected[shard])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_shard_that_is_given_up_or_begun_again_leaves_the_next_as_it_is(
    threads: int, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(write_rollouts((9, 9, 9), shard_rows=9))
    monkeypatch.setattr(decoding, "decoding_threads", lambda device: threads)
    reader = ShardReader(store, torch.device("cpu"))
    with reader.ahead([(shard, 2) for shard in range(3)]):
        given_up = reader.batches(0, 2)
        next(given_up)
        given_up.close()
        for size in (1, 2):  # another encoder's batches may be those that are smaller now
            again = frames_of(reader.batches(0, size))
            np.testing.assert_array_equal(again, store.read_episode(0)["frame"])
        for shard in (1, 2):
            found = frames_of(reader.batches(shard, 2))
            np.testing.assert_array_equal(found, store.read_episode(shard)["frame"])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_file_that_is_not_the_stores_is_hashed_once_and_stops_its_own_shard(
    threads: int, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, hashed = write_rollouts((9, 9), shard_rows=9), list[str]()
    damaged = folder / "shards" / "00000.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)

    def counted(file: Path) -> str:
        hashed.append(file.stem)
        return sha256_of(file)

    monkeypatch.setattr(reading, "sha256_of", counted)
    monkeypatch.setattr(decoding, "decoding_threads", lambda device: threads)
    store = Store.open(folder, prove=True)
    reader = ShardReader(store, torch.device("cpu"))
    with reader.ahead([(0, 2), (1, 2)]):
        with pytest.raises(CorruptStoreError, match=r"^episode 0, step 0 cannot be read: .* has sha256"):
            list(reader.batches(0, 2))
        np.testing.assert_array_equal(frames_of(reader.batches(1, 2)), store.read_episode(1)["frame"])
    assert sorted(hashed) == ["00000", "00001"]


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("no room"), RuntimeError("another")])
def test_what_stops_one_shard_is_raised_there_and_the_next_is_read(
    threads: int, failure: Exception, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that frames are decoded into may be short once, far ahead of who is told."""
    store, room, asked = Store.open(write_rollouts((9, 9, 9), shard_rows=9)), Upload.room, itertools.count()

    def short_once(upload: Upload, shape: tuple[int, ...]) -> Tensor:
        if next(asked) == 6:
            raise failure
        return room(upload, shape)

    monkeypatch.setattr(Upload, "room", short_once)
    monkeypatch.setattr(decoding, "decoding_threads", lambda device: threads)
    reader, told = ShardReader(store, torch.device("cpu")), list[Exception]()
    with reader.ahead([(shard, 2) for shard in range(3)]):
        for shard in range(3):
            try:
                found = frames_of(reader.batches(shard, 2))
            except type(failure) as error:
                told.append(error)
                found = frames_of(reader.batches(shard, 1))
            np.testing.assert_array_equal(found, store.read_episode(shard)["frame"])
    assert told == [failure]


@pytest.mark.parametrize("threads", [0, 3])
def test_files_are_opened_ahead_and_at_once_and_no_thread_is_left(
    threads: int, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, opened = Store.open(write_rollouts((9, 9), shard_rows=9)), Store.shard
    both = threading.Barrier(2)

    def together(self: Store, index: int) -> Shard:
        both.wait(60)
        return opened(self, index)

    monkeypatch.setattr(Store, "shard", together)
    monkeypatch.setattr(decoding, "decoding_threads", lambda device: threads)
    reader = ShardReader(store, torch.device("cpu"))
    with reader.ahead([(shard, 2) for shard in range(2)]):
        assert len(next(reader.batches(0, 2)).frames()) == 2
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("read-ahead", "open", "decode"))]

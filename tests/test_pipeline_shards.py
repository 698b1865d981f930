"""One shard that goes wrong half way: it stops with its reason, its first row is named, and others go on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pvrpipe.pipeline import embedding
from pvrpipe.pipeline.decoding import ShardReader
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.embedding import OutOfRoomError, Work, stored_as
from pvrpipe.pipeline.encoders import Encoder
from pvrpipe.schemas.errors import CorruptStoreError, EncodingError, InvalidValueError, StoreError
from pvrpipe.schemas.records import Episode
from pvrpipe.store.casting import cast_embedding, is_finite
from pvrpipe.store.layout import read_commit
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows, Shard
from pvrpipe.store.verifying import verify
from pvrpipe.store.writing import CheckedRows, ShardWriter

from . import conftest
from .brittle import brittle
from .conftest import WriteStore

INLINE = EmbedConfig(engine="inline")


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(size=24)


def _committed(folder: Path) -> list[bool]:
    return [read_commit(folder, shard) is not None for shard in range(6)]


def test_a_frame_that_fits_no_more_stops_its_shard_and_no_other(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fitted when the store was begun; a batch of one is not halved for ever."""
    encode, asked = embedding._encode, itertools.count()

    def full(work: Work, frames: Tensor) -> Tensor:
        if next(asked) < 4:  # batches of 8, 4, 2 and 1
            raise OutOfRoomError(work)
        return encode(work, frames)

    monkeypatch.setattr(embedding, "_encode", full)
    with pytest.raises(EncodingError, match="one frame does not fit into the memory of cpu"):
        embed(rollouts, [(brittle(tmp_path / "pvr", batch=8), tmp_path / "e")], INLINE)
    assert _committed(tmp_path / "e") == [False, *[True] * 5]


def test_rows_that_could_not_be_written_stop_their_shard_with_the_reason(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of many batches, so that the others are on their way when it fails."""
    append, written = ShardWriter.append, itertools.count()

    def fails_once(writer: ShardWriter, rows: CheckedRows) -> None:
        if next(written) == 0:
            raise StoreError("no space is left")
        append(writer, rows)

    monkeypatch.setattr(ShardWriter, "append", fails_once)
    with pytest.raises(StoreError, match=r"^no space is left$"):
        embed(rollouts, [(brittle(tmp_path / "pvr", batch=2), tmp_path / "e")], INLINE)
    assert _committed(tmp_path / "e") == [False, *[True] * 5]


@pytest.mark.parametrize("row", [0, 3, 4, 7])
def test_the_row_that_cannot_be_read_is_named_by_its_own_episode(
    row: int, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard with two episodes of 4 rows, also the first and the last of each."""
    store = Store.open(write_rollouts((3, 3), shard_rows=8))
    assert [entry.rows for entry in store.manifest.shards] == [8]
    read = Shard.rows

    def broken(data: Shard, name: str, start: int, count: int, *into: Rows) -> Rows:
        if name == "frame" and start <= row < start + count:
            raise CorruptStoreError("a page is damaged")
        return read(data, name, start, count, *into)

    monkeypatch.setattr(Shard, "rows", broken)
    where = rf"^episode {row // 4}, step {row % 4} cannot be read: a page is damaged"
    with pytest.raises(CorruptStoreError, match=where):
        list(ShardReader(store, torch.device("cpu")).batches(0, 8))


def test_of_embeddings_that_cannot_be_stored_the_first_is_named() -> None:
    rows = {
        "episode": np.array([7, 7, 7, 8, 8, 8], np.int32),
        "step": np.tile(np.arange(3, dtype=np.int32), 2),
    }
    values = np.ones((6, 2, 2), np.float32)
    values[4:] = 1e6
    with pytest.raises(
        EncodingError, match=r"gives 1000000 at episode 8, step 1, beyond float16; say float32"
    ):
        cast_embedding(values, "float16", rows, "it", "say float32")


def test_every_half_is_known_to_be_finite_or_not() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert [is_finite(half[None]) for half in halves] == np.isfinite(halves).tolist()
    assert is_finite(halves[:0])
    assert not is_finite(halves)


def test_a_column_that_embeddings_do_not_have_is_left_with_its_rollouts(
    write_rollouts: WriteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format lets a store have columns of its own."""
    usual = conftest.random_episode

    def episode(*numbers: int) -> Episode:
        made = usual(*numbers)
        return Episode(made.info, {**made.arrays, "discount": np.ones_like(made.arrays["reward"])})

    monkeypatch.setattr(conftest, "random_episode", episode)
    rollouts = write_rollouts((9, 6), size=24)
    assert verify(rollouts) == []
    embed(rollouts, [(brittle(tmp_path / "pvr"), tmp_path / "e")], INLINE)
    assert verify(tmp_path / "e") == []
    kept = {"embedding", "action", "reward", "state", "episode", "step", "is_first", "is_last", "is_terminal"}
    assert set(Store.open(tmp_path / "e").columns) == kept


def test_the_network_sees_full_batches_only(tmp_path: Path) -> None:
    """Other shapes take other kernels: rows left over would have other bits than the same rows of a full batch."""
    encoder = Encoder(brittle(tmp_path / "pvr", batch=8))
    compute = encoder._compute
    seen: list[int] = []
    encoder._compute = lambda pixels: (seen.append(len(pixels)), compute(pixels))[1]
    frames = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), np.uint8)
    whole, some = encoder(frames), encoder(frames[:3])
    assert seen == [8, 8]
    np.testing.assert_array_equal(some, whole[:3])
    with pytest.raises(InvalidValueError, match="given 9 frames at once and has batches of 8"):
        encoder(np.concatenate([frames, frames[:1]]))  # whose last embedding would not be there


def test_float32_is_float32_while_an_encoder_computes_and_as_before_afterwards(tmp_path: Path) -> None:
    """On a GPU convolutions go over ten bits where nothing is said, and take whichever algorithm is quickest."""
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings() -> tuple[bool, bool, bool]:
        return matmul.allow_tf32, convolutions.allow_tf32, convolutions.deterministic

    encoder, seen = Encoder(brittle(tmp_path / "pvr", batch=1)), list[tuple[bool, bool, bool]]()
    compute = encoder._compute
    encoder._compute = lambda pixels: (seen.append(settings()), compute(pixels))[1]
    before = settings()
    try:
        matmul.allow_tf32, convolutions.allow_tf32, convolutions.deterministic = others = True, True, False
        encoder(np.zeros((1, 24, 24, 3), np.uint8))
        assert settings() == others
    finally:
        matmul.allow_tf32, convolutions.allow_tf32, convolutions.deterministic = before
    assert seen == [(False, False, True)]


def test_on_a_cpu_shards_are_encoded_in_one_thread(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the manifest says: sums over several threads may have other last bits."""
    encode, threads = embedding._encode, set[int]()

    def counted(work: Work, frames: Tensor) -> Tensor:
        threads.add(torch.get_num_threads())
        return encode(work, frames)

    monkeypatch.setattr(embedding, "_encode", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        embed(rollouts, [(brittle(tmp_path / "pvr"), tmp_path / "e")], INLINE)
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


def test_halves_are_rounded_as_numpy_rounds_them() -> None:
    """Every half, what lies in the middle between two, and the numbers beside that."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.sort(halves[np.isfinite(halves)]).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, between, *(np.nextafter(between, np.float32(s)) for s in (-9e9, 9e9))])
    values = values[np.abs(values) < 65520, None]  # from there on they would be infinite
    rows = {name: np.zeros(len(values), np.int32) for name in ("episode", "step")}
    stored = stored_as(values, "float16", "it", rows)
    np.testing.assert_array_equal(stored.view(np.uint16), values.astype(np.float16).view(np.uint16))

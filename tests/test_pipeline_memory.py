"""How large the batches of the stage are, and what it does when memory is short."""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pvrpipe.pipeline import embedding, memory
from pvrpipe.pipeline.embed import EmbedConfig, embed, estimate
from pvrpipe.pipeline.embedding import OutOfRoomError, Work
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.memory import even_batch, fit, kept_memory, peak_of, tried_until_it_fits
from pvrpipe.schemas.errors import EncodingError, OutputExistsError
from pvrpipe.store.describing import describe
from pvrpipe.store.layout import read_commit
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .brittle import brittle, number_of
from .conftest import WriteStore

INLINE = EmbedConfig(engine="inline")


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(size=24)


def test_out_of_memory_halves_the_batch_and_the_store_says_so(rollouts: Path, tmp_path: Path) -> None:
    """As on a GPU that others use too: the batch fitted when the store was begun, and later it does not."""
    request = brittle(tmp_path / "pvr", most=5, batch=16)
    folder = tmp_path / "e"
    (result,) = embed(rollouts, [(request, folder)], INLINE)
    assert (result.batch, result.smaller_batches) == (16, 6)
    manifest = Store.open(folder).manifest
    assert [entry.batch for entry in manifest.shards] == [4] * 6
    commit = read_commit(folder, 0)
    assert commit is not None
    assert commit.batch == 4
    assert '"batch": 4' in (folder / "store.json").read_text()
    assert verify(folder) == []
    assert "6 shards" in (folder / "README.md").read_text()
    assert describe(Store.open(folder))["smaller_batches"] == 6
    enough = brittle(tmp_path / "enough", batch=4)
    embed(rollouts, [(enough, tmp_path / "f")], INLINE)
    for episode in range(6):  # and the bits are those of batches of 4
        rows = [
            Store.open(f).read_episode(episode, ["embedding"])["embedding"] for f in (folder, tmp_path / "f")
        ]
        np.testing.assert_array_equal(*rows)


def test_what_a_shard_holds_does_not_depend_on_memory_that_was_short_before_it(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, short = embedding._encode, [True]

    def short_once(work: Work, frames: torch.Tensor) -> torch.Tensor:
        if short:
            short.clear()
            raise OutOfRoomError(work)
        return encode(work, frames)

    monkeypatch.setattr(embedding, "_encode", short_once)
    embed(rollouts, [(brittle(tmp_path / "pvr", batch=16), tmp_path / "e")], INLINE)
    assert [entry.batch for entry in Store.open(tmp_path / "e").manifest.shards] == [8, *[None] * 5]


def test_an_automatic_batch_is_halved_before_the_store_is_begun(tmp_path: Path) -> None:
    """What is tried on a GPU, on this device; a batch that was asked for is refused instead."""
    encoder = Encoder(brittle(tmp_path / "pvr", most=20, batch=256))
    with pytest.raises(EncodingError, match=r"a batch of 256 does not fit .* give a smaller --batch"):
        tried_until_it_fits(encoder, (24, 24, 3), fixed=True)
    tried_until_it_fits(encoder, (24, 24, 3), fixed=False)
    assert encoder.batch == 16


@pytest.mark.parametrize(
    ("shards", "batch"),
    [
        ([1], 4),
        ([8], 8),
        ([200], 200),
        ([256], 256),
        ([257], 132),
        ([401], 204),
        ([501], 252),
        ([2005], 252),
        ([1203] * 7 + [1604], 244),  # by the largest alone 232, with 189 empty rows in each of the others
        ([0, 100], 100),
    ],
)
def test_a_batch_is_chosen_that_leaves_little_of_the_last_ones_empty(shards: list[int], batch: int) -> None:
    assert even_batch(shards, "cuda") == batch


@pytest.mark.parametrize(
    ("shards", "batch"),
    [
        ([1], 1),
        ([33], 17),
        ([101], 26),  # where four batches of 32 would be padded by 27 rows
        ([1001], 28),
        ([2005], 32),
        ([601] * 9 + [602], 32),
    ],
)
def test_on_a_cpu_too(shards: list[int], batch: int) -> None:
    assert even_batch(shards, "cpu") == batch


def test_embeddings_of_another_shape_than_was_told_are_refused_before_a_store_is_begun(
    tmp_path: Path,
) -> None:
    """A network that looks at numbers may give data another shape than it gives pixels without."""
    encoder = Encoder(brittle(tmp_path / "pvr"))
    compute = encoder._compute
    encoder._compute = lambda pixels: compute(pixels)[:, 1:]
    with pytest.raises(
        EncodingError, match=r"gives embeddings of \[\d+\], but its specification says \[\d+\]"
    ):
        tried_until_it_fits(encoder, (24, 24, 3), fixed=True)


def test_one_frame_that_does_not_fit_is_one_line(rollouts: Path, tmp_path: Path) -> None:
    request = brittle(tmp_path / "pvr", most=0)
    with pytest.raises(EncodingError, match=r"one frame does not fit into the memory of cpu; .* fewer --pvr"):
        embed(rollouts, [(request, tmp_path / "e")], INLINE)


def test_a_store_keeps_the_batch_it_was_begun_with(rollouts: Path, tmp_path: Path) -> None:
    frame = number_of(Store.open(rollouts).read_episode(2)["frame"][5])
    broken = brittle(tmp_path / "pvr", nan_at=frame, batch=8)
    with pytest.raises(EncodingError):
        embed(rollouts, [(broken, tmp_path / "e")], INLINE)
    again = EncoderRequest(broken.pvr, broken.weights, device="cpu")
    (asked,) = estimate(rollouts, [(again, tmp_path / "e")], INLINE)
    assert (asked.batch, asked.shards) == (8, 1)
    other = EncoderRequest(broken.pvr, broken.weights, device="cpu", batch=16)
    with pytest.raises(OutputExistsError, match=r"computation\.batch: 8, now 16"):
        embed(rollouts, [(other, tmp_path / "e")], INLINE)
    anew = EmbedConfig(engine="inline", overwrite=True)
    assert estimate(rollouts, [(again, tmp_path / "e")], anew)[0].batch == 17  # of shards of 33 rows and less


@pytest.mark.parametrize("batch", [10**8, 10**20])
def test_a_batch_of_more_frames_than_memory_holds_is_one_line(
    rollouts: Path, tmp_path: Path, batch: int
) -> None:
    request = replace(brittle(tmp_path / "pvr"), batch=batch)
    with pytest.raises(EncodingError, match=rf"a batch of {batch} does not fit .* smaller --batch"):
        embed(rollouts, [(request, tmp_path / "e")], INLINE)
    assert not (tmp_path / "e").exists()


def test_memory_of_a_batch_is_measured() -> None:
    freed = [torch.ones(1 << 18) for _ in range(64)]  # 64 MiB that the C library may keep, and use again
    del freed
    with peak_of(torch.device("cpu")) as peak:
        torch.ones(8 << 20)  # 32 MiB
    assert 30 << 20 < peak.bytes < 60 << 20


def test_what_a_batch_takes_on_a_cpu_is_that_of_all_its_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame is measured; which encoders go together is decided by what a batch of them takes."""
    encoder = Encoder(brittle(tmp_path / "pvr", batch=16))
    monkeypatch.setattr(memory, "_tried", lambda encoder, _, frames: 1000 * frames)
    assert fit(encoder, (24, 24, 3), [100], fixed=True).batch == 16_000
    assert encoder.batch == 16


def test_an_encoder_that_is_let_go_leaves_its_memory_at_once() -> None:
    """A draft is let go before the next is loaded, and before workers are counted by what is free."""
    frame = (24, 24, 3)
    encoder = Encoder(EncoderRequest("resnet18", "random:0", device="cpu", batch=1))
    network = weakref.ref(encoder.network)
    fit(encoder, frame, [100], fixed=True)
    gc.disable()
    try:
        encoder(np.zeros((1, *frame), np.uint8))
        del encoder
        assert network() is None
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted for a thread there alone")
def test_what_a_batch_frees_is_kept_for_the_next_and_given_back_at_the_end() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        torch.ones(100 << 20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    pages = (100 << 20) // resource.getpagesize()
    assert faults() > pages / 100
    with kept_memory(torch.device("cpu")):
        for _ in range(5):  # where the first lie, and what they leave between them, is the library's affair
            last = faults()
        assert last < pages / 100
        held = resident()
    assert resident() < held - (90 << 20)

"""The stage when something is broken: the disk, a frame, an embedding, a worker; and what it says beforehand."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pvrpipe.pipeline import drafting, embedding, encoders
from pvrpipe.pipeline.drafting import draft, made_by
from pvrpipe.pipeline.embed import EmbedConfig, embed, estimate
from pvrpipe.pipeline.embedding import COMMITS, ShardEmbedder, Target, stored_as
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, device_named
from pvrpipe.pipeline.transfers import ReadAhead, in_order
from pvrpipe.schemas.errors import (
    CorruptStoreError,
    EncodingError,
    InvalidValueError,
    StoreError,
)
from pvrpipe.schemas.manifest import ShardCommit
from pvrpipe.schemas.records import Episode
from pvrpipe.store.building import PendingStore
from pvrpipe.store.files import sha256_of
from pvrpipe.store.layout import read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows
from pvrpipe.store.verifying import verify
from pvrpipe.store.writing import CheckedRows, ShardWriter

from . import conftest
from .brittle import Brittle, brittle, number_of
from .conftest import WriteStore

INLINE = EmbedConfig(engine="inline")


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(size=24)


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        InvalidValueError, match=r"--device cuda:2: the GPUs visible here are 0 to 1; name one"
    ):
        device_named("cuda:2")


def test_an_embedding_that_is_not_finite_stops_its_shard_for_its_own_store(
    rollouts: Path, tmp_path: Path
) -> None:
    frame = number_of(Store.open(rollouts).read_episode(2)["frame"][5])
    outputs = [
        (brittle(tmp_path / "pvr", nan_at=frame), tmp_path / "e"),
        (brittle(tmp_path / "sound", name="sound"), tmp_path / "sound-e"),
    ]
    with pytest.raises(
        EncodingError, match=r"brittle gives an embedding that is not finite at episode 2, step 5"
    ):
        embed(rollouts, outputs, INLINE)
    assert [p.stem for p in sorted((tmp_path / "e" / "shards").glob("*.json"))] == [
        f"{n:05d}" for n in (0, 1, 3, 4, 5)
    ]
    assert read_manifest(tmp_path / "e").state == "writing"
    assert verify(tmp_path / "sound-e") == []  # finished, whatever became of the other
    (alone,) = embed(rollouts, [(outputs[1][0], tmp_path / "alone")], INLINE)
    assert read_manifest(tmp_path / "sound-e").id == alone.id
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_of_two_batches_that_fail_the_first_is_told_though_it_is_checked_last(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = threading.Event()

    def slow(found: np.ndarray, dtype: str, encoder: str, rows: Mapping[str, Rows]) -> Rows:
        if rows["episode"][0] == 2 and rows["step"][0] == 8:
            assert second.wait(20)
        if rows["episode"][0] == 2 and rows["step"][0] == 12:
            second.set()
        lost = found + np.where((rows["episode"] == 2) & (rows["step"] > 8), np.nan, 0)[:, None]
        return stored_as(lost.astype(np.float32), dtype, encoder, rows)

    monkeypatch.setattr(embedding, "stored_as", slow)
    with pytest.raises(EncodingError, match=r"not finite at episode 2, step 9;"):
        embed(rollouts, [(brittle(tmp_path / "pvr", batch=4), tmp_path / "e")], INLINE)


def test_seconds_in_which_two_threads_wait_for_the_device_count_once(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(values: Tensor) -> Callable[[], np.ndarray]:
        there = time.perf_counter() + 0.2

        def arrived() -> np.ndarray:
            time.sleep(max(0.0, there - time.perf_counter()))
            return values.numpy()

        return arrived

    monkeypatch.setattr(embedding, "download", slowly)
    began = time.perf_counter()
    (result,) = embed(rollouts, [(brittle(tmp_path / "pvr", batch=4), tmp_path / "e")], INLINE)
    assert 0.2 < result.model_seconds < time.perf_counter() - began


def test_failures_of_two_stores_are_told_one_by_one(rollouts: Path, tmp_path: Path) -> None:
    frames = Store.open(rollouts).read_episode(2)["frame"]
    outputs = [
        (brittle(tmp_path / f"pvr{n}", name=f"pvr{n}", nan_at=number_of(frames[step])), tmp_path / f"e{n}")
        for n, step in enumerate((20, 3))
    ]
    told = r"pvr1 .* episode 2, step 3; .* \(and 1 more failure: pvr0 .* episode 2, step 20; .*\)"
    with pytest.raises(EncodingError, match=told):
        embed(rollouts, outputs, INLINE)


def test_a_frame_that_cannot_be_read_stops_its_shard_with_episode_and_step(
    rollouts: Path, tmp_path: Path
) -> None:
    shard = rollouts / "shards" / "00003.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"episode 3, step 0 cannot be read: .*has sha256"):
        embed(rollouts, [(brittle(tmp_path / "pvr"), tmp_path / "e")], INLINE)
    assert len(list((tmp_path / "e" / "shards").glob("*.json"))) == 5


def test_a_page_that_does_not_decode_is_named_by_its_first_frame(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    """Hashes that hold do not help where what was hashed is nonsense: here from the second row group on."""
    rollouts = write_rollouts((400, 30), size=64)
    shard = rollouts / "shards" / "00000.parquet"
    first = Store.open(rollouts).manifest.shards[0].row_groups[0]
    footer = pq.read_metadata(shard)
    frame = next(i for i in range(footer.num_columns) if footer.schema.column(i).name == "frame")
    data, before = bytearray(shard.read_bytes()), sha256_of(shard)
    at = data.index(b"\x28\xb5\x2f\xfd", footer.row_group(1).column(frame).data_page_offset)  # zstd's magic
    data[at] ^= 1
    shard.write_bytes(data)
    manifest = rollouts / "store.json"
    manifest.write_text(manifest.read_text().replace(before, sha256_of(shard)))
    with pytest.raises(CorruptStoreError, match=rf"episode 0, step {first} cannot be read: "):
        embed(rollouts, [(brittle(tmp_path / "pvr", 64), tmp_path / "e")], INLINE)
    assert [p.stem for p in (tmp_path / "e" / "shards").glob("*.json")] == ["00001"]


def test_a_network_that_draws_is_refused_before_anything_is_written(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Brittle.forward

    def drawing(self: Brittle, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + torch.rand(1, device=x.device)

    monkeypatch.setattr(Brittle, "forward", drawing)
    with pytest.raises(
        EncodingError, match=r"^brittle gives the same frame another embedding each time; let"
    ):
        embed(rollouts, [(brittle(tmp_path / "pvr"), tmp_path / "e")], INLINE)
    assert not (tmp_path / "e").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(rollouts: Path, tmp_path: Path) -> None:
    request = brittle(tmp_path / "pvr")
    (asked,) = estimate(rollouts, [(request, tmp_path / "e")], INLINE)
    assert not (tmp_path / "e").exists()
    rows = Store.open(rollouts).manifest.rows
    assert (asked.shards, asked.rows) == (6, rows)
    assert asked.hours == pytest.approx(rows / asked.frames_per_second / 3600)
    (made,) = embed(rollouts, [(request, tmp_path / "e")], INLINE)
    assert asked.bytes < made.bytes < asked.bytes + 6 * 4096  # the footers of the shards
    (left,) = estimate(rollouts, [(request, tmp_path / "e")], INLINE)
    assert (left.shards, left.rows, left.bytes, left.hours) == (0, 0, 0, 0)


@pytest.mark.parametrize(("asked", "workers"), [(2, 2), (100, 6)])  # of six shards
def test_the_hours_of_a_dry_run_are_those_of_all_workers_that_have_a_shard(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, workers: int
) -> None:
    monkeypatch.setattr(drafting, "_rate", lambda *_: 10.0)
    config = EmbedConfig(engine="ray", workers=asked)
    (told,) = estimate(rollouts, [(brittle(tmp_path / "pvr"), tmp_path / "e")], config)
    assert (told.workers, told.frames_per_second) == (workers, 10 * workers)
    assert told.hours == pytest.approx(told.rows / (10 * workers) / 3600)


def test_the_rate_of_a_dry_run_is_not_that_of_the_first_batch(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though every shard may be of one: the first is slow, and hours of a large store would be twice what they are."""
    request = brittle(tmp_path / "pvr", batch=64)
    clock, encode = [0.0], Encoder.encode
    first = torch.from_numpy(Store.open(rollouts).read_episode(0)["frame"][0])

    def timed(encoder: Encoder, pixels: Tensor) -> Tensor:
        clock[0] += 10 if torch.equal(pixels[0], first) else 2
        return encode(encoder, pixels)

    monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Encoder, "encode", timed)
    assert estimate(rollouts, [(request, tmp_path / "e")], INLINE)[0].frames_per_second == 64 / 2


def test_what_the_disk_has_no_room_for_is_refused_with_both_sizes(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    outputs = [(brittle(tmp_path / f"pvr{n}"), tmp_path / f"e{n}") for n in range(2)]
    each = estimate(rollouts, outputs[:1], INLINE)[0].bytes
    for asked, free in ((outputs[:1], each - 1), (outputs, 2 * each - 1)):  # of one disk, all together
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(
            StoreError, match=r"take about [\d.]+ kB, but [\d.]+ kB are free at .*smaller --dtype"
        ):
            embed(rollouts, asked, INLINE)
        assert not [folder for _, folder in outputs if folder.exists()]
    embed(rollouts, outputs[:1], INLINE)


def test_a_worker_with_other_weights_is_told_so(rollouts: Path, tmp_path: Path) -> None:
    request = brittle(tmp_path / "pvr")
    made = draft(Store.open(rollouts), request, tmp_path / "e", INLINE)
    other = EncoderRequest(request.pvr, "random:1", device="cpu", batch=16)
    target = Target(other, tmp_path / "e", made.manifest, made_by(made.manifest), frozenset({0}))
    with pytest.raises(EncodingError, match=r"weights\.random_seed: 0, on this worker 1"):
        ShardEmbedder(rollouts, [target])


def test_a_worker_that_resizes_with_other_kernels_is_told_so(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU without a C compiler takes torch's; to a grey level they give the same."""
    request = brittle(tmp_path / "pvr")
    with monkeypatch.context() as with_triton:
        with_triton.setattr(encoders, "own_kernels", lambda device: abs)
        made = draft(Store.open(rollouts), request, tmp_path / "e", INLINE)
    assert made_by(made.manifest).computation.resizing == "triton"
    target = Target(made.request, tmp_path / "e", made.manifest, made_by(made.manifest), frozenset({0}))
    with pytest.raises(EncodingError, match=r"resizing: triton, on this worker .*let workers be alike"):
        ShardEmbedder(rollouts, [target])


def test_a_disk_that_is_slow_to_commit_does_not_stop_the_next_shard(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a device would wait for it too. Here a shard is committed once the next is encoded and written."""
    request = brittle(tmp_path / "pvr", batch=2)
    made = draft(Store.open(rollouts), request, tmp_path / "e", INLINE)
    target = Target(made.request, tmp_path / "e", made.manifest, made_by(made.manifest), frozenset({0, 1}))
    following = iter(range((Store.open(rollouts).manifest.shards[1].rows - 1) // 2))
    append, commit, enough = ShardWriter.append, ShardWriter.commit, threading.Event()

    def counted(writer: ShardWriter, rows: CheckedRows) -> None:
        append(writer, rows)
        if writer.plan.shard == 1 and next(following, None) is None:
            enough.set()

    def slow(writer: ShardWriter, batch: int | None) -> ShardCommit:
        assert writer.plan.shard == 1 or enough.wait(20)
        return commit(writer, batch=batch)

    monkeypatch.setattr(ShardWriter, "append", counted)
    monkeypatch.setattr(ShardWriter, "commit", slow)
    with PendingStore.begin(tmp_path / "e", made.manifest):
        outcomes = list(ShardEmbedder(rollouts, [target]).each([0, 1]))
    assert [(outcome.shard, outcome.failures) for outcome in outcomes] == [(0, []), (1, [])]


def test_what_threads_read_ahead_is_in_order_and_raises_here() -> None:
    def failing(until: int) -> Generator[int, None, None]:
        yield from range(until)
        raise ZeroDivisionError

    for threads in (0, 3):
        assert list(in_order(lambda n: n**2, range(9), threads)) == [n**2 for n in range(9)]
        items = in_order(lambda n: 1 // (5 - n), range(9), threads)
        assert [next(items) for _ in range(5)] == [0, 0, 0, 0, 1]
        with pytest.raises(ZeroDivisionError):
            next(items)
    items = iter(ReadAhead(failing(5)))
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_ctrl_c_while_a_thread_begins_to_read_ahead_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        ReadAhead(n for n in range(100))
    for left in set(threading.enumerate()) - before:
        left.join(10)
        assert not left.is_alive()


def test_shards_are_committed_together_and_told_of_in_order(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, together = ShardWriter.commit, threading.Barrier(COMMITS, timeout=60)
    committed = [threading.Event() for _ in range(COMMITS)]

    def waiting(self: ShardWriter, *arguments: object, **named: object) -> ShardCommit:
        shard = self.plan.shard
        if shard < COMMITS:
            together.wait()
        if shard + 1 < COMMITS:
            assert committed[shard + 1].wait(60)  # the last one first
        made: ShardCommit = commit(self, *arguments, **named)
        if shard < COMMITS:
            committed[shard].set()
        return made

    monkeypatch.setattr(ShardWriter, "commit", waiting)
    store, folder = Store.open(rollouts), tmp_path / "e"
    made = draft(store, brittle(tmp_path / "pvr"), folder, INLINE)
    shards = range(len(store.manifest.shards))
    with PendingStore.begin(folder, made.manifest):
        target = Target(made.request, folder, made.manifest, made_by(made.manifest), frozenset(shards))
        outcomes = list(ShardEmbedder(rollouts, [target]).each(shards))
    assert [(o.shard, o.failures) for o in outcomes] == [(shard, []) for shard in shards]


@pytest.mark.gpu
def test_a_gpu_gives_the_same_store_whatever_the_engine_and_measures_its_batch(
    rollouts: Path, tmp_path: Path
) -> None:
    request = EncoderRequest("resnet18", "random:0", device="cuda")
    inline, on_ray = (
        embed(rollouts, [(request, tmp_path / engine)], EmbedConfig(engine=engine))[0]
        for engine in ("inline", "ray")
    )
    assert inline.id == on_ray.id
    assert 1 <= inline.batch <= 256
    assert verify(tmp_path / "ray") == []


@pytest.mark.gpu
def test_a_compiled_encoder_computes_what_the_eager_one_does(rollouts: Path) -> None:
    frames = Store.open(rollouts).read_episode(0)["frame"][:8]
    eager, compiled = (
        Encoder(EncoderRequest("resnet18", "random:0", device="cuda", batch=8, compiled=c))
        for c in (False, True)
    )
    for _ in range(3):  # the third call replays the graph
        np.testing.assert_allclose(compiled(frames), eager(frames), rtol=1e-3, atol=1e-4)
    assert compiled.computation.compiled


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda rgb: rgb[..., :1], r"uint8 \[24, 24, 1\]"),
        (lambda rgb: rgb[..., [0, 1, 2, 2]], r"uint8 \[24, 24, 4\]"),
        (lambda rgb: (rgb / 255).astype(np.float32), r"float32 \[24, 24, 3\]"),
    ],
    ids=["grey", "alpha", "float"],
)
def test_frames_that_are_no_rgb_bytes_are_refused_with_the_reason(
    change: Callable[[np.ndarray], np.ndarray],
    what: str,
    write_rollouts: WriteStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = conftest.random_episode

    def episode(*numbers: int) -> Episode:
        made = usual(*numbers)
        return Episode(made.info, {**made.arrays, "frame": change(made.arrays["frame"])})

    monkeypatch.setattr(conftest, "random_episode", episode)
    request = EncoderRequest("resnet18", "random:0")
    with pytest.raises(EncodingError, match=rf"holds frames of {what}; encoders take uint8 RGB"):
        embed(write_rollouts((2,), size=24), [(request, tmp_path / "e")], INLINE)
    assert not (tmp_path / "e").exists()


def test_embedding_here_leaves_the_process_its_threads(write_rollouts: WriteStore, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    request = EncoderRequest("resnet18", "random:0", device="cpu")
    embed(write_rollouts(size=16), [(request, tmp_path / "e")], EmbedConfig(engine="inline"))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)

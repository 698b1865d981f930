"""The store: what is written is read back, mapped or decoded, and the same configuration gives the same bytes."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    EncodingError,
    InvalidValueError,
    NewerFormatError,
    NotAStoreError,
    OutputExistsError,
    PvrpipeError,
    StoreBusyError,
    StoreError,
    UnfinishedStoreError,
)
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.describing import describe
from pvrpipe.store.planning import plan_shards, split_of
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify
from pvrpipe.store.workspace import Workspace

from .conftest import WriteStore, draft, random_episode
from .killing import run_killed


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def same_bytes(a: Path, b: Path) -> bool:
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def test_every_column_of_every_episode_comes_back(write_rollouts: WriteStore) -> None:
    lengths = (30, 41, 25, 30, 33, 28)
    store = Store.open(write_rollouts(lengths))
    for number, length in enumerate(lengths):
        written, read = random_episode(number, length), store.read_episode(number)
        for name, array in written.arrays.items():
            np.testing.assert_array_equal(read[name], array, err_msg=name)
        assert read["is_first"].tolist() == [True] + [False] * length
        assert read["is_last"].tolist() == [False] * length + [True]
        assert read["is_terminal"][-1] == written.info.terminated
        assert not read["is_terminal"][:-1].any()
        assert read["step"].tolist() == list(range(length + 1))
        assert set(read["episode"]) == {number}


@pytest.mark.parametrize("shard_format", ["parquet"])
def test_mapped_columns_are_views_of_the_file_and_packed_ones_are_not(write_rollouts: WriteStore) -> None:
    shard = Store.open(write_rollouts()).shard(0)
    for name in ("action", "reward", "state", "physics", "episode"):
        mapped = shard.mapped(name)
        assert mapped is not None
        assert not mapped[0].flags.writeable
    assert shard.mapped("frame") is None
    assert shard.mapped("is_first") is None


@pytest.mark.parametrize("shard_format", ["parquet"])
@pytest.mark.parametrize(
    "rewrite",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"data_page_size": 64, "max_rows_per_page": 3},
        {"data_page_version": "2.0"},
        {"column_encoding": {"reward": "BYTE_STREAM_SPLIT"}, "use_dictionary": False},
    ],
    ids=str,
)
def test_a_rewritten_shard_is_not_mapped_but_still_read_right(
    write_rollouts: WriteStore, rewrite: dict
) -> None:
    store = Store.open(write_rollouts())
    before = store.read_episode(0)
    path = store.shard(0).path
    options = {"compression": "none", "use_dictionary": False, **rewrite}
    pq.write_table(pq.read_table(path), path, **options)
    rewritten = store.manifest.shards[0].model_copy(update={"bytes": path.stat().st_size})
    manifest = store.manifest.model_copy(update={"shards": (rewritten, *store.manifest.shards[1:])})
    after = Store(store.path, manifest, store.episodes)
    assert after.shard(0).mapped("reward") is None
    for name, array in after.read_episode(0).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize("shard_format", ["parquet"])
def test_row_groups_are_crossed_without_a_seam(
    write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store.open(write_rollouts((50, 40), shard_rows=1000))
    monkeypatch.setattr("pvrpipe.store.parquet.PACKED_GROUP_BYTES", 3000)  # about a dozen rows
    cut = Store.open(write_rollouts((50, 40), name="cut", shard_rows=1000))
    assert len(cut.manifest.shards[0].row_groups) > 5
    assert verify(cut.path) == []
    for episode in range(2):
        for name, array in whole.read_episode(episode).items():
            np.testing.assert_array_equal(cut.read_episode(episode)[name], array, err_msg=name)


def test_same_configuration_same_bytes_however_rows_were_handed_over(
    tmp_path: Path, write_rollouts: WriteStore, shard_format: Any
) -> None:
    reference = write_rollouts()
    episodes = [random_episode(i, length) for i, length in enumerate((30, 41, 25, 30, 33, 28))]
    manifest = draft(episodes, shard_format=shard_format)
    source = Store.open(reference)
    with PendingStore.begin(tmp_path / "again", manifest) as pending:
        for plan in reversed(pending.todo):
            with ShardWriter(pending.folder, manifest, plan, source.records(plan.shard)) as writer:
                for batch in source.shard(plan.shard).batches(source.columns, 7):
                    writer.write_rows(batch)
                writer.commit()
        sealed = pending.seal()
    assert sealed.id == source.manifest.id
    assert all(
        filecmp.cmp(reference / s.file, tmp_path / "again" / s.file, shallow=False) for s in sealed.shards
    )


def test_statistics_are_those_of_the_training_rows(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    train = store.episodes.filter(store.episodes["split"] == "train")["episode"]
    actions = np.concatenate([store.read_episode(e, ["action"])["action"][:-1] for e in train]).astype(
        np.float64
    )
    statistics = store.manifest.statistics["action"]
    assert statistics.count == len(actions)
    np.testing.assert_allclose(statistics.mean, actions.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, actions.std(axis=0), rtol=1e-12)


def test_a_fifth_of_the_episodes_is_held_out_and_never_by_window() -> None:
    splits = [split_of(e, 100) for e in range(100)]
    assert splits.count("val") == 20
    assert all(splits[i : i + 5].count("val") == 1 for i in range(0, 100, 5))
    assert [split_of(e, 100) for e in range(5)] == [split_of(e, 1000) for e in range(5)]
    assert split_of(0, 1) == "train"


@pytest.mark.parametrize(("episodes", "rows"), [(1, 2), (10, 501), (64, 501), (1000, 501), (5000, 1001)])
def test_plan_deals_every_episode_once_and_in_order(episodes: int, rows: int) -> None:
    plan = plan_shards(episodes, rows)
    dealt = [e for p in plan for e in range(p.first_episode, p.first_episode + p.episodes)]
    assert dealt == list(range(episodes))
    assert len(plan) == min(episodes, max(64, -(-episodes * rows // 16_384)))


def test_another_configuration_is_refused_and_nothing_is_lost(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    folder = write_rollouts(seed=0)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(OutputExistsError, match=r"seed: 0, now 1.*--overwrite"):
        write_rollouts(seed=1)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_overwrite_replaces_all_of_it(tmp_path: Path, write_rollouts: WriteStore, shard_format: Any) -> None:
    folder = write_rollouts(seed=0)
    episodes = [random_episode(i, 20, seed=1) for i in range(3)]
    with PendingStore.begin(
        folder, draft(episodes, seed=1, shard_format=shard_format), overwrite=True
    ) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, pending.manifest, plan) as writer:
                writer.write_episode(episodes[plan.first_episode])
                writer.commit()
        pending.seal()
    assert verify(folder) == []
    assert len(list((folder / "shards").iterdir())) == 6


def test_a_lost_shard_of_a_sealed_store_is_made_again(tmp_path: Path, shard_format: str) -> None:
    write_three(tmp_path / "whole", shard_format)
    write_three(tmp_path / "lost", shard_format)
    next((tmp_path / "lost" / "shards").glob("00001.[pt]a*")).unlink()
    assert [f.what for f in verify(tmp_path / "lost")] == ["is missing"]
    write_three(tmp_path / "lost", shard_format)
    assert same_bytes(tmp_path / "whole", tmp_path / "lost")


@pytest.mark.parametrize(
    ("output", "message"),
    [("file/s", "a file is in the way"), ("file", "a file of that name"), ("s3://bucket/s", "pvrpipe push")],
)
def test_an_output_that_cannot_be_a_folder(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "file").touch()
    folder = Path(output) if ":" in output else tmp_path / output
    with pytest.raises(PvrpipeError, match=message):
        PendingStore.begin(folder, draft([random_episode(0, 5)]))


def test_a_folder_of_strangers_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match="is not empty and holds no store"):
        PendingStore.begin(tmp_path / "mine", draft([random_episode(0, 5)]), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_two_writers_at_once(tmp_path: Path) -> None:
    manifest = draft([random_episode(0, 5)])
    with PendingStore.begin(tmp_path / "s", manifest), pytest.raises(StoreBusyError, match="another process"):
        PendingStore.begin(tmp_path / "s", manifest)


def test_half_written_newer_and_missing_stores_are_told_apart(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    with PendingStore.begin(tmp_path / "half", draft([random_episode(0, 5)])):
        pass
    with pytest.raises(UnfinishedStoreError, match="pvrpipe collect"):
        Store.open(tmp_path / "half")
    folder = write_rollouts()
    with pytest.raises(NotAStoreError, match="embed it first"):
        Store.open(folder, kind="embeddings")
    with pytest.raises(NotAStoreError, match="holds no store"):
        Store.open(tmp_path)
    manifest = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**manifest, "format_version": 2, "news": True}))
    with pytest.raises(NewerFormatError, match="upgrade pvrpipe"):
        Store.open(folder)
    (folder / "store.json").write_text(json.dumps({**manifest, "rows": -1}))
    with pytest.raises(CorruptStoreError, match="rows"):
        Store.open(folder)


def test_writer_refuses_what_the_columns_do_not_say(tmp_path: Path, shard_format: Any) -> None:
    manifest = draft([random_episode(0, 5)], shard_format=shard_format)
    rows = dict(random_episode(0, 5).arrays)
    bounds = {
        "episode": np.zeros(6, np.int32),
        "step": np.arange(6, dtype=np.int32),
        **{f: np.zeros(6, bool) for f in ("is_first", "is_last", "is_terminal")},
    }
    with PendingStore.begin(tmp_path / "s", manifest) as pending:
        for changed, error, message in (
            ({"frame": rows["frame"].astype(np.float32)}, InvalidValueError, "holds uint8"),
            ({"reward": np.array([0, 1, np.nan, 1, 1, 1], np.float32)}, EncodingError, "episode 0, step 2"),
            ({"stray": rows["reward"]}, InvalidValueError, "stray"),
        ):
            with (
                ShardWriter(pending.folder, manifest, pending.todo[0]) as writer,
                pytest.raises(error, match=message),
            ):
                writer.write_rows({**rows, **bounds, **changed})
        assert list((tmp_path / "s" / "shards").iterdir()) == []


def write_three(folder: Path, shard_format: Any) -> None:
    episodes = [random_episode(i, 20) for i in range(3)]
    manifest = draft(episodes, shard_format=shard_format)
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                writer.write_episode(episodes[plan.first_episode])
                writer.commit()
        pending.seal()


def test_killed_at_every_write_fsync_and_rename_it_ends_with_the_same_bytes(
    tmp_path: Path, shard_format: str
) -> None:
    write_three(tmp_path / "whole", shard_format)
    for stop in itertools.count(1):
        folder = tmp_path / f"killed-{stop}"
        killed = run_killed(write_three, folder, shard_format, stop=stop)
        if killed:
            run_killed(write_three, folder, shard_format)
        assert same_bytes(tmp_path / "whole", folder), stop
        if not killed:
            break
    assert stop > 30


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_disk_full_on_a_real_file_system(tmp_path: Path, shard_format: Any) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted in this sandbox")
    try:
        episode = random_episode(0, 200)
        manifest = draft([episode], shard_format=shard_format)
        with (  # noqa: PT012
            PendingStore.begin(small / "s", manifest) as pending,
            pytest.raises(StoreError, match="disk is full"),
            ShardWriter(pending.folder, manifest, pending.todo[0]) as writer,
        ):
            writer.write_episode(episode)
            writer.commit()  # whichever of the two meets it
        assert list((small / "s" / "shards").iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_verify_names_what_fails(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    assert verify(folder) == []
    shard = folder / Store.open(folder).manifest.shards[2].file
    good = shard.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(25):
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        shard.write_bytes(bad)
        assert [f.where for f in verify(folder)] == [f"shards/{shard.name}"]
    shard.write_bytes(good[:-10])
    assert "bytes" in verify(folder)[0].what
    shard.unlink()
    assert verify(folder)[0].what == "is missing"
    shard.write_bytes(good)
    (folder / "shards" / "00001.json").write_text("{}")
    assert [f.where for f in verify(folder)] == ["shards/00001.json"]


def test_verify_sees_a_store_whose_hashes_hold_but_whose_rows_are_shifted(
    tmp_path: Path, write_rollouts: WriteStore
) -> None:
    good = Store.open(write_rollouts((20, 20, 20)))
    fresh = good.manifest.model_copy(update={"state": "writing", "id": None, "shards": (), "statistics": {}})
    with PendingStore.begin(tmp_path / "s", fresh) as pending:
        for plan in pending.todo:
            rows = good.read_episode(plan.first_episode)
            shifted = {name: np.roll(rows[name], -1) for name in ("reward", "is_first")}
            with ShardWriter(pending.folder, fresh, plan, good.records(plan.shard)) as writer:
                writer.write_rows({**rows, **shifted})
                writer.commit()
        pending.seal()
    found = {failure.where.split(":")[-1] for failure in verify(tmp_path / "s")}
    assert {"reward", "is_first"} <= found


def test_a_sample_reads_its_own_shards_only(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    shards = [folder / entry.file for entry in Store.open(folder).manifest.shards]
    bad = bytearray(shards[1].read_bytes())
    bad[5000] ^= 1
    shards[1].write_bytes(bad)
    assert verify(folder, sample=2) == []  # the first and the last
    assert [f.where for f in verify(folder, sample=6)] == [f"shards/{shards[1].name}"]
    shards[1].unlink()
    assert [f.what for f in verify(folder, sample=2)] == ["is missing"]


def test_describe_counts_returns_by_policy_and_split(write_rollouts: WriteStore) -> None:
    found = describe(Store.open(write_rollouts()))
    assert found["episodes"] == sum(row["episodes"] for row in found["returns"]) == 6
    assert {row["split"] for row in found["returns"]} == {"train", "val"}
    assert found["mapped"]["state"] is True


def test_workspace_takes_the_newest_finished_store(tmp_path: Path, write_rollouts: WriteStore) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(NotAStoreError, match="pvrpipe collect"):
        workspace.newest_rollouts()
    first = write_rollouts((20, 20), name="rollouts/first")
    second = write_rollouts((21, 20), name="rollouts/second")
    os.utime(first / "store.json", (1, 1))
    assert workspace.newest_rollouts() == second
    with PendingStore.begin(tmp_path / "rollouts" / "half", draft([random_episode(0, 5)])):
        pass
    assert workspace.newest_rollouts() == second
    assert (
        workspace.embeddings("dmc:ball_in_cup-catch", "vc1")
        == tmp_path / "embeddings/dmc-ball_in_cup-catch/vc1"
    )

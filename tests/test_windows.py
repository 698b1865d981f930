"""Windows: the right rows, drawn reproducibly, whichever way they are read."""

from __future__ import annotations

import itertools
import json
import resource
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

from .conftest import WriteStore

COLUMNS = ("frame", "action", "reward", "physics", "is_first", "is_last", "is_terminal", "episode", "step")


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("group_bytes", [1 << 24, 3000], ids=["one row group", "many row groups"])
@pytest.mark.parametrize(
    ("narrow", "large"),
    [(64, 1 << 25), (0, 1 << 25), (0, 1)],
    ids=["narrow columns resident", "all mapped", "all mapped, into memory used before"],
)
def test_windows_are_the_rows_of_one_episode(
    write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch, group_bytes: int, narrow: int, large: int
) -> None:
    monkeypatch.setattr("pvrpipe.store.parquet.PACKED_GROUP_BYTES", group_bytes)
    monkeypatch.setattr("pvrpipe.store.gathering.NARROW", narrow)
    monkeypatch.setattr("pvrpipe.store.gathering.LARGE", large)
    store = Store.open(write_rollouts((30, 41, 25, 30, 33, 28), shard_rows=60))
    episodes = {e: store.read_episode(e) for e in range(6)}
    sampler = WindowSampler(store, COLUMNS, batch=8, length=20, seed=3)
    for k in range(6):
        batch = sampler.batch(k)
        for window in range(8):
            episode, first = int(batch["episode"][window, 0]), int(batch["step"][window, 0])
            assert store.episodes["split"][episode] == "train"
            for name in COLUMNS:
                np.testing.assert_array_equal(
                    batch[name][window], episodes[episode][name][first : first + 20], err_msg=name
                )


def test_memory_of_a_large_batch_is_used_again_only_once_nobody_holds_it(
    write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvrpipe.store.gathering.LARGE", 1)
    windows = WindowSampler(Store.open(write_rollouts()), ["frame"], batch=4, length=10, seed=1)
    held = [windows.batch(k)["frame"] for k in range(8)]  # more than are kept
    copies = [batch.copy() for batch in held]
    part = windows.batch(8)["frame"][2, 3:5]  # a view holds its batch
    copy = part.copy()
    seen = {windows.batch(k)["frame"].ctypes.data for k in range(9, 20)}
    assert len(seen) == 1
    assert all(np.array_equal(batch, was) for batch, was in zip(held, copies, strict=True))
    np.testing.assert_array_equal(part, copy)


def test_a_batch_is_a_function_of_the_seed_and_its_number(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    one, two = (WindowSampler(store, ["state"], batch=4, length=10, seed=1) for _ in range(2))
    forwards = [one.batch(k)["state"] for k in range(130)]
    for k in (129, 0, 64, 63):
        np.testing.assert_array_equal(two.batch(k)["state"], forwards[k])
    other = WindowSampler(store, ["state"], batch=4, length=10, seed=2)
    assert not np.array_equal(other.batch(0)["state"], forwards[0])


def test_every_window_is_equally_likely(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts((11, 15, 30)))
    sampler = WindowSampler(store, [], batch=64, length=10, seed=0)
    rows = store.episodes.filter(store.episodes["split"] == "train")["rows"].to_list()
    assert sampler.windows == sum(r - 9 for r in rows)
    starts, counts = np.unique(
        np.concatenate([sampler.starts(sampler.numbers(k)) for k in range(400)]), return_counts=True
    )
    assert len(starts) == sampler.windows
    assert starts.max() < sum(rows)
    expected = 400 * 64 / sampler.windows
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_splits_never_share_an_episode(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    seen = {
        split: set(
            np.concatenate(
                [
                    WindowSampler(store, ["episode"], batch=16, length=5, seed=0, split=split).batch(k)[
                        "episode"
                    ]
                    for k in range(20)
                ]
            ).ravel()
        )
        for split in ("train", "val")
    }
    assert seen["train"] & seen["val"] == set()
    assert seen["train"] | seen["val"] == set(range(6))


def test_columns_that_are_not_named_are_not_read(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    sampler = WindowSampler(store, ["action", "is_first"], batch=2, length=5, seed=0)
    assert set(sampler.batch(0)) == {"action", "is_first"}
    assert set(store.shard(0)._mapped) <= {"action"}


def test_a_store_has_more_shards_than_a_process_may_open_files(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts((4,) * 80, shard_rows=5))
    sampler = WindowSampler(store, ["frame", "physics"], batch=64, length=3, seed=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        for k in range(20):
            sampler.batch(k)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_long_a_window_says_how_long_episodes_are(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts((10, 12)))
    with pytest.raises(InvalidValueError, match=r"longest has 1[13].*smaller --length"):
        WindowSampler(store, ["action"], batch=2, length=50, seed=0)
    with pytest.raises(InvalidValueError, match="at least 1"):
        WindowSampler(store, ["action"], batch=0, length=5, seed=0)


def test_joined_windows_run_on_into_the_next_chosen_episode(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts((3, 5, 2, 4, 30, 6)))
    sampler = WindowSampler(store, COLUMNS, batch=16, length=20, seed=3, where="rows < 10", joined=True)
    chosen = store.episodes.filter((store.episodes["rows"] < 10) & (store.episodes["split"] == "train"))
    episodes = [store.read_episode(e) for e in chosen["episode"]]
    stream = {name: np.concatenate([e[name] for e in episodes]) for name in COLUMNS}
    total = len(stream["step"])
    with pytest.raises(InvalidValueError, match="longest has 7"):
        WindowSampler(store, COLUMNS, batch=16, length=total + 1, seed=3, where="rows < 10", joined=True)
    sampler = WindowSampler(store, COLUMNS, batch=16, length=12, seed=3, where="rows < 10", joined=True)
    assert sampler.windows == total - 11
    seen = set()
    for k in range(20):
        starts, batch = sampler.starts(sampler.numbers(k)), sampler.batch(k)
        seen |= set(starts.tolist())
        for window, start in enumerate(starts):
            for name in COLUMNS:
                expected = stream[name][start : start + 12]
                np.testing.assert_array_equal(batch[name][window], expected, err_msg=name)
        assert (batch["is_first"].sum(axis=1) >= 1).all()
    assert seen == set(range(sampler.windows))


@pytest.mark.parametrize(
    "where", ["policy = 'random' and episode in (1, 3)", pl.col("episode").is_in([1, 3]) & pl.lit(value=True)]
)
def test_a_condition_chooses_episodes(write_rollouts: WriteStore, where: pl.Expr | str) -> None:
    store = Store.open(write_rollouts())
    sampler = WindowSampler(store, ["episode"], batch=32, length=5, seed=0, split=None, where=where)
    assert set(np.unique(sampler.batch(0)["episode"])) == {1, 3}
    for bad, message in (("nothing > 1", "it has episode"), ("rows + 1", "true or false"), ("rows >", "fit")):
        with pytest.raises(InvalidValueError, match=message):
            WindowSampler(store, [], batch=2, length=5, seed=0, where=bad)
    with pytest.raises(InvalidValueError, match="choose other episodes"):
        WindowSampler(store, [], batch=2, length=5, seed=0, where="rows > 1000")


@pytest.mark.parametrize("joined", [False, True])
def test_weights_say_how_often_an_episode_is_drawn(write_rollouts: WriteStore, joined: bool) -> None:
    store = Store.open(write_rollouts((20, 20, 20, 20, 20, 20)))
    options = {"batch": 100, "length": 10, "seed": 0, "split": None, "joined": joined}
    sampler = WindowSampler(store, ["episode"], weight="episode * 1.0", **options)
    first = np.concatenate([sampler.batch(k)["episode"][:, 0] for k in range(60)])
    counts = np.bincount(first, minlength=6)
    begin = np.array([21] * 5 + [12]) if joined else np.full(6, 12)
    expected = np.arange(6) * begin / (np.arange(6) * begin).sum() * len(first)
    assert counts[0] == 0
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    for bad in ("0 * rows", "-rows", "policy"):
        with pytest.raises(InvalidValueError, match="weight"):
            WindowSampler(store, ["episode"], weight=bad, **options)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_each_batch_and_their_union_does_not_depend_on_their_number(
    write_rollouts: WriteStore, ranks: int
) -> None:
    store = Store.open(write_rollouts())
    whole = WindowSampler(store, ["state"], batch=8, length=10, seed=1)
    parts = [
        WindowSampler(store, ["state"], batch=8, length=10, seed=1, rank=r, ranks=ranks) for r in range(ranks)
    ]
    for k in (0, 70):
        shares = np.concatenate([part.batch(k)["state"] for part in parts])
        np.testing.assert_array_equal(shares, whole.batch(k)["state"])
    with pytest.raises(InvalidValueError, match="ranks divides"):
        WindowSampler(store, ["state"], batch=8, length=10, seed=1, rank=0, ranks=3)


def test_the_state_goes_on_with_the_very_next_batch(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())
    sampler, again = (WindowSampler(store, ["state"], batch=4, length=10, seed=1) for _ in range(2))
    drawn = [batch["state"] for batch in itertools.islice(sampler, 70)]
    state = json.loads(json.dumps(sampler.state()))
    again.restore(state)
    np.testing.assert_array_equal(next(iter(again))["state"], next(iter(sampler))["state"])
    again.restore({**state, "taken": 3})
    np.testing.assert_array_equal(next(iter(again))["state"], drawn[3])
    other = WindowSampler(store, ["state"], batch=4, length=10, seed=2)
    with pytest.raises(InvalidValueError, match="another plan"):
        other.restore(state)


def test_the_state_of_a_plan_with_expressions_is_that_of_an_equal_plan(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts())

    def drawing(least: int) -> WindowSampler:
        where, weight = pl.col("episode") >= least, pl.col("length") * 2
        return WindowSampler(store, ["state"], batch=4, length=10, seed=1, where=where, weight=weight)

    state = json.loads(json.dumps({**drawing(1).state(), "taken": 5}))
    again = drawing(1)
    again.restore(state)
    np.testing.assert_array_equal(next(iter(again))["state"], drawing(1).batch(5)["state"])
    with pytest.raises(InvalidValueError, match="another plan"):
        drawing(2).restore(state)


@pytest.mark.parametrize("taken", [None, "5", -1])
def test_a_state_that_is_none_is_refused(taken: object, write_rollouts: WriteStore) -> None:
    sampler = WindowSampler(Store.open(write_rollouts()), ["state"], batch=4, length=10, seed=1)
    with pytest.raises(InvalidValueError, match=r"restore what state\(\) gave"):
        sampler.restore({**sampler.state(), "taken": taken})


@pytest.mark.parametrize(
    ("asked", "says"), [({"rank": 2, "ranks": 2}, "no rank 2 of 2"), ({"seed": -1}, "seed is -1")]
)
def test_windows_that_nobody_can_draw(asked: dict[str, int], says: str, write_rollouts: WriteStore) -> None:
    with pytest.raises(InvalidValueError, match=says):
        WindowSampler(
            Store.open(write_rollouts()), ["state"], **{"batch": 4, "length": 10, "seed": 1, **asked}
        )


def test_memory_gives_what_the_files_give_and_says_so(write_rollouts: WriteStore, shard_format: str) -> None:
    store = Store.open(write_rollouts())
    options = {"batch": 4, "length": 10, "seed": 1, "joined": True}
    said = {}
    for backing in ("auto", "mapped", "ram"):
        sampler = WindowSampler(store, COLUMNS, backing=backing, **options)
        said[backing] = sampler.backing
        expected = WindowSampler(store, COLUMNS, backing="mapped", **options).batch(5)
        for name, array in sampler.batch(5).items():
            np.testing.assert_array_equal(array, expected[name])
    frames = shard_format == "parquet"
    assert said["auto"] == "mapped files" + (", frame in memory" if frames else "")
    assert said["mapped"] == "mapped files" + (", frame decoded when read" if frames else "")
    assert said["ram"] == "in memory"
    with pytest.raises(UnknownNameError, match="nearest: mapped"):
        WindowSampler(store, COLUMNS, backing="maped", **options)


@pytest.mark.parametrize("joined", [False, True])
def test_both_formats_give_the_same_windows_bit_for_bit(write_rollouts: WriteStore, joined: bool) -> None:
    batches = []
    for shard_format in ("parquet", "webdataset"):
        store = Store.open(write_rollouts(name=shard_format, shard_format=shard_format))
        sampler = WindowSampler(store, store.columns, batch=8, length=20, seed=3, joined=joined)
        batches.append([sampler.batch(k) for k in range(5)])
    for one, other in zip(*batches, strict=True):
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), name

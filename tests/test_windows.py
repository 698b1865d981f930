"""Windows: the right rows, drawn reproducibly, whichever way they are read."""

from __future__ import annotations

import numpy as np
import pytest

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.store.reading import Store
from pvrpipe.store.windows import WindowSampler

from .conftest import WriteStore

COLUMNS = ("frame", "action", "reward", "physics", "is_first", "is_last", "is_terminal", "episode", "step")


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("group_bytes", [1 << 24, 3000], ids=["one row group", "many row groups"])
@pytest.mark.parametrize("narrow", [64, 0], ids=["narrow columns resident", "all mapped"])
def test_windows_are_the_rows_of_one_episode(
    write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch, group_bytes: int, narrow: int
) -> None:
    monkeypatch.setattr("pvrpipe.store.parquet.PACKED_GROUP_BYTES", group_bytes)
    monkeypatch.setattr("pvrpipe.store.windows.NARROW", narrow)
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
    starts, counts = np.unique(np.concatenate([sampler.starts(k) for k in range(400)]), return_counts=True)
    assert len(starts) == sampler.windows
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


def test_too_long_a_window_says_how_long_episodes_are(write_rollouts: WriteStore) -> None:
    store = Store.open(write_rollouts((10, 12)))
    with pytest.raises(InvalidValueError, match=r"longest has 1[13].*smaller --length"):
        WindowSampler(store, ["action"], batch=2, length=50, seed=0)
    with pytest.raises(InvalidValueError, match="at least 1"):
        WindowSampler(store, ["action"], batch=0, length=5, seed=0)

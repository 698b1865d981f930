"""The cache of what lies behind URLs: bounded, named when it cannot be, empty of what killed processes left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pvrpipe.pipeline.cached import download_target
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import (
    InvalidValueError,
    StoreError,
)
from pvrpipe.store.cache import Cache, cache_folder
from pvrpipe.store.layout import read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .serving import Served, copy_to

pytestmark = pytest.mark.usefixtures("cache")


def test_a_bounded_cache_evicts_and_what_is_open_stays_readable(
    write_rollouts: WriteStore, web: Served, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = write_rollouts()
    limit = 2.5 * Store.open(folder).manifest.bytes / 6 + 20_000
    monkeypatch.setenv("PVRPIPE_CACHE_GB", str(limit / 1e9))
    local, remote = Store.open(folder), Store.open(f"{web.url}/rollouts")
    for _ in range(2):
        for episode in range(6):
            for name, array in remote.read_episode(episode).items():
                np.testing.assert_array_equal(array, local.read_episode(episode)[name])
            held = [p for p in cache.rglob("*") if p.is_file()]
            assert sum(p.stat().st_size for p in held) <= limit
    assert 1 <= len(list(cache.glob("stores/*/shards/*.parquet"))) < 6


def test_eviction_takes_what_was_used_longest_ago_and_nothing_that_is_held(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 250)
    shards = [cache.folder / "store" / "shards" / f"{i:05d}.parquet" for i in range(3)]
    shards[0].parent.mkdir(parents=True)
    for age, path in enumerate(shards):
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + age, 1000 + age))
    with cache.holding(shards[0]):
        cache.make_room(0)
    assert [p.exists() for p in shards] == [True, False, True]
    os.utime(shards[0])
    cache.make_room(100)
    assert [p.exists() for p in shards] == [True, False, False]


def test_a_size_that_a_manifest_only_claims_evicts_nothing(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    copy_to(folder, "memory://huge")
    manifest = read_manifest(folder)
    huge = manifest.shards[1].model_copy(update={"bytes": 1 << 52})
    manifest = manifest.model_copy(update={"shards": (manifest.shards[0], huge, *manifest.shards[2:])})
    fsspec.filesystem("memory").pipe_file("/huge/store.json", manifest.to_json().encode())
    store = Store.open("memory://huge")
    store.shard(0)
    with pytest.raises(StoreError, match="PVRPIPE_CACHE_GB"):
        store.shard(1)
    store._opened.cache_clear()
    fsspec.filesystem("memory").rm_file("/huge/shards/00000.parquet")
    assert store.shard(0)


@pytest.mark.parametrize("size", ["-1", "much", "nan"])
def test_a_size_of_the_cache_that_is_none(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVRPIPE_CACHE_GB", size)
    with pytest.raises(InvalidValueError, match="PVRPIPE_CACHE_GB"):
        Cache.from_environment()


@pytest.mark.parametrize("use", [Store.open, verify])
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/pvrpipe", "~nobody-of-that-name/x"])
def test_a_cache_that_cannot_be_is_named(
    use: Any, where: str, tmp_path: Path, write_rollouts: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_to(write_rollouts(), "memory://cached")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PVRPIPE_CACHE", where if where[0] in "/~" else str(tmp_path / where))
    with pytest.raises((StoreError, InvalidValueError), match="PVRPIPE_CACHE"):
        use("memory://cached")


def test_a_disk_that_fills_while_a_shard_is_fetched(
    write_rollouts: WriteStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_to(write_rollouts(), "memory://cached")
    store = Store.open("memory://cached")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as then:
        then.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"disk is full.*PVRPIPE_CACHE"):
            store.shard(0)
    assert list(cache.glob("stores/*/shards/*")) == []
    assert store.shard(0)


VERIFY = """
import os, signal, sys
from pvrpipe.store.verifying import verify
verify(sys.argv[1], lambda done, total, note="": done == 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_verify_that_was_killed_leaves_nothing_once_another_has_run(
    write_rollouts: WriteStore, web: Served, cache: Path
) -> None:
    write_rollouts()
    url = f"{web.url}/rollouts"
    killed = subprocess.run([sys.executable, "-c", VERIFY, url], check=False)
    assert killed.returncode == -9
    (left,) = cache.glob("stores/verify-*")
    assert list(left.glob("*/shards/*.parquet"))
    with Cache(cache / "stores", 10**9).empty() as own:
        assert own.folder != left
        assert list(cache.glob("stores/verify-*")) == [own.folder]
        assert verify(url) == []  # one that is in use stays
        assert list(cache.glob("stores/verify-*")) == [own.folder]
    assert list(cache.glob("stores/verify-*")) == []


def test_one_variable_says_where_stores_and_weights_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PVRPIPE_CACHE", "~/kept")
    assert Cache.from_environment().folder == tmp_path / "kept" / "stores"
    weights = download_target(PVRS["vip"])
    assert (weights.parents[1], weights.name) == (tmp_path / "kept" / "weights", "model.pt")
    monkeypatch.setenv("PVRPIPE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pvrpipe"

"""Stores on a Hub, by huggingface_hub's own client over HTTP on loopback (:mod:`tests.hub`; without Xet)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pvrpipe.schemas.errors import (
    CorruptStoreError,
    InvalidValueError,
    NotAStoreError,
    OutputExistsError,
    UnreachableError,
)
from pvrpipe.store import hub as pushing
from pvrpipe.store.layout import read_manifest
from pvrpipe.store.reading import Store
from pvrpipe.store.sharing import pull, push
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .hub import Hub
from .serving import drawn
from .test_store import same_bytes
from .test_store_growing import grow

URL = "hf://datasets/lab/walk"


def equal(one: Store, other: Store) -> None:
    for mine, theirs in zip(drawn(one), drawn(other), strict=True):
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("shard_format", ["parquet", "webdataset"])
def test_a_store_goes_to_the_hub_and_back(write_rollouts: WriteStore, tmp_path: Path, hub: Hub) -> None:
    folder = write_rollouts()
    first = push(folder, URL)
    _, tree = hub.tree("lab/walk")
    assert {name: (folder / name).read_bytes() for name in tree} == tree
    assert (first.files, first.resumed) == (len(tree), 0)
    again = push(folder, URL)
    assert (again.files, again.resumed, again.bytes) == (first.files, first.files, 0)
    pulled = pull(URL, tmp_path / "pulled")
    assert (pulled.id, pulled.files) == (read_manifest(folder).id, first.files)
    assert same_bytes(folder, tmp_path / "pulled")
    assert verify(URL) == []
    equal(Store.open(URL), Store.open(folder))


def test_stores_in_folders_of_one_data_set(write_rollouts: WriteStore, tmp_path: Path, hub: Hub) -> None:
    one, other = write_rollouts(name="one"), write_rollouts((20, 21), name="other", seed=5)
    push(one, f"{URL}/id")
    push(other, f"{URL}/ood")
    for folder, url in ((one, f"{URL}/id"), (other, f"{URL}/ood")):
        pull(url, tmp_path / "pulled" / folder.name)
        assert same_bytes(folder, tmp_path / "pulled" / folder.name)
    with pytest.raises(OutputExistsError, match="holds other stores"):
        push(one, URL)
    with pytest.raises(OutputExistsError, match="lies in another store"):
        push(one, f"{URL}/id/sub")


def test_a_push_that_was_stopped_goes_on(
    write_rollouts: WriteStore, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files go in commits of a few, ``store.json`` in the last: until then there is no store."""
    folder = write_rollouts()
    monkeypatch.setattr(pushing, "BATCH", 4)
    hub.last_commit = 3
    with pytest.raises(UnreachableError, match="run it again"):
        push(folder, URL)
    with pytest.raises(NotAStoreError):
        Store.open(URL)
    hub.last_commit, sent = 100, len(hub.uploads)
    second = push(folder, URL)
    assert second.resumed == 12
    assert len(hub.uploads) == len(set(hub.uploads)) >= sent  # no object twice
    pull(URL, tmp_path / "pulled")
    assert same_bytes(folder, tmp_path / "pulled")


def test_what_changed_on_the_hub_is_found_refused_and_mended(
    write_rollouts: WriteStore, tmp_path: Path, hub: Hub
) -> None:
    folder = write_rollouts()
    push(folder, URL)
    _, tree = hub.tree("lab/walk")
    spoiled = bytearray(tree["shards/00003.parquet"])
    spoiled[len(spoiled) // 2] ^= 1
    hub.repos["lab/walk"].append(("f" * 40, {**tree, "shards/00003.parquet": bytes(spoiled)}))
    assert [failure.where for failure in verify(URL)] == ["shards/00003.parquet"]
    with pytest.raises(CorruptStoreError, match=r"shards/00003\.parquet"):
        pull(URL, tmp_path / "pulled")
    push(folder, URL, overwrite=True)
    assert verify(URL) == []
    pull(URL, tmp_path / "pulled")
    assert same_bytes(folder, tmp_path / "pulled")


def test_another_store_is_replaced_only_when_told_and_leaves_nothing(
    write_rollouts: WriteStore, tmp_path: Path, hub: Hub
) -> None:
    one, other = write_rollouts(name="one"), write_rollouts((20, 21), name="other", seed=5)
    push(one, URL)
    with pytest.raises(OutputExistsError, match=r"--overwrite"):
        push(other, URL)
    push(other, URL, overwrite=True)
    _, tree = hub.tree("lab/walk")
    assert set(tree) == {str(p.relative_to(other)) for p in other.rglob("*") if p.is_file()}
    assert verify(URL) == []


def test_a_grown_store_and_a_reader_of_a_commit(write_rollouts: WriteStore, hub: Hub) -> None:
    folder = write_rollouts()
    first = push(folder, URL)
    commit, _ = hub.tree("lab/walk")
    identity = read_manifest(folder).id
    grow(folder, (30, 20))
    assert push(folder, URL).resumed == first.files - 2
    assert Store.open(URL).manifest.revision == 2
    pinned = Store.open(f"hf://datasets/lab/walk@{commit}")
    assert pinned.manifest.id == identity
    equal(pinned, Store.open(folder, revision=1))
    equal(Store.open(URL, revision=1), pinned)


def test_what_cannot_be_pushed_there(
    write_rollouts: WriteStore, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_rollouts()
    with pytest.raises(InvalidValueError, match="write hf://datasets/OWNER/NAME"):
        push(folder, "hf://lab/walk")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    with pytest.raises(UnreachableError, match="credentials"):
        push(folder, URL)

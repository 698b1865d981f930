"""A sealed store grows by revisions: what was there never changes, and a reader pinned to it sees it for ever."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvrpipe.schemas.errors import InvalidValueError, OutputExistsError
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.files import sha256_of
from pvrpipe.store.growing import grown
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify
from pvrpipe.store.windows import WindowSampler

from .conftest import WriteStore, random_episode, rollout_specification
from .killing import run_killed


@pytest.fixture(params=["parquet", "webdataset"])
def shard_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def grow(folder: Path, lengths: Sequence[int], seed: int = 5, **changes: Any) -> PendingStore:
    """Append random episodes as the next revision."""
    sealed = Store.open(folder).manifest
    made = rollout_specification(len(lengths), max(lengths), seed).model_copy(update=changes)
    draft = grown(sealed, made, plan_shards(len(lengths), max(lengths) + 1, behind=sealed.plan))
    with PendingStore.begin(folder, draft) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, pending.manifest, plan) as writer:
                for episode in range(plan.first_episode, plan.first_episode + plan.episodes):
                    writer.write_episode(random_episode(episode, lengths[episode - sealed.episodes], seed))
                writer.commit()
        pending.seal()
    return pending


def windows(store: Store) -> list[dict[str, np.ndarray]]:
    sampler = WindowSampler(store, ["frame", "action", "is_first"], batch=4, length=9, seed=1)
    return [sampler.batch(k) for k in range(5)]


def test_a_pinned_reader_sees_the_same_bytes_for_ever(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    before = Store.open(folder)
    seen, table = windows(before), before.episodes
    hashes = {
        p: sha256_of(p)
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("store.json", "README.md")
    }

    grow(folder, (22, 19, 31))
    grow(folder, (12,), seed=6)
    newest = Store.open(folder)
    assert (newest.manifest.revision, newest.manifest.episodes) == (3, 10)
    assert newest.read_episode(9)["step"].tolist() == list(range(13))
    assert {p: sha256_of(p) for p in hashes} == hashes
    assert [r.id for r in newest.manifest.earlier] == [
        before.manifest.id,
        Store.open(folder, revision=2).manifest.id,
    ]

    pinned = Store.open(folder, revision=1)
    assert pinned.manifest == before.manifest
    assert pinned.episodes.equals(table)
    for one, other in zip(seen, windows(pinned), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert verify(folder) == []
    with pytest.raises(InvalidValueError, match="no revision 4; it has 1 to 3"):
        Store.open(folder, revision=4)


def test_an_episode_never_changes_its_split(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    before = Store.open(folder).episodes["split"].to_list()
    grow(folder, (10,) * 9)
    assert Store.open(folder).episodes["split"].to_list()[: len(before)] == before


def test_the_command_that_made_a_grown_store_is_told_so(write_rollouts: WriteStore) -> None:
    folder = write_rollouts((20, 20))
    made = Store.open(folder).manifest
    grow(folder, (10,))
    fresh = made.model_copy(update={"state": "writing", "id": None, "shards": ()})
    with pytest.raises(OutputExistsError, match=r"grown to 3 episodes \(revision 2\).*--append"):
        PendingStore.begin(folder, fresh)


def test_what_is_not_of_the_same_kind_cannot_join(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    with pytest.raises(OutputExistsError, match="action_repeat: 1, there 4"):
        grow(folder, (10,), action_repeat=4)
    assert verify(folder) == []


def test_the_store_can_be_read_while_it_grows_and_the_growth_is_resumed(write_rollouts: WriteStore) -> None:
    folder = write_rollouts()
    sealed = Store.open(folder).manifest
    made = rollout_specification(2, 15, 5)
    draft = grown(sealed, made, plan_shards(2, 16, behind=sealed.plan))
    with PendingStore.begin(folder, draft) as pending, ShardWriter(folder, draft, pending.todo[0]) as writer:
        writer.write_episode(random_episode(6, 15, 5))
        writer.commit()
    assert Store.open(folder).manifest == sealed
    assert verify(folder) == []
    assert grow(folder, (15, 15)).resumed == len(sealed.plan) + 1
    assert Store.open(folder).manifest.revision == 2
    assert verify(folder) == []


def grow_once(folder: Path) -> None:
    if Store.open(folder).manifest.revision == 1:
        grow(folder, (15, 12))


def test_growth_killed_at_every_write_fsync_and_rename(tmp_path: Path, write_rollouts: WriteStore) -> None:
    begun, whole = write_rollouts((20, 20)), tmp_path / "whole"
    shutil.copytree(begun, whole)
    grow_once(whole)
    wanted = Store.open(whole).manifest
    for stop in itertools.count(1):
        folder = tmp_path / f"killed-{stop}"
        shutil.copytree(begun, folder)
        killed = run_killed(grow_once, folder, stop=stop)
        assert verify(folder) == []  # the store as it was, or as it is to be
        run_killed(grow_once, folder)
        assert Store.open(folder).manifest == wanted, stop
        if not killed:
            break
    assert stop > 25

"""What a shard's writer refuses, so that no commit record says what JSON cannot."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pvrpipe.schemas.errors import EncodingError
from pvrpipe.store.building import PendingStore, ShardWriter
from pvrpipe.store.columns import column
from pvrpipe.store.layout import read_commit
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import Failure, verify

from .conftest import WriteStore, draft, random_episode
from .embedded import write_embeddings


def test_a_reward_that_is_not_finite_is_named_and_never_reaches_a_commit_record(tmp_path: Path) -> None:
    episode = random_episode(0, 20)
    episode.arrays["reward"][7] = np.nan
    told = replace(episode.info, episode_return=float(episode.arrays["reward"].sum()))
    manifest = draft([episode])
    with (
        PendingStore.begin(tmp_path / "s", manifest) as pending,
        ShardWriter(pending.folder, manifest, pending.todo[0]) as writer,
        pytest.raises(EncodingError, match="column 'reward' is not finite at episode 0, step 7"),
    ):
        writer.write_episode(replace(episode, info=told))
    assert not list((tmp_path / "s" / "shards").glob("*"))


def test_rows_checked_in_any_order_make_the_same_shard(tmp_path: Path) -> None:
    store = Store.open(write_embeddings(tmp_path / "e"))
    trained = next(n for n in range(6) if store.records(n)[0].split == "train")
    rows = store.read_episode(trained)
    parts = [{name: a[at : at + 4] for name, a in rows.items()} for at in range(0, len(rows["step"]), 4)]
    plan, commits = store.manifest.plan[trained], []
    for name in ("in a row", "checked backwards"):
        (tmp_path / name / "shards").mkdir(parents=True)
        with ShardWriter(tmp_path / name, store.manifest, plan, store.records(trained)) as writer:
            if name == "in a row":
                for part in parts:
                    writer.write_rows(part)
            else:
                with ThreadPoolExecutor(2) as pool:
                    checked = list(pool.map(writer.checked, parts[::-1]))
                for part in checked[::-1]:
                    writer.append(part)
            commits.append(writer.commit())
    assert len(parts) > 6
    assert commits[0] == commits[1]
    assert commits[0].moments["embedding"].count == len(rows["step"])


@pytest.mark.parametrize("field", ["episode_return", "factor_light"])
def test_a_commit_record_has_no_number_that_is_not_finite(tmp_path: Path, field: str) -> None:
    """JSON has no word for it: such a record would be read as none, and its shard written again without end."""
    episode = random_episode(0, 20)
    changed = {"values": {field: np.nan}} if field.startswith("factor") else {field: np.nan}
    manifest = draft([episode])
    with (
        PendingStore.begin(tmp_path / "s", manifest) as pending,
        ShardWriter(pending.folder, manifest, pending.todo[0]) as writer,
        pytest.raises(ValueError, match="finite"),
    ):
        writer.write_episode(replace(episode, info=replace(episode.info, **changed)))


@pytest.mark.parametrize(
    "moments", [{"mean": [0.0, math.nan]}, {"m2": [1.0, math.inf]}, {"m2": [1.0, -1.0]}, {"m2": [1.0]}]
)
def test_a_commit_record_of_moments_that_cannot_be_is_none(
    moments: dict[str, list[float]], write_rollouts: WriteStore
) -> None:
    """A store that went on from one ended in a traceback, of statistics that are no numbers."""
    folder = write_rollouts()
    record = folder / "shards" / "00001.json"
    told = json.loads(record.read_text())
    told["moments"]["action"] |= moments
    record.write_text(json.dumps(told))
    assert read_commit(folder, 1) is None
    assert Failure("shards/00001.json", "the commit record is missing or invalid") in verify(folder)


@pytest.mark.parametrize("name", ["action", "embedding"])
def test_what_has_statistics_is_a_vector(name: str) -> None:
    with pytest.raises(ValidationError, match=f"column '{name}' is no vector"):
        column(name, "float32", ())

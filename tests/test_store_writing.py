"""What a shard's writer refuses, so that no commit record says what JSON cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pvrpipe.schemas.errors import EncodingError
from pvrpipe.store.building import PendingStore, ShardWriter

from .conftest import draft, random_episode


def test_a_reward_that_is_not_finite_is_named_and_never_reaches_a_commit_record(tmp_path: Path) -> None:
    episode = random_episode(0, 20)
    episode.arrays["reward"][7] = np.nan
    told = replace(episode.info, episode_return=float(episode.arrays["reward"].sum()))
    manifest = draft([episode])
    with (  # noqa: PT012
        PendingStore.begin(tmp_path / "s", manifest) as pending,
        pytest.raises(EncodingError, match="column 'reward' is not finite at episode 0, step 7"),
        ShardWriter(pending.folder, manifest, pending.todo[0]) as writer,
    ):
        writer.write_episode(replace(episode, info=told))
        writer.commit()


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

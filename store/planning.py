"""Decided before anything runs: which episode goes to which shard, and which are held out."""

from __future__ import annotations

import hashlib
from typing import Literal

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.manifest import Manifest, ShardPlan

SHARDS_WANTED = 64  # so that small jobs run in parallel too
ROWS_WANTED = 16_384  # beyond this many rows a shard, there are more shards
VAL_BLOCK = 5  # one of this many consecutive episodes is held out


def plan_shards(
    episodes: int, rows_per_episode: int, shard_rows: int | None = None, behind: tuple[ShardPlan, ...] = ()
) -> tuple[ShardPlan, ...]:
    """Deal whole episodes, in order, to shards of nearly equal size; ``behind`` those of a plan, if any.

    About 64 shards until a shard holds about 16,384 rows, then more of them. ``shard_rows`` asks for
    another size instead. A shard holds at least one episode.
    """
    if episodes < 1 or rows_per_episode < 2:
        raise InvalidValueError(
            f"nothing to store: {episodes} episodes of {rows_per_episode - 1} transitions; ask for at least 1"
        )
    if shard_rows is not None and shard_rows < 1:
        raise InvalidValueError(f"--shard-rows is {shard_rows}; it must be at least 1")
    rows = episodes * rows_per_episode
    wanted = -(-rows // shard_rows) if shard_rows else max(SHARDS_WANTED, -(-rows // ROWS_WANTED))
    shards = min(episodes, wanted)
    before = sum(plan.episodes for plan in behind)
    first = [before + shard * episodes // shards for shard in range(shards + 1)]
    return tuple(
        ShardPlan(
            shard=len(behind) + shard, first_episode=first[shard], episodes=first[shard + 1] - first[shard]
        )
        for shard in range(shards)
    )


def split_of(episode: int, episodes: int) -> Literal["train", "val"]:
    """The split of an episode: in each block of five, the one with the smallest hash is held out.

    By episode and never by window, the same for everyone, exact at a fifth (a bare hash threshold may
    leave a small store without any). A block of a single episode is for training.
    """
    block = range(episode - episode % VAL_BLOCK, min(episode - episode % VAL_BLOCK + VAL_BLOCK, episodes))
    held_out = min(block, key=lambda e: hashlib.sha256(f"pvrpipe split {e}".encode()).digest())
    return "val" if len(block) > 1 and episode == held_out else "train"


def split_in(manifest: Manifest, episode: int) -> Literal["train", "val"]:
    """The split of an episode of a store; what is appended later never moves an earlier episode."""
    part = manifest.part_of(episode)
    return split_of(episode - part.first_episode, part.episodes)

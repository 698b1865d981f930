"""Stores of noise for the benchmarks of the store: nothing but embeddings, which no compressor makes smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.schemas.specifications import RolloutSpecification
from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.reading import Store

Embeddings = NDArray[np.float16]


def noise(rows: int, shape: tuple[int, ...]) -> Embeddings:
    """Rows (N, *shape) in RAM."""
    out = np.empty((rows, *shape), np.float16)
    random = np.random.default_rng(0)
    for first in range(0, rows, 1024):
        part = out[first : first + 1024]
        part[...] = random.standard_normal(part.shape, np.float32)
    return out


def write_store(folder: Path, rows: Embeddings, steps: int, shard_format: Any = "parquet") -> Store:
    """The rows as episodes of ``steps`` transitions, through the store's own writer."""
    episodes = len(rows) // (steps + 1)
    manifest = noise_manifest(episodes, steps, rows.shape[1:], shard_format=shard_format)
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                for number in range(plan.first_episode, plan.first_episode + plan.episodes):
                    part = rows[number * (steps + 1) : (number + 1) * (steps + 1)]
                    writer.write_episode(
                        Episode(
                            EpisodeInfo(number, steps, 0.0, 0, "none"), {"embedding": part, **still(steps)}
                        )
                    )
                writer.commit()
        pending.seal()
    return Store.open(folder)


def still(steps: int) -> dict[str, NDArray[np.float32]]:
    """What every episode has beside its embeddings: an action and a reward, always zero."""
    return {"action": np.zeros((steps + 1, 1), np.float32), "reward": np.zeros(steps + 1, np.float32)}


def noise_manifest(
    episodes: int, steps: int, shape: tuple[int, ...], shard_rows: int | None = None, **kind: Any
) -> Manifest:
    """The draft of such a store."""
    specification = RolloutSpecification(
        environment="noise",
        size=1,
        camera=0,
        action_repeat=1,
        episodes=episodes,
        max_steps=steps,
        policy="none",
        seed=0,
        control_timestep=0.1,
        action_low=(-1.0,),
        action_high=(1.0,),
        state_names=(),
        renderer="none",
        versions={},
    )
    columns = (
        column("embedding", "float16", shape),
        column("action", "float32", (1,)),
        column("reward", "float32", ()),
    )
    return new_manifest(
        specification, with_bounds(columns), plan_shards(episodes, steps + 1, shard_rows), **kind
    )

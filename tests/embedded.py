"""A small embedding store written through the store's own interface, without any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.schemas.records import Episode
from pvrpipe.schemas.specifications import (
    Computation,
    EmbeddingSpecification,
    EncoderIdentity,
    Recipe,
    WeightsIdentity,
)
from pvrpipe.store.building import PendingStore, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards
from pvrpipe.store.writing import ShardWriter

from .conftest import random_episode, rollout_specification

D = 6


def embedding_specification(
    episodes: int, seed: int = 0, dtype: str = "float32", licence: str = "MIT", **encoder: Any
) -> EmbeddingSpecification:
    weights = WeightsIdentity(
        source="here", revision=None, file=None, file_sha256=None, tensors_sha256="a" * 64,
        loaded=3, expected=3, random_seed=None, licence=licence,
    )  # fmt: skip
    recipe = Recipe(
        resize=None, interpolation="bilinear", antialias=True, crop=8, mean=(0, 0, 0), std=(1, 1, 1)
    )
    identity = EncoderIdentity(
        name="toy", title="Toy", architecture="toy", overrides={}, positions=None, weights=weights,
        recipe=recipe, layer="last", blocks=None, final_norm=False, pooling="mean", shape=(D,),
    )  # fmt: skip
    return EmbeddingSpecification(
        rollouts_id=f"{seed:064x}",
        rollouts=rollout_specification(episodes, 50, seed),
        encoder=identity.model_copy(update=encoder),
        computation=Computation(precision="fp32", device="cpu", threads=1, batch=8),
        dtype=dtype,
        versions={},
    )


def embedded_episode(number: int, length: int, seed: int = 0, dtype: str = "float32") -> Episode:
    """A random episode with embeddings instead of frames and physics."""
    episode = random_episode(number, length, seed)
    values = np.random.default_rng((seed, number, 1)).normal(size=(length + 1, D)).astype(dtype)
    kept = {name: episode.arrays[name] for name in ("action", "reward", "state")}
    return Episode(episode.info, {"embedding": values, **kept})


def write_embeddings(
    folder: Path,
    lengths: Sequence[int] = (30, 41, 25, 30, 33, 28),
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_format: Any = "parquet",
    licence: str = "MIT",
    scale: float = 1.0,
    actions: int = 2,
    **encoder: Any,
) -> Path:
    """Write an embedding store with three golden frames; returns its folder."""
    episodes = [embedded_episode(i, length, seed, dtype) for i, length in enumerate(lengths)]
    for episode in episodes:
        episode.arrays["embedding"][...] *= scale
        episode.arrays["action"] = episode.arrays["action"][:, :actions]
    columns = with_bounds(column(n, str(a.dtype), a.shape[1:]) for n, a in episodes[0].arrays.items())
    made = embedding_specification(len(lengths), seed, dtype, licence, **encoder)
    manifest = new_manifest(made, columns, plan_shards(len(lengths), 42), shard_format)
    rows = np.array([0, 3, 7])
    golden = {
        "frame": random_episode(0, lengths[0], seed).arrays["frame"][rows],
        "embedding": episodes[0].arrays["embedding"][rows],
        "row": rows,
    }
    with PendingStore.begin(folder, manifest) as pending:
        for plan in pending.todo:
            with ShardWriter(folder, manifest, plan) as writer:
                for number in range(plan.first_episode, plan.first_episode + plan.episodes):
                    writer.write_episode(episodes[number])
                writer.commit()
        pending.seal(golden)
    return folder

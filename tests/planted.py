"""Embedding stores, and rollouts, whose every row a test has made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pvrpipe.schemas.records import Episode, EpisodeInfo
from pvrpipe.schemas.specifications import (
    Computation,
    EmbeddingSpecification,
    EncoderIdentity,
    Recipe,
    RolloutSpecification,
    WeightsIdentity,
)
from pvrpipe.store.building import PendingStore, ShardWriter, new_manifest
from pvrpipe.store.columns import column, with_bounds
from pvrpipe.store.planning import plan_shards

from .conftest import rollout_specification


def specification(
    rollouts: RolloutSpecification, encoder: str, shape: tuple[int, ...], rollouts_id: str
) -> EmbeddingSpecification:
    """What a store of made-up embeddings says of itself."""
    weights = WeightsIdentity(
        source="none",
        revision=None,
        file=None,
        file_sha256=None,
        tensors_sha256="0" * 64,
        loaded=1,
        expected=1,
        random_seed=0,
        licence="none",
    )
    recipe = Recipe(
        resize=None,
        interpolation="bilinear",
        antialias=True,
        crop=8,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    identity = EncoderIdentity(
        name=encoder,
        title="Made up",
        architecture="none",
        overrides={},
        positions=None,
        weights=weights,
        recipe=recipe,
        layer="last",
        blocks=None,
        final_norm=False,
        pooling="none",
        shape=shape,
    )
    return EmbeddingSpecification(
        rollouts_id=rollouts_id,
        rollouts=rollouts,
        encoder=identity,
        computation=Computation(precision="fp32", device="cpu", threads=None, batch=1),
        dtype="float16",
        versions={},
    )


def write_planted(
    folder: Path,
    episodes: Sequence[Mapping[str, np.ndarray]],
    *,
    encoder: str = "planted",
    rollouts_id: str = "0" * 64,
    replay_of: str | None = None,
    variation: str = "none",
    environment: str = "test:walk",
    bounds: tuple[tuple[float, ...], tuple[float, ...]] = ((-1.0, -1.0), (1.0, 1.0)),
) -> Path:
    """A store of episodes, each its columns (L + 1, ...) by name; returns its folder.

    The first reward and the last action, which the contract sets to zero, are. Episodes with frames make rollouts,
    others embeddings of the rollouts of that id, which replay those of another. ``bounds``: lowest and highest actions.
    """
    lengths = [len(arrays["reward"]) - 1 for arrays in episodes]
    first = episodes[0]
    columns = with_bounds(column(name, str(array.dtype), array.shape[1:]) for name, array in first.items())
    plan = plan_shards(len(episodes), max(lengths) + 1)
    low, high = bounds
    about = {"replay_of": replay_of, "environment": environment, "action_low": low, "action_high": high}
    rollouts = rollout_specification(len(episodes), max(lengths)).model_copy(update=about)
    made = (
        rollouts
        if "frame" in first
        else specification(rollouts, encoder, first["embedding"].shape[1:], rollouts_id)
    )
    manifest = new_manifest(made, columns, plan)
    with PendingStore.begin(folder, manifest) as pending:
        for shard in pending.todo:
            with ShardWriter(folder, manifest, shard) as writer:
                for number in range(shard.first_episode, shard.first_episode + shard.episodes):
                    arrays = {name: array.copy() for name, array in episodes[number].items()}
                    arrays["reward"][0], arrays["action"][-1] = 0, 0
                    total = float(arrays["reward"].sum())
                    info = EpisodeInfo(number, lengths[number], total, number, "random", variation=variation)
                    writer.write_episode(Episode(info, arrays))
                writer.commit()
        pending.seal()
    return folder

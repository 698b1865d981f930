"""What a store is, in numbers: the content of ``pvrpipe inspect``."""

from __future__ import annotations

from typing import Any

import polars as pl

from pvrpipe.store.reading import Store


def describe(store: Store) -> dict[str, Any]:
    """Kind, size, columns, provenance, and returns per policy and split."""
    manifest = store.manifest
    returns = (
        store.episodes.group_by("policy", "split")
        .agg(
            episodes=pl.len(),
            mean_return=pl.col("episode_return").mean(),
            best_return=pl.col("episode_return").max(),
            mean_length=pl.col("length").mean(),
        )
        .sort("policy", "split")
    )
    return {
        "store": str(store.path),
        "kind": manifest.kind,
        "id": manifest.id,
        "format_version": manifest.format_version,
        "environment": manifest.rollouts.environment,
        "episodes": manifest.episodes,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "columns": [c.model_dump(mode="json") for c in manifest.columns],
        "mapped": {
            c.name: store.shard(0).mapped(c.name) is not None
            for c in manifest.columns
            if c.layout == "mapped"
        },
        "random_weights": manifest.embeddings is not None
        and manifest.embeddings.encoder.weights.random_seed is not None,
        "specification": manifest.specification.model_dump(mode="json"),
        "returns": returns.to_dicts(),
    }

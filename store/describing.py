"""What a store is, in numbers: the content of ``pvrpipe inspect``."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pvrpipe.store.places import Url
from pvrpipe.store.reading import Store

LOOKED_AT = 40  # episodes whose actions and states are read
SHOWN = 40  # numbers of a state, at most
BINS, RARE = 20, 1e-3


def describe(store: Store) -> dict[str, Any]:
    """Kind, size, columns, provenance, and returns per policy and split."""
    manifest = store.manifest
    returns = (
        store.episodes.group_by("policy", "variation", "split")
        .agg(
            episodes=pl.len(),
            mean_return=pl.col("episode_return").mean(),
            best_return=pl.col("episode_return").max(),
            mean_length=pl.col("length").mean(),
        )
        .sort("policy", "variation", "split")
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
        "smaller_batches": sum(entry.batch is not None for entry in manifest.shards),
        "specification": manifest.specification.model_dump(mode="json"),
        "returns": returns.to_dicts(),
        "coverage": [asdict(found) for found in coverage(store)],
        "failed": [failure.model_dump() for failure in manifest.failed],
    }


@dataclass(frozen=True)
class Coverage:
    """What of its range one number of the actions or states reaches."""

    of: str
    minimum: float
    mean: float
    maximum: float
    deviation: float
    bins_reached: float
    """share of twenty equal bins of its range that hold at least one in a thousand of its values; of an
    action the range it may have, of a state the one it has"""


def coverage(store: Store) -> list[Coverage]:
    """Coverage of actions and states, over evenly spaced episodes.

    Behind a URL over those of the first shard: whoever asks what a store is does not want all of it fetched.
    """
    near = store.manifest.plan[0] if isinstance(store.path, Url) else store.manifest
    picked = np.unique(np.linspace(0, near.episodes - 1, LOOKED_AT).astype(int)).tolist()
    made = store.manifest.rollouts
    found = []
    for name in ("action", "state"):
        column = store.manifest.column(name)
        if column is None:
            continue
        episodes = [store.read_episode(e, [name])[name] for e in picked]
        rows = np.concatenate([rows[:-1] if name == "action" else rows for rows in episodes])
        values = np.asarray(rows, np.float64).reshape(len(rows), -1)
        names = made.state_names if name == "state" else [f"action[{i}]" for i in range(values.shape[1])]
        known = zip(made.action_low, made.action_high, strict=True) if name == "action" else ()
        bounds = itertools.chain(known, itertools.repeat((-np.inf, np.inf)))
        # Not strict: a stranger's manifest may name more, or fewer, than there are.
        for label, own, bound in zip(names[:SHOWN], values.T, bounds, strict=False):
            span = bound if np.isfinite(bound).all() else (float(own.min()), float(own.max()))
            found.append(_covered(label, own, span))
    return found


def _covered(label: str, values: NDArray[np.float64], span: tuple[float, float]) -> Coverage:
    counts = np.histogram(values, BINS, span)[0] if span[0] < span[1] else np.array([len(values)])
    reached = float(np.mean(counts >= max(1, RARE * len(values))))
    spread = (float(values.min()), float(values.mean()), float(values.max()), float(values.std()))
    return Coverage(label, *spread, bins_reached=reached)

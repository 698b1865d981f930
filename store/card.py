"""The dataset card of a store: ``README.md``, written for a person, from the manifest alone."""

from __future__ import annotations

from pvrpipe.schemas.manifest import EmbeddingSpecification, Manifest, RolloutSpecification


def card(manifest: Manifest) -> str:
    """A page in Markdown: what this is, how it was made, how to read it."""
    specification = manifest.specification
    about = (
        _rollouts(specification)
        if isinstance(specification, RolloutSpecification)
        else _embeddings(specification)
    )
    columns = "\n".join(
        f"| `{c.name}` | {c.dtype} | {list(c.shape)} | {c.layout} |" for c in manifest.columns
    )
    return f"""{about}
- {manifest.episodes} episodes, {manifest.rows} rows in {len(manifest.shards)} shards, {manifest.bytes} bytes
- store id `{manifest.id}`

## Columns

Row t holds what was observed at t, the reward received on arriving at t, and the action taken from t.

| column | dtype | shape of a row | layout |
|---|---|---|---|
{columns}

## Read it

Every shard is standard Parquet; arrays are FIXED_LEN_BYTE_ARRAY columns, little-endian, in C order.

```python
import numpy as np, pyarrow.parquet as pq

column = pq.read_table("shards/00000.parquet").column("action").combine_chunks()
action = np.frombuffer(column.buffers()[1], "<f4").reshape(len(column), -1)
```

`pvrpipe inspect` shows what it is, `pvrpipe verify` checks every byte and number of it.
"""


def _rollouts(s: RolloutSpecification) -> str:
    return f"""# Rollouts of {s.environment}

- frames of {s.size} × {s.size} pixels, camera {s.camera}
- a row every {s.control_timestep:g} s (action repeat {s.action_repeat})
- policy `{s.policy}`, seed {s.seed}, at most {s.max_steps} transitions an episode"""


def _embeddings(s: EmbeddingSpecification) -> str:
    e, w = s.encoder, s.encoder.weights
    random = (
        f"\n- **RANDOM WEIGHTS** (seed {w.random_seed}): nobody trained this encoder; it is a control"
        if w.random_seed is not None
        else ""
    )
    return f"""# {s.rollouts.environment} embedded by {e.title}
{random}
- encoder `{e.name}`: {e.architecture}, layer {e.layer}, pooling {e.pooling}
- computed in {s.computation.precision}, stored as {s.dtype}
- weights from {w.source}{f" at {w.revision}" if w.revision else ""}, {w.loaded} of {w.expected} tensors,
  tensors sha256 `{w.tensors_sha256}`
- licence of the weights, which travels with what they computed: {w.licence}
- frames from rollout store `{s.rollouts_id}` (policy `{s.rollouts.policy}`, {s.rollouts.size} px)"""

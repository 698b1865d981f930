"""The dataset card of a store: ``README.md``, written for a person and the Hub, from the manifest alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pvrpipe.schemas.manifest import Manifest
from pvrpipe.schemas.specifications import EmbeddingSpecification, RolloutSpecification
from pvrpipe.store.licences import hub_licence

SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
}  # as the Hub has them


_PARQUET = """Every shard is standard Parquet; arrays are FIXED_LEN_BYTE_ARRAY columns, little-endian, in C order.

```python
import numpy as np, pyarrow.parquet as pq

column = pq.read_table("shards/00000.parquet").column("action").combine_chunks()
action = np.frombuffer(column.buffers()[1], "<f4").reshape(len(column), -1)
```"""
_WEBDATASET = """Every shard is a tar with one sample per episode, an `.npy` member per column.

```python
import webdataset

for episode in webdataset.WebDataset("shards/00000.tar", shardshuffle=False).decode():
    print(episode["json"]["episode_return"], episode["action.npy"].shape)
```"""


def card(manifest: Manifest) -> str:
    """A page in Markdown: what this is, how it was made, how to read it."""
    specification = manifest.specification
    about = (
        _rollouts(specification)
        if isinstance(specification, RolloutSpecification)
        else _embeddings(specification, _policies(manifest))
    )
    columns = "\n".join(
        f"| `{c.name}` | {c.dtype} | {list(c.shape)} | {c.layout} |" for c in manifest.columns
    )
    return f"""{front_matter(manifest, _configs(manifest))}
{about}
{_joined(manifest)}{_smaller_batches(manifest)}- {manifest.episodes} episodes, {manifest.rows} rows
- {len(manifest.shards)} shards, {manifest.bytes} bytes
- store id `{manifest.id}`

## Columns

Row t holds what was observed at t, the reward received on arriving at t, and the action taken from t.

| column | dtype | shape of a row | layout |
|---|---|---|---|
{columns}

## Read it

{_PARQUET if manifest.shard_format == "parquet" else _WEBDATASET}

`pvrpipe inspect` shows what it is, `pvrpipe verify` checks every byte and number of it.
"""


def _rollouts(s: RolloutSpecification) -> str:
    return f"""# Rollouts of {s.environment}

- frames of {s.size} × {s.size} pixels, camera {s.camera}
- a row every {s.control_timestep:g} s (action repeat {s.action_repeat})
- policy `{s.policy}`, seed {s.seed}, at most {s.max_steps} transitions an episode"""


def _policies(manifest: Manifest) -> str:
    """Who played, of every part."""
    made = (part.specification for part in manifest.all_parts)
    played = (s.rollouts.policy if isinstance(s, EmbeddingSpecification) else s.policy for s in made)
    return ", ".join(f"`{policy}`" for policy in dict.fromkeys(played))


def _embeddings(s: EmbeddingSpecification, policies: str) -> str:
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
- frames from rollout store `{s.rollouts_id}` (policy {policies}, {s.rollouts.size} px)"""


def _smaller_batches(manifest: Manifest) -> str:
    """Equal bits are promised for equal batch sizes only."""
    smaller = [entry.batch for entry in manifest.shards if entry.batch is not None]
    if not smaller:
        return ""
    return (
        f"- {len(smaller)} shards were computed in batches smaller than the specification's, down to "
        f"{min(smaller)}, because memory did not suffice\n"
    )


def front_matter(manifest: Manifest, configs: list[dict[str, Any]]) -> str:
    """The YAML by which the Hugging Face Hub knows a data set: licence, tags, files."""
    rows = manifest.rows
    size = next((name for limit, name in SIZES.items() if rows < limit), "n>1M")
    told: dict[str, Any] = {
        **_licence(manifest.embeddings),
        "pretty_name": manifest.rollouts.environment,
        "task_categories": ["reinforcement-learning", "robotics"],
        "tags": ["pvrpipe", "world-models", manifest.kind, slug_of(manifest)],
        "size_categories": [size],
        "configs": configs,
    }
    return "\n".join(["---", *_yaml(told), "---"])


def slug_of(manifest: Manifest) -> str:
    """The encoder's name, or the environment's."""
    made = manifest.embeddings
    return (made.encoder.name if made is not None else manifest.rollouts.environment).replace(":", "-")


def _licence(made: EmbeddingSpecification | None) -> dict[str, str]:
    """The weights' licence travels with what they computed; of rollouts none is known."""
    if made is None or made.encoder.weights.random_seed is not None:
        return {}
    licence = made.encoder.weights.licence
    known = hub_licence(licence)
    return {"license": known} if known != "other" else {"license": known, "license_name": licence}


def _configs(manifest: Manifest) -> list[dict[str, Any]]:
    """What the Hub's viewer shows: the episode table first, for arrays are bytes to it."""
    suffix = "parquet" if manifest.shard_format == "parquet" else "tar"
    files = {"episodes": manifest.episodes_file, "rows": f"shards/*.{suffix}"}
    return [
        {"config_name": name, "data_files": [{"split": "train", "path": path}]}
        for name, path in files.items()
        if name == "episodes" or suffix == "parquet"  # one config cannot be of another file type
    ]


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Dictionaries and lists as YAML in blocks; whatever else as JSON, which is YAML."""
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, item in items:
        head = f"{indent}{key}:" if key is not None else f"{indent}-"
        if isinstance(item, dict | list) and key is not None:
            yield head
            yield from _yaml(item, f"{indent}  " if isinstance(item, dict) else indent)
        elif isinstance(item, dict):
            first, *rest = _yaml(item, f"{indent}  ")
            yield f"{head} {first.strip()}"
            yield from rest
        else:
            yield f"{head} {json.dumps(item, ensure_ascii=False)}"


def _joined(manifest: Manifest) -> str:
    """Whether the episodes came in parts, or from elsewhere."""
    stores = sorted({taken.store for taken in manifest.taken})
    origin = f", taken over from {', '.join(f'`{s[:16]}`' for s in stores)}" if stores else ""
    parts = len(manifest.all_parts)
    return f"- {parts} part(s), each made as `store.json` says{origin}\n" if parts > 1 or stores else ""

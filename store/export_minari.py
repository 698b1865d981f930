"""A Minari dataset: a folder to put below ``MINARI_DATASETS_PATH``, or to open as ``MinariDataset(OUT/data)``.

::

    data/metadata.json      spaces and totals
    data/main_data.hdf5     a group episode_N per episode

The layout of Minari 0.5 is written here with h5py and read by Minari itself in the tests. Observations are a
dictionary of the store's columns, L + 1 of them; actions, rewards, terminations and truncations are L, reward
t being that of action t. Images are kept as they are (``jpeg_encoding`` is false).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.schemas.manifest import Column, EpisodeRecord
from pvrpipe.schemas.progress import Progress
from pvrpipe.schemas.specifications import RolloutSpecification
from pvrpipe.store.columns import BOUNDS
from pvrpipe.store.export_hdf5 import h5py_or_cure
from pvrpipe.store.selection import Selection
from pvrpipe.store.shards import Rows

MINARI_VERSION = "0.5.3"  # of the layout
NO_OBSERVATION = {"action", "reward", *(c.name for c in BOUNDS)}


def write_minari(selection: Selection, folder: Path, progress: Progress) -> None:
    """Write the folder; memory holds one episode."""
    (folder / "data").mkdir(parents=True)
    steps = 0
    with h5py_or_cure().File(folder / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for number, record in enumerate(selection.records):
            _write_episode(file.create_group(f"episode_{number}"), record, selection.rows(number))
            steps += record.length
            progress(steps + number + 1, selection.total_rows, f"episode {number}")
    metadata = _metadata(selection, steps)
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata, indent=1, sort_keys=True))


def _write_episode(group: Any, record: EpisodeRecord, rows: dict[str, Rows]) -> None:
    last = np.arange(record.length) == record.length - 1
    group.attrs.update({"id": record.episode, "seed": record.seed, "total_steps": record.length})
    group.attrs.update({"policy": record.policy, "split": record.split, "variation": record.variation})
    for name in rows.keys() - NO_OBSERVATION:
        group.create_dataset(f"observations/{name}", data=rows[name])
    group.create_dataset("actions", data=rows["action"][:-1])
    group.create_dataset("rewards", data=rows["reward"][1:])
    group.create_dataset("terminations", data=last & record.terminated)
    group.create_dataset("truncations", data=last & (not record.terminated))


def _metadata(selection: Selection, steps: int) -> dict[str, Any]:
    made = selection.store.manifest.rollouts
    observed = {c.name: _box(c) for c in selection.columns if c.name not in NO_OBSERVATION}
    action = next(c for c in selection.columns if c.name == "action")
    return {
        "dataset_id": _dataset_id(made, selection),
        "minari_version": MINARI_VERSION,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "total_episodes": len(selection),
        "total_steps": steps,
        "observation_space": json.dumps({"type": "Dict", "subspaces": observed}),
        "action_space": json.dumps({**_box(action), "low": made.action_low, "high": made.action_high}),
        "description": f"{made.environment}, exported by pvrpipe from store {selection.store.manifest.id}",
    }


def _dataset_id(made: RolloutSpecification, selection: Selection) -> str:
    """``dmc-pendulum-swingup/vc1-v0``, of the characters that Minari allows."""
    embeddings = selection.store.manifest.embeddings
    name = embeddings.encoder.name if embeddings is not None else "rollouts"
    env, name = (re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") for text in (made.environment, name))
    return f"{env}/{name}-v0"


def _box(column: Column) -> dict[str, Any]:
    """A space that any value of a column is in."""
    kind = np.dtype(column.dtype)
    low, high = (0, 255) if kind == np.uint8 else (float("-inf"), float("inf"))
    bounds = (np.full(column.shape, bound).tolist() for bound in (low, high))
    low_list, high_list = bounds
    return {
        "type": "Box",
        "dtype": column.dtype,
        "shape": list(column.shape),
        "low": low_list,
        "high": high_list,
    }

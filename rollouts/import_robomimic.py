"""robomimic's HDF5: ``data/demo_N`` with ``obs/<camera>_image``, ``actions``, ``rewards`` and ``dones``, L rows each.

Row i is the observation, the action taken from it, the reward received for that and whether it ended; what it led to
is row i of ``next_obs``, which data sets with images mostly leave out (``dataset_states_to_obs.py
--exclude-next-obs``): then the last transition is left out. ``dones`` is also set where a demonstration merely stops
(``done_mode`` 1 and 2): an episode counts as ended where its last reward is above 0 too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.rollouts.import_source import (
    STEP_SECONDS,
    Array,
    Source,
    Trajectory,
    flat,
    in_order,
    is_picture,
    kept_transitions,
    names_of,
    opened_hdf5,
    own_members,
    picked,
    reading,
)
from pvrpipe.schemas.errors import SourceError

IMAGE = "_image"


def open_source(given: str, camera: str | None) -> Source:
    """Open a file.

    Raises:
        SourceError: it is not of this layout.
    """
    path = Path(given)
    with opened_hdf5(path) as file, reading(path):
        demos = in_order(own_members(file["data"]), "demo_") if "data" in file else []
        if not demos or "obs" not in file["data"][demos[0]]:
            raise SourceError(
                f"{path} has no data/demo_0/obs: it is not of robomimic's layout; see docs/commands.md"
            )
        observed = file["data"][demos[0]]["obs"]
        members = own_members(observed)
        pictures = [k for k in members if is_picture(observed[k].shape[1:], observed[k].dtype)]
        shown = {key.removesuffix(IMAGE): key for key in pictures}
        label = picked(list(shown), camera, path)
        vectors = [k for k in members if observed[k].ndim <= 2 and observed[k].dtype.kind in "fiu"]
        names = [n for k in vectors for n in names_of(k, int(np.prod(observed[k].shape[1:])))]
        made = json.loads(file["data"].attrs.get("env_args", "{}")) or {}
    rate = made.get("env_kwargs", {}).get("control_freq")
    return Source(
        name=str(made.get("env_name") or path.stem),
        trajectories=partial(_trajectories, path, shown[label], tuple(vectors)),
        camera=label,
        state_names=tuple(names),
        packages=("h5py",),
        seconds=1 / rate if rate else STEP_SECONDS,
    )


def _trajectories(path: Path, picture: str, vectors: tuple[str, ...]) -> Iterator[Trajectory]:
    with opened_hdf5(path) as file:
        for name in in_order(own_members(file["data"]), "demo_"):
            yield _trajectory(file["data"][name], name, picture, vectors)


def _trajectory(demo: Any, name: str, picture: str, vectors: tuple[str, ...]) -> Trajectory:
    rows = len(demo["actions"])
    for what in ("rewards", "dones", f"obs/{picture}", *(f"obs/{key}" for key in vectors)):
        if len(demo[what]) != rows:
            raise SourceError(
                f"{name} has {rows} actions, but {len(demo[what])} rows of {what}; get it again"
            )
    last = all(f"next_obs/{key}" in demo for key in (picture, *vectors)) and rows > 0
    length, cut = kept_transitions(name, rows + last, rows)
    reward = demo["rewards"][:length]
    return Trajectory(
        name=name,
        action=flat(demo["actions"][:length]),
        reward=reward,
        frames=partial(_observed, demo, picture, last),
        state=_states(demo, vectors, last) if vectors else None,
        terminated=bool(last and demo["dones"][-1] and reward[-1] > 0),
        cut=cut,
    )


def _states(demo: Any, vectors: tuple[str, ...], last: bool) -> Array:
    return np.concatenate([flat(_observed(demo, key, last)) for key in vectors], axis=1)


def _observed(demo: Any, key: str, last: bool) -> Array:
    """All observations of one kind, with the one that the last action led to where it is there."""
    observed: Array = demo[f"obs/{key}"][:]
    return np.concatenate([observed, demo[f"next_obs/{key}"][-1:]]) if last else observed

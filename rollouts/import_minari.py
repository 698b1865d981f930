"""A Minari data set: its folder, or the id of one that `minari download` brought here.

``data/metadata.json`` has the spaces, ``data/main_data.hdf5`` a group ``episode_N`` for each episode: L + 1
``observations``, and L of ``actions``, ``rewards``, ``terminations`` and ``truncations``, each of the step that begins
at the observation of the same index (minari 0.5, ``minari/dataset/_storages/hdf5_storage.py``). Pictures may be JPEG.
Read with h5py: the minari package is not needed.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pvrpipe.rollouts.import_source import (
    Array,
    Source,
    Trajectory,
    flat,
    in_order,
    is_picture,
    names_of,
    opened_hdf5,
    own_members,
    picked,
    reading,
    without_physics,
)
from pvrpipe.schemas.errors import SourceError
from pvrpipe.schemas.specifications import IMPORTED

METADATA, DATA = "metadata.json", "main_data.hdf5"
LARGEST_SEED = (1 << 53) - 1  # so that JSON holds it exactly

Space = dict[str, Any]


@dataclass(frozen=True)
class _Layout:
    """Where in an episode's group things are."""

    path: Path
    picture: str
    picture_axes: int
    vectors: tuple[str, ...]
    start: int  # of discrete actions


def open_source(given: str, camera: str | None) -> Source:
    """Open a data set.

    Raises:
        SourceError: it is none of Minari's, or its spaces do not fit into a store.
    """
    folder = _folder(given)
    with reading(folder / METADATA):
        told = json.loads((folder / METADATA).read_text())
        observed = dict(_leaves("observations", _space(told["observation_space"])))
        action = _space(told["action_space"])
    if told.get("data_format", "hdf5") != "hdf5":
        raise SourceError(
            f"{folder} is in Minari's format '{told['data_format']}', of which hdf5 is read here; "
            "convert it with minari.create_dataset_from_buffers(..., data_format='hdf5')"
        )
    pictures = [k for k, s in observed.items() if s["type"] == "Box" and is_picture(s["shape"], s["dtype"])]
    shown = {key.removeprefix("observations/"): key for key in pictures}
    label = picked(list(shown), camera, folder)
    vectors = {k: s for k, s in observed.items() if s["type"] == "Box" and len(s["shape"]) <= 1}
    kept = without_physics(list(vectors))
    names = [
        n for k in kept for n in names_of(k.removeprefix("observations/"), int(np.prod(vectors[k]["shape"])))
    ]
    bounds, count = _actions(action, folder)
    layout = _Layout(
        folder / DATA,
        shown[label],
        len(observed[shown[label]]["shape"]),
        tuple(kept),
        int(action.get("start", 0)),
    )
    with opened_hdf5(layout.path) as file:
        episodes = in_order(own_members(file), "episode_")
        has_success = bool(episodes) and all("infos/success" in file[name] for name in episodes)
    return Source(
        name=str(told.get("dataset_id") or folder.parent.name),
        trajectories=partial(_trajectories, layout, has_success),
        camera=label,
        state_names=tuple(names),
        packages=("h5py",),
        bounds=bounds,
        actions=count,
        has_success=has_success,
    )


def _folder(given: str) -> Path:
    """The folder with the metadata."""
    home = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    for folder in (Path(given), Path(given) / "data", home / given / "data"):
        if (folder / METADATA).is_file():
            return folder
    raise SourceError(
        f"{given} is no Minari data set: {METADATA} is neither there nor in {home}; "
        f"give its folder, or get it with `minari download {given}`"
    )


def _space(told: str | Space) -> Space:
    found = json.loads(told) if isinstance(told, str) else told
    if not isinstance(found, dict) or "type" not in found:
        raise ValueError(f"a space is {str(found)[:40]}")
    return found


def _leaves(path: str, space: Space) -> Iterator[tuple[str, Space]]:
    """Every space in a space of spaces, with its place in the file."""
    if space["type"] == "Dict":
        for key, part in space["subspaces"].items():
            yield from _leaves(f"{path}/{key}", part)
    elif space["type"] == "Tuple":
        for index, part in enumerate(space["subspaces"]):
            yield from _leaves(f"{path}/_index_{index}", part)
    else:
        yield path, space


def _actions(space: Space, folder: Path) -> tuple[tuple[Array, Array] | None, int | None]:
    """Bounds of actions, or of how many an action is one."""
    if space["type"] == "Discrete":
        return None, int(space["n"])
    if space["type"] != "Box" or not np.issubdtype(np.dtype(space["dtype"]), np.floating):
        raise SourceError(
            f"{folder} has actions of {space['type']}; boxes of numbers and one of A are imported"
        )
    low, high = (
        np.broadcast_to(np.asarray(space[k], np.float64), space["shape"]).ravel() for k in ("low", "high")
    )
    return (low, high), None


def _trajectories(layout: _Layout, has_success: bool) -> Iterator[Trajectory]:
    with opened_hdf5(layout.path) as file:
        for name in in_order(own_members(file), "episode_"):
            yield _trajectory(file[name], name, layout, has_success)


def _trajectory(group: Any, name: str, layout: _Layout, has_success: bool) -> Trajectory:
    taken = group["actions"][:]
    one_of_several = taken.dtype.kind in "iu" and taken.ndim == 1
    action = taken - layout.start if one_of_several else flat(taken)
    length = len(action)
    seen = len(group[layout.picture])
    if seen != length + 1 and (length or seen > 1):
        raise SourceError(
            f"{name} has {length} actions and {seen} observations; there must be one more; get it again"
        )
    vectors = [flat(group[key][:]) for key in layout.vectors] if length else []
    return Trajectory(
        name=name,
        action=action,
        reward=group["rewards"][:],
        frames=partial(_frames, group[layout.picture], layout.picture_axes),
        state=np.concatenate(vectors, axis=1) if vectors else None,
        success=_success(group["infos/success"][:], length) if has_success else None,
        terminated=bool(length and group["terminations"][-1]),
        seed=_seed(group.attrs.get("seed", 0)),
        policy=str(group.attrs.get("policy", IMPORTED)),
    )


def _seed(told: Any) -> int:
    """An episode's seed, 0 where it is unknown or no number of 53 bits: Minari draws 64 where it is given none."""
    text = str(told)
    return int(text) if text.isdecimal() and int(text) <= LARGEST_SEED else 0


def _success(told: Array, length: int) -> Array:
    """(L + 1,): ``infos`` may begin at the reset or at the first step, and hold flags or lists of one."""
    told = np.asarray(flat(told).any(axis=1))
    return told if len(told) == length + 1 else np.concatenate([[False], told])


def _frames(pictures: Any, axes: int) -> Array:
    """Pictures as they were recorded, or from JPEG, which are rows of bytes."""
    if pictures.ndim == 1 + axes:
        return np.asarray(pictures[:])
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(np.asarray(row, np.uint8).tobytes()))) for row in pictures]
    )

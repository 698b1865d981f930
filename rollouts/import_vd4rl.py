"""V-D4RL: a folder of ``.npz`` episodes (DreamerV2's) or of ``.hdf5`` shards (DrQ-v2's), or one such file.

Both have L + 1 rows, row t being the observation, the action that **led to** it and the reward on arriving; the first
action and the first reward are 0. Shards hold many episodes behind each other, which ``step_type`` parts (0 first, 2
last), with frames (3, 84, 84); of an episode that begins before its shard does, the rest is imported. Where the
environment ended, ``discount`` is 0 (upstream: ``conversion_scripts/npz_to_hdf5.py``, ``drqbc/utils.py``).
"""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pvrpipe.rollouts.import_source import (
    Array,
    Source,
    Trajectory,
    flat,
    opened_hdf5,
    own_members,
    reading,
    same_length,
)
from pvrpipe.schemas.errors import SourceError

SUFFIXES = (".npz", ".hdf5")
FIRST, LAST = 0, 2
NEEDED = ("action", "reward", "discount")


def open_source(given: str, _: str | None) -> Source:
    """Open a folder or a file.

    Raises:
        SourceError: there are no such files.
    """
    path = Path(given)
    files = [path] if path.is_file() else sorted(p for s in SUFFIXES for p in path.glob(f"*{s}"))
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        raise SourceError(
            f"{path} holds {'both .npz and .hdf5' if len(kinds) > 1 else 'no .npz and no .hdf5'}; "
            "give a folder with V-D4RL's files of one kind"
        )
    npz = kinds == {".npz"}
    read: Callable[[Path], Iterator[Trajectory]] = _of_npz if npz else _of_hdf5
    return Source(
        name=_name(path),
        trajectories=lambda: (found for file in files for found in read(file)),
        camera="image" if npz else "observation",
        packages=() if npz else ("h5py",),
    )


def _name(path: Path) -> str:
    """``walker_walk-expert-64px`` of ``…/walker_walk/expert/64px``; otherwise the folder's own name."""
    parts = path.absolute().with_suffix("").parts
    return "-".join(parts[-3:] if re.fullmatch(r"\d+px", parts[-1]) else parts[-1:])


def _of_npz(path: Path) -> Iterator[Trajectory]:
    with reading(path), np.load(path, allow_pickle=False) as file:
        told = {name: file[name] for name in NEEDED}
        terminal = file["is_terminal"] if "is_terminal" in file else told["discount"] == 0
    with reading(path):
        rows = _rows_of_member(path, "image")
    yield _trajectory(path.name, told, terminal, {"image": rows}, partial(_image, path))


def _image(path: Path) -> Array:
    with np.load(path, allow_pickle=False) as file:
        image: Array = file["image"]
        return image


def _rows_of_member(path: Path, name: str) -> int:
    """Rows of an array in an ``.npz``, from its header alone."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return int(read(member)[0][0])


def _of_hdf5(path: Path) -> Iterator[Trajectory]:
    with opened_hdf5(path) as file:
        if missing := {*NEEDED, "observation", "step_type"} - set(own_members(file)):
            raise SourceError(
                f"{path} has no {', '.join(sorted(missing))}: it is no shard of V-D4RL; see docs/commands.md"
            )
        kind = file["step_type"][:].astype(int).reshape(-1)
        same_length(path.name, len(kind), **{name: file[name] for name in (*NEEDED, "observation")})
        for first, end in _episodes(kind):
            told = {name: file[name][first:end] for name in NEEDED}
            if kind[first] != FIRST:  # how it came here is not known
                told["action"][0] = told["reward"][0] = 0
            frames = partial(_slice, file["observation"], first, end)
            yield _trajectory(
                f"{path.name} rows {first} to {end - 1}", told, told["discount"] == 0, {}, frames
            )


def _episodes(kind: Array) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last, of every episode of a shard."""
    begins = np.flatnonzero((kind == FIRST) | (np.roll(kind, 1) == LAST))
    return itertools.pairwise(dict.fromkeys([0, *begins.tolist(), len(kind)]))


def _slice(dataset: Any, first: int, end: int) -> Array:
    rows: Array = dataset[first:end]
    return rows


def _trajectory(
    name: str, told: dict[str, Array], terminal: Array, rows: dict[str, int], frames: Callable[[], Array]
) -> Trajectory:
    """Rows as transitions: the action that led to row t + 1 is taken from row t."""
    action, reward = told["action"], told["reward"].reshape(-1)
    same_length(name, len(action), **told, is_terminal=terminal, **{k: range(v) for k, v in rows.items()})
    if len(action) and (np.any(action[0]) or reward[0] != 0):
        raise SourceError(
            f"{name} begins with an action or a reward that is not 0, so its rows are not aligned as V-D4RL's; "
            "import it as another format, or mend it"
        )
    return Trajectory(
        name=name,
        action=flat(action[1:]),
        reward=reward[1:],
        frames=frames,
        terminated=bool(len(terminal) and np.any(terminal[-1])),
    )

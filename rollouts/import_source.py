"""What every importer gives: trajectories in one alignment, with frames that are read only when they are needed.

A trajectory of L transitions has L actions and L rewards, ``reward[i]`` being that of ``action[i]``, and L + 1
observations. ``rollouts/import_<format>.py`` brings its format to this form, whatever its own alignment is;
``rollouts/importing.py`` makes rows of it (``schemas/axes.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvrpipe.schemas.errors import MissingExtraError, PvrpipeError, SourceError, UnknownNameError, one_line
from pvrpipe.schemas.specifications import IMPORTED

Array = NDArray[Any]
Frames = NDArray[np.uint8]

STEP_SECONDS = 0.05  # where a data set does not say how long a step took


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of a data set, all but its frames in memory."""

    name: str
    """Of the episode in its data set, for messages."""
    action: Array
    """(L, A) numbers, or (L,) integers where an action is one of A."""
    reward: Array
    """(L,), each received for the action of the same index."""
    frames: Callable[[], Array]
    """Reads the frames: (L + 1, H, W, C), (L + 1, C, H, W) or gray (L + 1, H, W), uint8."""
    state: Array | None = None
    """(L + 1, S)"""
    success: Array | None = None
    """(L + 1,) bool"""
    terminated: bool = False
    """The environment truly ended in the last observation."""
    cut: bool = False
    """The data set has one transition more, but not the observation that it led to."""
    seed: int = 0
    policy: str = IMPORTED


@dataclass(frozen=True)
class Source:
    """A data set that is open for reading."""

    name: str
    """Of the data set, e.g. ``door-human-v2``."""
    trajectories: Callable[[], Iterator[Trajectory]]
    """Reads all trajectories, in order; each time it is called, anew."""
    camera: str = "frame"
    """Which of its cameras the frames are of."""
    state_names: tuple[str, ...] = ()
    """(S,)"""
    packages: tuple[str, ...] = ()
    """Whose versions decide what is read, besides numpy and pillow."""
    seconds: float = STEP_SECONDS
    """Of a step."""
    bounds: tuple[Array, Array] | None = None
    """Lowest and highest actions (A,) where the data set says so; otherwise they are measured."""
    actions: int | None = None
    """A, where an action is one of A and the data set says of how many."""
    has_success: bool = False
    remarks: tuple[str, ...] = ()
    """What a person ought to know of the data set."""


@contextmanager
def reading(where: Path | str) -> Iterator[None]:
    """Whatever libraries raise of a damaged file becomes one line.

    Raises:
        SourceError: instead of what was raised.
    """
    try:
        yield
    except (PvrpipeError, NameError, AssertionError):  # a mistake of ours is no damage
        raise
    except Exception as error:  # a damaged file makes a library raise anything
        what = f"has no {error}" if isinstance(error, KeyError) else one_line(error)[:200]
        raise SourceError(
            f"{where} cannot be read ({what}); is it cut short, or of another format? Get it again, or leave it out"
        ) from error


def all_of(source: Source) -> Iterator[Trajectory]:
    """All trajectories of a source, in order.

    Raises:
        SourceError: one cannot be read.
    """
    trajectories = source.trajectories()
    while True:
        with reading(source.name):
            found = next(trajectories, None)
        if found is None:
            return
        yield found


def kept_transitions(name: str, observed: int, acted: int) -> tuple[int, bool]:
    """Transitions of which both ends were observed, and whether the last one is not among them.

    Args:
        name: of the episode.
        observed: how many observations there are.
        acted: how many actions.

    Raises:
        SourceError: the numbers do not belong together.
    """
    if observed - acted not in (0, 1):
        raise SourceError(
            f"{name} has {observed} observations and {acted} actions; there must be as many, or one observation more"
        )
    return max(0, observed - 1), observed == acted and acted > 0


def same_length(name: str, rows: int, **columns: Sized) -> None:
    """Refuse an episode whose columns have different lengths.

    Raises:
        SourceError: naming the columns.
    """
    if differ := {column: len(values) for column, values in columns.items() if len(values) != rows}:
        told = ", ".join(f"{column} {length}" for column, length in differ.items())
        raise SourceError(f"{name} has {rows} steps, but other lengths of {told}; mend it, or leave it out")


def picked(cameras: Sequence[str], asked: str | None, what: Path | str) -> str:
    """The camera to take: the one that is asked for, or the only one.

    Raises:
        SourceError: there is none, or several and none is asked for.
        UnknownNameError: there is no such camera.
    """
    if not cameras:
        raise SourceError(f"{what} has no frames; pvrpipe imports what was seen: record it with pictures")
    if asked is None:
        if len(cameras) > 1:
            raise SourceError(
                f"{what} has {len(cameras)} cameras: {', '.join(cameras)}; choose one by --camera"
            )
        return cameras[0]
    if asked not in cameras:
        raise UnknownNameError.among("camera", asked, cameras, hint=f"of {what}")
    return asked


def as_rgb(frames: Array, name: str) -> Frames:
    """Frames of any layout as (N, H, W, 3) uint8; gray is repeated, transparency left out.

    Raises:
        SourceError: these are no frames.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4):
        raise SourceError(
            f"{name} has frames of {frames.dtype} {list(frames.shape[1:])}; "
            "they must be bytes (H, W, 3), (3, H, W) or (H, W)"
        )
    if frames.ndim == 3:
        frames = frames[..., None]
    elif frames.shape[3] not in (1, 3, 4) and frames.shape[1] in (1, 3):
        frames = frames.transpose(0, 2, 3, 1)
    if frames.shape[3] not in (1, 3, 4):
        raise SourceError(f"{name} has frames of {frames.shape[3]} channels; they must have 1 (gray) or 3")
    return np.repeat(frames, 3, axis=3) if frames.shape[3] == 1 else frames[..., :3]


def is_picture(shape: Sequence[int], dtype: Any) -> bool:
    """Whether values of that shape (H, W), (H, W, C) or (C, H, W) can be frames."""
    if np.dtype(dtype) != np.uint8 or len(shape) not in (2, 3):
        return False
    return len(shape) == 2 or shape[2] in (1, 3, 4) or shape[0] in (1, 3)


def flat(values: Array) -> Array:
    """Rows (n, ...) as vectors (n, A), also where there are none."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def without_physics(vectors: Sequence[str]) -> list[str]:
    """Names of observed vectors, but for ``…physics`` where there is a ``…state``.

    So our own exports hold what a simulator is set to beside what is observed; it is no part of the state.
    """
    return [
        name
        for name in vectors
        if not (name.endswith("physics") and name.removesuffix("physics") + "state" in vectors)
    ]


def names_of(key: str, width: int) -> list[str]:
    """Names of the elements of a vector."""
    return [f"{key}[{index}]" for index in range(width)]


def required(module: str, what: str, extra: str) -> Any:
    """An optional library.

    Raises:
        MissingExtraError: it is not installed; names the extra that brings it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(f"{what} needs {module}; pip install 'pvrpipe[{extra}]'") from None


def opened_hdf5(path: Path) -> Any:
    """An HDF5 file, open for reading.

    Raises:
        MissingExtraError: h5py is not installed.
        SourceError: it is no whole HDF5 file, or has data in other files of the machine.
    """
    if path.is_dir():
        raise SourceError(f"{path} is a folder; give the HDF5 file in it")
    h5py = required("h5py", "reading HDF5", "convert")
    with reading(path):
        file = h5py.File(path, "r")
        file.visititems(partial(_refuse_elsewhere, path))
        return file


def _refuse_elsewhere(path: Path, name: str, found: Any) -> None:
    """A file may come from a stranger: what it says lies elsewhere on this machine is not read."""
    if getattr(found, "is_virtual", False) or getattr(found, "external", None):
        raise SourceError(
            f"{path} has its '{name}' in other files; copy the data into one (h5repack), or leave it out"
        )


def own_members(group: Any) -> list[str]:
    """Names in an HDF5 group that lie in this file: links into other files of the machine are not followed."""
    h5py = required("h5py", "reading HDF5", "convert")
    return [name for name in group if not isinstance(group.get(name, getlink=True), h5py.ExternalLink)]


def in_order(names: Collection[str], prefix: str) -> list[str]:
    """The names that are a prefix and a number, by that number."""
    numbered = [name for name in names if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
    return sorted(numbered, key=lambda name: int(name[len(prefix) :]))

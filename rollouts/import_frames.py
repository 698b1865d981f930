"""A folder of videos, or of folders of images, with a table (CSV or Parquet) of actions and rewards.

The table has a row per step, episodes in any order and each in its own; row i of an episode is what was done at its
frame i and what that led to::

    episode, action_0, action_1, …, reward[, terminated][, success][, state_0, …][, step][, frame]

``episode`` is the name of a video (with or without its suffix) or of a folder of images beside the table; without it
there is one episode. A single ``action`` of integers is one of several. With one frame more than rows, the last row's
transition is kept; with as many frames as rows it is left out, for what it led to was not seen. ``frame`` names an
image for each row, instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from pvrpipe.rollouts.import_source import (
    STEP_SECONDS,
    Array,
    Source,
    Trajectory,
    kept_transitions,
    reading,
)
from pvrpipe.rollouts.import_video import frames_in, frames_of, rate_of
from pvrpipe.schemas.errors import SourceError

TABLES = (".csv", ".parquet")
VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

Pictures = Path | list[Path]


def open_source(given: str, _: str | None) -> Source:
    """Open a folder.

    Raises:
        SourceError: it holds no such table, or more than one.
    """
    folder = Path(given)
    tables = [p for p in _files(folder) if p.suffix.lower() in TABLES]
    if len(tables) != 1:
        what = f"{len(tables)} tables" if tables else "no table"
        raise SourceError(
            f"{folder} holds {what} (.csv or .parquet) of actions and rewards; it must hold one"
        )
    with reading(tables[0]):
        table = _table(tables[0])
    actions, states = _numbered(table, "action"), _numbered(table, "state")
    if not actions or "reward" not in table.columns:
        raise SourceError(
            f"{tables[0]} needs columns 'action' (or 'action_0', …) and 'reward'; it has {table.columns}"
        )
    videos = [p for p in _files(folder) if p.suffix.lower() in VIDEOS]
    rate = rate_of(videos[0]) if videos and "frame" not in table.columns else None
    return Source(
        name=folder.absolute().name,
        trajectories=partial(_trajectories, folder, table, actions, states),
        camera="frame",
        state_names=tuple(states),
        packages=("av",) if rate else (),
        seconds=1 / rate if rate else STEP_SECONDS,
        has_success="success" in table.columns,
    )


def _files(folder: Path) -> list[Path]:
    """What lies in a folder, in order, but for what systems hide there."""
    return sorted((p for p in folder.glob("*") if not p.name.startswith(".")), key=_natural)


def _table(path: Path) -> pl.DataFrame:
    """A table with a column for each number of a vector.

    Of a CSV, names stay text (``007``), and all rows decide of what type a column is: rewards often begin with zeros.
    """
    if path.suffix.lower() == ".csv":
        text = {"episode": pl.String(), "frame": pl.String()}
        return pl.read_csv(path, infer_schema_length=None, schema_overrides=text)
    table = pl.read_parquet(path)
    for name in ("action", "state"):
        if name in table.columns and table[name].dtype.is_nested():
            elements = np.stack(table[name].to_list()).T
            series = [pl.Series(f"{name}_{i}", values) for i, values in enumerate(elements)]
            table = table.drop(name).hstack(series)
    return table


def _numbered(table: pl.DataFrame, name: str) -> list[str]:
    """Columns that are elements of a vector, in order; or the one that is the vector."""
    found = [c for c in table.columns if re.fullmatch(rf"{name}_\d+", c)]
    return sorted(found, key=lambda c: int(c.rpartition("_")[2])) or [c for c in table.columns if c == name]


def _trajectories(
    folder: Path, table: pl.DataFrame, actions: list[str], states: list[str]
) -> Iterator[Trajectory]:
    if "episode" not in table.columns:
        yield _trajectory(folder, "", table, actions, states)
        return
    for (name,), rows in table.group_by(["episode"], maintain_order=True):
        yield _trajectory(folder, str(name), rows, actions, states)


def _trajectory(
    folder: Path, episode: str, rows: pl.DataFrame, actions: list[str], states: list[str]
) -> Trajectory:
    if "step" in rows.columns:
        rows = rows.sort("step")
    name = f"episode {episode}" if episode else folder.name
    pictures: Pictures = (
        _inside(folder, rows["frame"].to_list()) if "frame" in rows.columns else _shown(folder, episode)
    )
    seen = len(pictures) if isinstance(pictures, list) else frames_in(pictures)
    length, cut = kept_transitions(name, seen, len(rows))
    taken = rows.head(length)
    if states and seen > len(rows):
        raise SourceError(
            f"{name} has a frame more than rows, so that nothing says its last state; leave the state columns out, "
            "or the last frame"
        )
    return Trajectory(
        name=name,
        action=_actions(taken, actions, name),
        reward=_column(taken, "reward", name),
        frames=partial(_frames, pictures, length + 1),
        state=np.stack([_column(rows, c, name) for c in states], axis=1) if states else None,
        success=_success(taken, name) if "success" in rows.columns else None,
        terminated=bool("terminated" in rows.columns and length and _column(taken, "terminated", name)[-1]),
        cut=cut,
    )


def _column(rows: pl.DataFrame, column: str, name: str) -> Array:
    """Numbers (n,); a cell without one is NaN, which is refused with its step."""
    with reading(f"column '{column}' of {name}"):
        if not (rows[column].dtype.is_numeric() or rows[column].dtype == pl.Boolean):
            raise ValueError(f"it holds {rows[column].dtype}, not numbers")
        return rows[column].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _actions(rows: pl.DataFrame, columns: list[str], name: str) -> Array:
    """(L, A), or (L,) integers of a single column of them."""
    if columns == ["action"] and rows["action"].dtype.is_integer() and not rows["action"].null_count():
        return rows["action"].to_numpy()
    return np.stack([_column(rows, column, name) for column in columns], axis=1)


def _success(rows: pl.DataFrame, name: str) -> Array:
    """(L + 1,): a step's success is that of what it led to."""
    return np.concatenate([[False], _column(rows, "success", name) > 0])


def _shown(folder: Path, episode: str) -> Pictures:
    """The video or the images of an episode."""
    place = _inside(folder, [episode])[0] if episode else folder
    if place.is_file():
        return place
    for suffix in VIDEOS if episode else ():
        video = place.with_name(place.name + suffix)
        if video.is_file():
            return video
    within = _files(place) if place.is_dir() else []
    images = [p for p in within if p.suffix.lower() in IMAGES]
    videos = [p for p in within if p.suffix.lower() in VIDEOS]
    if images:
        return images
    if len(videos) == 1:
        return videos[0]
    raise SourceError(
        f"there are no frames in {place}: neither a video of that name nor a folder of images; add them"
    )


def _natural(path: Path) -> list[int | str]:
    """So that ``frame_2`` is before ``frame_10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _inside(folder: Path, names: list[str]) -> list[Path]:
    """Paths below the folder; a table may come from a stranger."""
    paths = [folder / str(name) for name in names]
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SourceError(f"the table names {path}, which is not in {folder}; copy it there")
    return paths


def _frames(pictures: Pictures, count: int) -> Array:
    if isinstance(pictures, Path):
        return frames_of(pictures, count)
    held = []
    for path in pictures:
        with reading(path), Image.open(path) as image:
            if image.mode[0] in "IF":
                raise SourceError(f"{path} has {image.mode} pixels; frames are of bytes: convert them")
            held.append(np.asarray(image.convert("RGB")))
    return np.stack(held)

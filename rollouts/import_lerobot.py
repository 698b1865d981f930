"""LeRobotDataset v3: a folder with ``meta/info.json``, its frames as images in Parquet or as video.

``meta/episodes/`` says where each episode lies: its ``length`` L, its file in ``data/``, and of each camera its file in
``videos/`` and from which second on. Row i is the observation, the action taken from it and ``next.reward`` for that;
what the last action led to is not there, so that transition is left out and no row of such a store is terminal. Where
there is no ``next.reward`` (demonstrations), rewards are 0. Read with pyarrow and PyAV.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pvrpipe.rollouts.import_source import (
    Array,
    Source,
    Trajectory,
    flat,
    kept_transitions,
    names_of,
    picked,
    reading,
    same_length,
    without_physics,
)
from pvrpipe.rollouts.import_video import frames_in, frames_of
from pvrpipe.schemas.errors import SourceError

INFO = "meta/info.json"
REWARD, SUCCESS = "next.reward", "next.success"
NUMBERS = re.compile(r"(float|int|uint)\d+")

Info = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class _Layout:
    """What of the data set is read, and where it is."""

    folder: Path
    info: Info
    camera: str
    states: tuple[str, ...]

    @property
    def features(self) -> Info:
        features: Info = self.info["features"]
        return features

    @property
    def is_video(self) -> bool:
        return bool(self.features[self.camera]["dtype"] == "video")

    def file(self, pattern: str, row: Row, prefix: str) -> Path:
        """A file of an episode, which must be in the folder."""
        chunk, file = (int(row[f"{prefix}/{what}_index"]) for what in ("chunk", "file"))
        path = self.folder / pattern.format(chunk_index=chunk, file_index=file, video_key=self.camera)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise SourceError(f"{self.folder / INFO} names a file outside of its folder: {path}")
        return path


def open_source(given: str, camera: str | None) -> Source:
    """Open a folder.

    Raises:
        SourceError: it holds no LeRobotDataset, or one of another version.
    """
    folder = Path(given)
    if not (folder / INFO).is_file():
        raise SourceError(f"{folder} is no LeRobot data set: it has no {INFO}; give its folder")
    with reading(folder / INFO):
        info = json.loads((folder / INFO).read_text())
        version, features = str(info["codebase_version"]), info["features"]
        rate = float(info["fps"])
        if not 0 < rate < math.inf:
            raise ValueError(f"fps is {info['fps']}")
    if not version.startswith("v3."):
        raise SourceError(
            f"{folder} is of LeRobotDataset {version}, v3 is read here; bring it there with "
            "`python -m lerobot.datasets.v30.convert_dataset_v21_to_v30`"
        )
    if "action" not in features:
        raise SourceError(f"{folder} has no feature 'action'; there is nothing to import")
    shown = {_short(k): k for k, f in features.items() if f["dtype"] in ("image", "video")}
    label = picked(list(shown), camera, folder)
    states = without_physics(
        [k for k, f in features.items() if k.startswith("observation.") and _is_vector(f)]
    )
    layout = _Layout(folder, info, shown[label], tuple(states))
    return Source(
        name=folder.absolute().name,
        trajectories=partial(_trajectories, layout),
        camera=label,
        state_names=tuple(n for key in states for n in _element_names(key, features[key])),
        packages=("av",) if layout.is_video else (),
        seconds=1 / rate,
        has_success=SUCCESS in features,
        remarks=() if REWARD in features else (f"{folder} has no {REWARD}: all rewards are 0",),
    )


def _short(key: str) -> str:
    return key.removeprefix("observation.").removeprefix("images.")


def _is_vector(feature: Info) -> bool:
    return NUMBERS.fullmatch(str(feature["dtype"])) is not None and len(feature["shape"]) == 1


def _element_names(key: str, feature: Info) -> list[str]:
    """What the data set calls the elements of a vector, if it says so."""
    width, told = int(feature["shape"][0]), feature.get("names")
    if isinstance(told, list) and len(told) == width:
        return [f"{_short(key)}.{name}" for name in told]
    return names_of(_short(key), width)


class _Files:
    """The files of a data set, read forwards: the row group that was read last is kept, for many episodes share one."""

    def __init__(self) -> None:
        self._frames: dict[Path, int] = {}
        self._groups: dict[tuple[str, ...], tuple[Path, int, pa.Table]] = {}  # of some columns, the last one
        self._spans: tuple[Path, list[tuple[int, int]]] = (Path(), [])

    def frames_in(self, video: Path) -> int:
        """Frames of a video."""
        if video not in self._frames:
            self._frames[video] = frames_in(video)
        return self._frames[video]

    def rows(self, path: Path, episode: int, columns: list[str]) -> pa.Table:
        """Rows of an episode, in order."""
        wanted = (*columns, "episode_index", "frame_index")
        with reading(path):
            if self._spans[0] != path:
                self._spans = path, _spans(path)
            held = [i for i, (low, high) in enumerate(self._spans[1]) if low <= episode <= high]
            parts = [self._group(path, index, wanted) for index in held]
            if not parts:
                raise ValueError(f"episode {episode} is not in it")
            chosen = [part.filter(pc.equal(part["episode_index"], episode)) for part in parts]
            return pa.concat_tables(chosen).sort_by("frame_index")

    def _group(self, path: Path, index: int, columns: tuple[str, ...]) -> pa.Table:
        kept = self._groups.get(columns)
        if kept is None or kept[:2] != (path, index):
            self._groups.pop(columns, None)
            kept = path, index, pq.ParquetFile(path).read_row_group(index, list(columns))
            self._groups[columns] = kept
        return kept[2]


def _spans(path: Path) -> list[tuple[int, int]]:
    """First and last episode of each row group; any, where the file does not say."""
    metadata = pq.ParquetFile(path).metadata
    column = metadata.schema.names.index("episode_index")
    found = [metadata.row_group(group).column(column).statistics for group in range(metadata.num_row_groups)]
    return [(told.min, told.max) if told is not None and told.has_min_max else (0, 1 << 62) for told in found]


def _trajectories(layout: _Layout) -> Iterator[Trajectory]:
    files, wanted = _Files(), int(layout.info["total_episodes"])
    there = 0
    for there, row in enumerate(_episodes(layout.folder), 1):
        if int(row["episode_index"]) != there - 1:
            raise SourceError(
                f"{layout.folder}/meta/episodes has episode {row['episode_index']} where {there - 1} is to come; "
                "get it again"
            )
        yield _trajectory(layout, row, files)
    if there != wanted:
        raise SourceError(
            f"{layout.folder}/meta/episodes has {there} episodes, {INFO} says {wanted}; get it again"
        )


def _episodes(folder: Path) -> Iterator[Row]:
    """What ``meta/episodes`` says of each, in order."""
    files = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise SourceError(f"{folder} has no meta/episodes; get it again")
    for file in files:
        with reading(file):
            table = pq.read_table(file)
            columns = [
                n
                for n in table.column_names
                if n in ("episode_index", "length") or n.startswith(("data/", "videos/"))
            ]
            rows = table.select(columns).sort_by("episode_index").to_pylist()
        yield from rows


def _trajectory(layout: _Layout, row: Row, files: _Files) -> Trajectory:
    number, rows = int(row["episode_index"]), int(row["length"])
    name = f"episode {number}"
    path = layout.file(layout.info["data_path"], row, "data")
    wanted = [k for k in ("action", *layout.states, REWARD, SUCCESS) if k in layout.features]
    table = files.rows(path, number, wanted)
    with reading(path):
        told = {key: _array(table[key]) for key in wanted}
    same_length(name, rows, **told)
    length, cut = kept_transitions(name, rows, rows)
    one_of_several = told["action"].dtype.kind in "iu" and list(layout.features["action"]["shape"]) == [1]
    action = told["action"].reshape(rows) if one_of_several else flat(told["action"])
    if layout.is_video:
        video = layout.file(layout.info["video_path"], row, f"videos/{layout.camera}")
        start, rate = float(row[f"videos/{layout.camera}/from_timestamp"]), float(layout.info["fps"])
        if not start >= 0:
            raise SourceError(f"{name} begins at second {start} of {video}; get meta/episodes again")
        if round(start * rate) + rows > files.frames_in(video):
            raise SourceError(
                f"{video} has {files.frames_in(video)} frames, but {name} ends behind them; get it again"
            )
        frames = partial(frames_of, video, rows, start, rate)
    else:
        frames = partial(_images, files, path, number, layout.camera)
    return Trajectory(
        name=name,
        action=action[:length],
        reward=told[REWARD].reshape(-1)[:length] if REWARD in told else np.zeros(length, np.float32),
        frames=frames,
        state=np.concatenate([flat(told[k]) for k in layout.states], axis=1) if layout.states else None,
        success=np.concatenate([[False], told[SUCCESS].reshape(-1)[:length]]) if SUCCESS in told else None,
        cut=cut,
    )


def _array(column: pa.ChunkedArray) -> Array:
    """Numbers, or lists of numbers of one length."""
    return np.asarray(column.to_pylist()) if pa.types.is_nested(column.type) else column.to_numpy()


def _images(files: _Files, path: Path, episode: int, camera: str) -> Array:
    """Pictures (L, H, W, C), stored as the bytes of files."""
    pictures = files.rows(path, episode, [camera])[camera].to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(p["bytes"])).convert("RGB")) for p in pictures])

"""A LeRobot dataset, version 3.0, with images in its Parquet files and no video.

::

    meta/info.json, meta/stats.json, meta/tasks.parquet
    meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet

Written with pyarrow, since the requirements of the ``lerobot`` package (torch below 2.11) do not fit beside ours;
``tests/test_store_lerobot.py`` reads it with lerobot 0.4.4 in a venv of its own.
LeRobot knows no row after the last action: row t is the observation, the action taken from it, ``next.reward`` and
``next.done``, and the last observation of an episode is left out. Statistics of images are of a few frames.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pvrpipe.schemas.manifest import Column
from pvrpipe.schemas.progress import Progress
from pvrpipe.store.columns import BOUNDS, column
from pvrpipe.store.export_tables import as_lists, is_image, list_type
from pvrpipe.store.moments import RunningMoments, statistics_of
from pvrpipe.store.selection import Selection
from pvrpipe.store.shards import Rows

VERSION = "v3.0"
FILE_BYTES = 100 << 20  # of values, before compression
FILES_PER_CHUNK = 1000
FILE = "chunk-{chunk:03d}/file-{file:03d}.parquet"
NAMES = {"frame": "observation.image", "state": "observation.state", "action": "action"}
LEFT_OUT = {"reward", *(c.name for c in BOUNDS)}  # said by next.reward, next.done and the indices
INDICES = ("frame_index", "episode_index", "index", "task_index")
IMAGE_SAMPLE = 8  # frames of an episode that count for the statistics of images


def write_lerobot(selection: Selection, folder: Path, progress: Progress) -> None:
    """Write the folder; memory holds one episode."""
    (folder / "meta").mkdir(parents=True)
    statistics = {name: FeatureStatistics() for name in _features(selection)}
    places, frames = [], 0
    for index, numbers in enumerate(_files(selection)):
        chunk, file = divmod(index, FILES_PER_CHUNK)
        path = folder / "data" / FILE.format(chunk=chunk, file=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, _schema(selection), compression="snappy") as writer:
            for number in numbers:
                values = _episode(selection, number, frames)
                writer.write_table(_table(selection, values))
                for name, known in statistics.items():
                    known.add(values[name])
                places.append((number, chunk, file, frames))
                frames += selection.records[number].length
                progress(frames + len(places), selection.total_rows, f"episode {number}")
    _write_meta(selection, folder / "meta", places, frames)
    told = {name: known.told() for name, known in statistics.items()}
    (folder / "meta" / "stats.json").write_text(json.dumps(told, indent=1))


class FeatureStatistics:
    """Mean, deviation and range of a feature over all frames; of images per channel, between 0 and 1."""

    def __init__(self) -> None:
        self._moments: RunningMoments | None = None
        self._range: tuple[Rows, Rows] | None = None
        self._image = False

    def add(self, rows: Rows) -> None:
        """The rows (n, ...) of one episode."""
        self._image = rows.dtype == np.uint8 and rows.ndim == 4
        flat = _sampled(rows) if self._image else rows.reshape(len(rows), -1).astype(np.float64)
        self._moments = self._moments or RunningMoments(flat.shape[-1])
        self._moments.add(flat)
        low, high = flat.min(axis=0), flat.max(axis=0)
        if self._range is not None:
            low, high = np.minimum(low, self._range[0]), np.maximum(high, self._range[1])
        self._range = low, high

    def told(self) -> dict[str, Any]:
        """As ``stats.json`` has it; per channel means (C, 1, 1)."""
        assert self._moments is not None
        assert self._range is not None
        known = statistics_of(self._moments.told())
        values: dict[str, Any] = {
            "mean": known.mean,
            "std": known.std,
            "min": self._range[0],
            "max": self._range[1],
        }
        shape = (-1, 1, 1) if self._image else (-1,)
        return {k: np.asarray(v).reshape(shape).tolist() for k, v in values.items()} | {
            "count": [known.count]
        }


def _sampled(frames: Rows) -> Rows:
    """Pixels (n, C) of a few frames."""
    picked = frames[np.unique(np.linspace(0, len(frames) - 1, IMAGE_SAMPLE).astype(int))]
    return picked.reshape(-1, picked.shape[-1]) / np.float64(255)


def _features(selection: Selection) -> dict[str, Column]:
    """Feature → what its values are."""
    kept = [_as_declared(c) for c in selection.columns if c.name not in LEFT_OUT]
    features = {NAMES.get(c.name, f"observation.{c.name}"): c for c in kept}
    features |= {"next.reward": column("reward", "float32", ()), "next.done": column("done", "bool", ())}
    return features | {"timestamp": column("timestamp", "float32", ())}


def _as_declared(c: Column) -> Column:
    """LeRobot reads what is declared with shape (1,) as a number, not as a list of one."""
    return c.model_copy(update={"shape": ()}) if c.shape == (1,) else c


def _episode(selection: Selection, number: int, first: int) -> dict[str, Rows]:
    """The frames of an episode, feature by feature."""
    rows, record = selection.rows(number), selection.records[number]
    step = np.arange(record.length)
    values: dict[str, Rows] = {
        name: rows[c.name][:-1] for name, c in _features(selection).items() if c.name in rows
    }
    values["next.reward"] = rows["reward"][1:]
    values["next.done"] = step == record.length - 1
    values["timestamp"] = (step * selection.store.manifest.rollouts.control_timestep).astype(np.float32)
    indices = (step, np.full_like(step, number), first + step, np.zeros_like(step))
    return values | dict(zip(INDICES, indices, strict=True))


def _schema(selection: Selection) -> pa.Schema:
    fields = [pa.field(name, list_type(c)) for name, c in _features(selection).items()]
    return pa.schema([*fields, *(pa.field(name, pa.int64()) for name in INDICES)])


def _table(selection: Selection, values: dict[str, Rows]) -> pa.Table:
    arrays = [as_lists(c, values[name]) for name, c in _features(selection).items()]
    arrays += [pa.array(values[name], pa.int64()) for name in INDICES]
    return pa.Table.from_arrays(arrays, schema=_schema(selection))


def _files(selection: Selection) -> list[list[int]]:
    """Which episodes go to which data file."""
    width = sum(c.width for c in selection.columns)
    files: list[list[int]] = [[]]
    held = 0
    for number, record in enumerate(selection.records):
        if files[-1] and held + record.length * width > FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(number)
        held += record.length * width
    return files


def _write_meta(
    selection: Selection, meta: Path, places: list[tuple[int, int, int, int]], frames: int
) -> None:
    """``info.json``, the one task, and where each episode lies."""
    made = selection.store.manifest.rollouts
    info = {
        "codebase_version": VERSION,
        "robot_type": made.environment,
        "total_episodes": len(selection),
        "total_frames": frames,
        "total_tasks": 1,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": FILE_BYTES >> 20,
        "video_files_size_in_mb": 200,
        "fps": max(1, round(1 / made.control_timestep)),
        "splits": {"train": f"0:{len(selection)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": _told_features(selection),
    }
    (meta / "info.json").write_text(json.dumps(info, indent=1))
    pq.write_table(_tasks(made.environment), meta / "tasks.parquet")
    episodes = [
        {
            "episode_index": number,
            "tasks": [made.environment],
            "length": selection.records[number].length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": first,
            "dataset_to_index": first + selection.records[number].length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for number, chunk, file, first in places
    ]
    path = meta / "episodes" / FILE.format(chunk=0, file=0)
    path.parent.mkdir(parents=True)
    pl.DataFrame(episodes).write_parquet(path)


def _told_features(selection: Selection) -> dict[str, Any]:
    """``features`` of ``info.json``."""
    told: dict[str, Any] = {}
    for name, c in _features(selection).items():
        names = ["height", "width", "channels"] if is_image(c) else None
        kind = "image" if is_image(c) else c.dtype
        told[name] = {"dtype": kind, "shape": list(c.shape) or [1], "names": names}
    return told | {name: {"dtype": "int64", "shape": [1], "names": None} for name in INDICES}


def _tasks(task: str) -> pa.Table:
    """The table of tasks, with the task as the index that pandas reads."""
    index, number = "__index_level_0__", "task_index"
    columns = [
        {
            "name": number,
            "field_name": number,
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {
            "name": None,
            "field_name": index,
            "pandas_type": "unicode",
            "numpy_type": "object",
            "metadata": None,
        },
    ]
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns}
    schema = pa.schema([(number, pa.int64()), (index, pa.string())], {"pandas": json.dumps(pandas)})
    return pa.Table.from_arrays([pa.array([0]), pa.array([task])], schema=schema)

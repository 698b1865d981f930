"""Plain Parquet with list columns and PNG images, for the viewer of the Hugging Face Hub and any table tool.

::

    README.md                     configs: which files are train, which validation
    data/train-00000.parquet      rows of whole episodes, one row group each
    data/validation-00000.parquet
    episodes.parquet

Such a file is many times slower to read than a store; it is for looking, not for training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pvrpipe.schemas.manifest import Column
from pvrpipe.schemas.progress import Progress
from pvrpipe.store.card import front_matter
from pvrpipe.store.export_tables import as_lists, is_image, list_type, write_episode_table
from pvrpipe.store.planning import ROWS_WANTED
from pvrpipe.store.selection import Selection

SPLITS = {"train": "train", "val": "validation"}  # as the Hub calls them


def write_lists(selection: Selection, folder: Path, progress: Progress) -> None:
    """Write the folder; memory holds one episode."""
    (folder / "data").mkdir(parents=True)
    done = 0
    for split in SPLITS:
        for index, numbers in enumerate(_files(selection, split)):
            name = f"{SPLITS[split]}-{index:05d}.parquet"
            with pq.ParquetWriter(folder / "data" / name, _schema(selection), compression="zstd") as file:
                for number in numbers:
                    file.write_table(_table(selection, number))
                    done += selection.records[number].rows
                    progress(done, selection.total_rows, name)
    write_episode_table(selection, folder / "episodes.parquet")
    present = [name for split, name in SPLITS.items() if any(_files(selection, split))]
    (folder / "README.md").write_text(_readme(selection, present))


def _files(selection: Selection, split: str) -> list[list[int]]:
    """The episodes of a split, by file."""
    files: list[list[int]] = []
    rows = ROWS_WANTED
    for number, record in enumerate(selection.records):
        if record.split != split:
            continue
        if rows >= ROWS_WANTED:
            files.append([])
            rows = 0
        files[-1].append(number)
        rows += record.rows
    return files


def _schema(selection: Selection) -> pa.Schema:
    features = {c.name: _feature(c) for c in selection.columns}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field(c.name, list_type(c)) for c in selection.columns], metadata)


def _feature(column: Column) -> Any:
    """What the Hub is to take a column for."""
    feature: Any = {"dtype": column.dtype, "_type": "Value"}
    for _ in column.shape:
        feature = [feature]
    return {"_type": "Image"} if is_image(column) else feature


def _table(selection: Selection, number: int) -> pa.Table:
    rows = selection.rows(number)
    arrays = [as_lists(c, rows[c.name]) for c in selection.columns]
    return pa.Table.from_arrays(arrays, schema=_schema(selection))


def _readme(selection: Selection, splits: list[str]) -> str:
    manifest = selection.store.manifest
    files = [{"split": name, "path": f"data/{name}-*.parquet"} for name in splits]
    return f"""{front_matter(manifest, [{"config_name": "default", "data_files": files}])}
# {manifest.rollouts.environment}, {manifest.kind}, as plain tables

Exported from store `{manifest.id}` by `pvrpipe convert --to parquet-lists`; how it was made is in
`provenance.json`.
"""

"""A folder of one ``.npy`` file per column, all episodes one behind the other, and ``episodes.parquet``.

``numpy.load("embedding.npy", mmap_mode="r")[row_first : row_first + rows]`` is an episode; ``row_first`` and
``rows`` are columns of the episode table.
"""

from __future__ import annotations

from pathlib import Path

from numpy.lib import format as npy

from pvrpipe.schemas.progress import Progress
from pvrpipe.store.export_tables import write_episode_table
from pvrpipe.store.selection import Selection


def write_npy(selection: Selection, folder: Path, progress: Progress) -> None:
    """Write the folder; memory holds one episode."""
    folder.mkdir()
    total = selection.total_rows
    files = {
        c.name: npy.open_memmap(
            folder / f"{c.name}.npy", mode="w+", dtype=c.dtype, shape=(total, *c.shape), version=(1, 0)
        )
        for c in selection.columns
    }
    first = 0
    for number, record in enumerate(selection.records):
        for name, rows in selection.rows(number).items():
            files[name][first : first + record.rows] = rows
        first += record.rows
        progress(first, total, f"episode {number}")
    for file in files.values():
        file.flush()
    write_episode_table(selection, folder / "episodes.parquet")

"""One HDF5 file with a group per episode.

::

    /                      attributes: format "pvrpipe-hdf5", episodes, rows
    /provenance            the manifest of the store, JSON
    /episodes/000000012    attributes: what is known of the episode
        action             (L+1, A) float32
        embedding          (L+1, D) float16
        …
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvrpipe.schemas.errors import MissingDriverError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.progress import Progress
from pvrpipe.store.selection import Selection
from pvrpipe.store.webdataset import PLACE


def h5py_or_cure() -> Any:
    """The library that writes HDF5.

    Raises:
        MissingDriverError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise MissingDriverError("HDF5 needs h5py; pip install 'pvrpipe[convert]'") from None
    return h5py


def write_hdf5(selection: Selection, path: Path, progress: Progress) -> None:
    """Write the file; memory holds one episode."""
    done = 0
    with h5py_or_cure().File(path, "w", libver="latest") as file:
        file.attrs.update(
            {"format": "pvrpipe-hdf5", "episodes": len(selection), "rows": selection.total_rows}
        )
        file["provenance"] = canonical_json(selection.store.manifest.model_dump(mode="json"))
        for number, record in enumerate(selection.records):
            group = file.create_group(f"episodes/{number:09d}")
            group.attrs.update({k: v for k, v in record.row().items() if k not in PLACE})
            for name, rows in selection.rows(number).items():
                group.create_dataset(name, data=rows)
            done += record.rows
            progress(done, selection.total_rows, f"episode {number}")

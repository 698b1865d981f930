"""Exports: the episodes of a store in a layout that others read. They are whole or not there at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pvrpipe.schemas.errors import OutputExistsError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.progress import Progress
from pvrpipe.store.export_hdf5 import write_hdf5
from pvrpipe.store.export_lerobot import write_lerobot
from pvrpipe.store.export_lists import write_lists
from pvrpipe.store.export_minari import write_minari
from pvrpipe.store.export_npy import write_npy
from pvrpipe.store.files import TEMPORARY, disk_errors, locked, make_folder, sync_folder
from pvrpipe.store.places import refuse_source
from pvrpipe.store.selection import Selection

Layout = Literal["parquet-lists", "npy", "hdf5", "minari", "lerobot"]
#: Each writes a selection to a path that is not there yet, as a file or a folder, and tells rows.
WRITERS: dict[str, Callable[[Selection, Path, Progress], None]] = {
    "parquet-lists": write_lists,
    "npy": write_npy,
    "hdf5": write_hdf5,
    "minari": write_minari,
    "lerobot": write_lerobot,
}
PROVENANCE = "provenance.json"  # in a folder that was exported: the manifest of the store it came from


@dataclass(frozen=True)
class Exported:
    """What was exported, and what it cost."""

    store: Path
    """the file or folder that was written"""
    id: str
    """of the store it was made from"""
    kind: str
    format: str
    episodes: int
    rows: int
    files: int
    bytes: int
    licence: str | None
    seconds: float


def export(selection: Selection, out: Path, layout: Layout, progress: Progress) -> Exported:
    """Write an export beside its place and move it there when it is whole; one that was killed begins anew.

    Raises:
        OutputExistsError: something is there; it is left as it is.
        StoreBusyError: another process writes the same export.
        MissingDriverError: the library that writes it is not installed.
    """
    began = time.monotonic()
    for store in selection.stores:
        refuse_source(store.path, out)
    if out.exists():
        raise OutputExistsError(f"{out} exists; choose another output, or remove it first")
    make_folder(out.parent)
    workplace = out.with_name(f"{out.name}{TEMPORARY}export")
    with disk_errors(workplace):
        workplace.mkdir(exist_ok=True)
        with locked(workplace):
            try:
                return _export(selection, out, layout, workplace, progress, began)
            finally:
                shutil.rmtree(workplace)


def _export(
    selection: Selection, out: Path, layout: Layout, workplace: Path, progress: Progress, began: float
) -> Exported:
    for left in workplace.iterdir():  # by a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    whole = workplace / "whole"
    WRITERS[layout](selection, whole, progress)
    if whole.is_dir():
        write_provenance(selection, whole)
    paths = [path for path in (whole, *whole.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in paths]
    for path in (*paths, *(p for p in (whole, *whole.rglob("*")) if p.is_dir())):
        sync_folder(path)
    whole.rename(out)
    sync_folder(out.parent)
    manifest = selection.store.manifest
    made = selection.parts[0].specification
    return Exported(
        store=out,
        id=str(manifest.id),
        kind=manifest.kind,
        format=layout,
        episodes=len(selection),
        rows=selection.total_rows,
        files=len(paths),
        bytes=sum(sizes),
        licence=made.encoder.weights.licence if made.kind == "embeddings" else None,
        seconds=time.monotonic() - began,
    )


def write_provenance(selection: Selection, folder: Path) -> None:
    """The store's manifest, so that how it was made travels with it."""
    (folder / PROVENANCE).write_text(canonical_json(selection.store.manifest.model_dump(mode="json")))

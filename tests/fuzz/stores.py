"""The valid stores that a fuzz run starts from: small, and of every kind that a stranger may hand over."""

from __future__ import annotations

from pathlib import Path

from pvrpipe.store.publishing import write_cards

from ..conftest import write_store
from ..embedded import write_embeddings
from ..test_store_growing import grow

Files = dict[str, bytes]


def make_stores(folder: Path) -> list[Files]:
    """Name → bytes of every file of each store. The order counts: an input's first byte chooses by it."""
    made = [
        write_cards(write_store(folder / "rollouts", (5, 4, 6))).store,
        write_store(folder / "tars", (5, 4), shard_format="webdataset"),
        write_cards(write_embeddings(folder / "embeddings", (9, 8))).store,
        write_embeddings(folder / "embedded-tars", (9, 8), shard_format="webdataset", dtype="float16"),
        _grown(folder / "grown"),
    ]
    return [read_files(store) for store in made]


def read_files(folder: Path) -> Files:
    """Name → bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _grown(folder: Path) -> Path:
    write_store(folder, (5, 4))
    grow(folder, (6,))
    return folder

"""Where weights are kept on this machine; loads no torch, so that a list of them is quick."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pvrpipe.pipeline.pvrs import Pvr
from pvrpipe.store.cache import cache_folder


def download_target(pvr: Pvr) -> Path:
    """Where the file from an address is kept: by the address, as anyone's specification may have any name."""
    address = hashlib.sha256((pvr.source.url or "").encode()).hexdigest()
    return cache_folder() / "weights" / address[:16] / (Path(pvr.source.file).name.strip(".") or "weights")


def cached_weights(pvr: Pvr) -> Path | None:
    """The published file, if it is on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    if pvr.source.repo:
        found = try_to_load_from_cache(pvr.source.repo, pvr.source.file, revision=pvr.source.revision)
        return Path(found) if isinstance(found, str) else None
    target = download_target(pvr)
    return target if pvr.source.url and target.is_file() else None

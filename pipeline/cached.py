"""Where weights are kept on this machine; loads no torch, so that a list of them is quick."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pvrpipe.pipeline.pvrs import Pvr
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.store.cache import cache_folder


def download_target(pvr: Pvr) -> Path:
    """Where a file from an address is kept.

    Of a specification of one's own by that address: another may have its name, or it another address tomorrow, and
    wherever it says that the file is, it is kept here.
    """
    folder, source = cache_folder() / "weights", pvr.source
    if pvr.name in PVRS and PVRS[pvr.name].source == source:
        return folder / pvr.name / source.file
    digest = hashlib.sha256(str(source.url).encode()).hexdigest()[:16]
    return folder / digest / (Path(source.file).name.strip(".") or "weights")


def cached_weights(pvr: Pvr) -> Path | None:
    """The published file, if it is on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    if pvr.source.repo:
        found = try_to_load_from_cache(pvr.source.repo, pvr.source.file, revision=pvr.source.revision)
        return Path(found) if isinstance(found, str) else None
    target = download_target(pvr)
    return target if pvr.source.url and target.is_file() else None

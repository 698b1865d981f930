"""Golden frames: a few frames with their embeddings, by which another machine can check its encoder."""

from __future__ import annotations

import numpy as np
import safetensors
import safetensors.numpy

from pvrpipe.schemas.errors import CorruptStoreError, one_line
from pvrpipe.store.layout import GOLDEN
from pvrpipe.store.reading import Store
from pvrpipe.store.selection import Selection
from pvrpipe.store.shards import Rows

NAMES = ("frame", "embedding", "row")


def read_golden(store: Store) -> dict[str, Rows] | None:
    """``frame`` (n, H, W, 3), ``embedding`` (n, *shape) and perhaps ``row`` of a store that has golden frames.

    Raises:
        CorruptStoreError: they are not what the manifest promises.
    """
    made = store.manifest.embeddings
    if made is None or GOLDEN not in store.manifest.files:
        return None
    with store.file(GOLDEN) as path:
        try:
            found = safetensors.numpy.load_file(path)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CorruptStoreError(f"{store.path}: {GOLDEN} cannot be read ({one_line(error)})") from None
    frames, stored, rows = found.get("frame"), found.get("embedding"), found.get("row")
    fits = (
        frames is not None
        and stored is not None
        and frames.dtype == np.uint8
        and frames.ndim == 4
        and stored.dtype == made.dtype
        and stored.shape == (len(frames), *made.encoder.shape)
        and len(frames) > 0
        and (rows is None or (rows.shape == (len(frames),) and rows.dtype.kind == "i"))
    )
    if not fits:
        raise CorruptStoreError(
            f"{store.path}: {GOLDEN} does not hold frames and embeddings; run `pvrpipe verify`"
        )
    return {name: found[name] for name in NAMES if name in found}


def golden_of(selection: Selection) -> dict[str, Rows] | None:
    """The first store's golden frames; their rows only where all of them are in the selection."""
    golden = read_golden(selection.store)
    if golden is None:
        return None
    nowhere = np.zeros(len(golden["frame"]), np.int64)
    rows = {"episode": nowhere, "step": golden.get("row", nowhere)}
    golden["embedding"] = selection.cast(golden["embedding"], rows, f"{selection.store.path}/{GOLDEN}")
    found = _renumbered(golden.pop("row", None), selection)
    return golden if found is None else {**golden, "row": found}


def _renumbered(golden: Rows | None, selection: Selection) -> Rows | None:
    """Rows of the first store as rows of the selection, or None if some are not in it."""
    if golden is None:
        return None
    rows = golden.astype(np.int64)
    table = selection.store.episodes
    first, length = table["row_first"].to_numpy().astype(np.int64), table["rows"].to_numpy().astype(np.int64)
    episode = np.searchsorted(first, rows, "right") - 1
    starts, at = {}, 0
    for number, (store, chosen) in enumerate(selection.chosen):
        if store is selection.store:
            starts[chosen] = at
        at += selection.records[number].rows
    if not {int(e) for e in episode} <= starts.keys() or (rows - first[episode] >= length[episode]).any():
        return None
    begin = np.array([starts[int(e)] for e in episode], np.int64)
    return np.asarray(begin + rows - first[episode], np.int64)

"""Golden frames: a few frames with their embeddings, by which another machine can check its encoder."""

from __future__ import annotations

import numpy as np
import safetensors
import safetensors.numpy

from pvrpipe.schemas.errors import CorruptStoreError
from pvrpipe.store.layout import GOLDEN
from pvrpipe.store.reading import Store
from pvrpipe.store.selection import Selection
from pvrpipe.store.shards import Rows


def golden_frames(store: Store) -> dict[str, Rows] | None:
    """``frame``, ``embedding`` and ``row`` (of the store) of a store that has them.

    Raises:
        CorruptStoreError: they cannot be read, or are not alike in number.
    """
    if GOLDEN not in store.manifest.files:
        return None
    with store.file(GOLDEN) as path:
        try:
            golden = safetensors.numpy.load_file(path)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CorruptStoreError(f"{path} cannot be read ({error}); get the store again") from None
    numbers = {len(array) for array in golden.values() if array.ndim}
    if not {"frame", "embedding"} <= golden.keys() or len(numbers) != 1:
        raise CorruptStoreError(f"{store.path}/{GOLDEN} does not hold frames and embeddings; get it again")
    return golden


def golden_of(selection: Selection) -> dict[str, Rows] | None:
    """The first store's golden frames; their rows only where all of them are in the selection."""
    golden = golden_frames(selection.store)
    if golden is None:
        return None
    nowhere = np.zeros(len(golden["frame"]), np.int64)
    rows = {"episode": nowhere, "step": golden.get("row", nowhere)}
    golden["embedding"] = selection.cast(golden["embedding"], rows, f"{selection.store.path}/{GOLDEN}")
    found = _renumbered(golden.pop("row", None), selection)
    return golden if found is None else {**golden, "row": found}


def _renumbered(golden: Rows | None, selection: Selection) -> Rows | None:
    """Rows of the first store as rows of the selection, or None if some are not in it."""
    if golden is None or not len(golden) or golden.dtype.kind != "i":
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

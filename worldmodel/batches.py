"""Embedding windows as the tensors a world model trains on, and how long it had to wait for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError
from pvrpipe.store import gathering
from pvrpipe.store.loading import WindowLoader
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows
from pvrpipe.store.windows import WindowSampler

Backing = Literal["auto", "mapped", "ram", "device"]
COLUMNS = ("embedding", "action", "reward", "is_first", "is_terminal")
WIDEST = 1 << 15  # numbers in one row's embedding; beyond that a linear map is not the way to read it


def open_embeddings(path: Path | str) -> Store:
    """Open an embedding store.

    Raises:
        NotAStoreError: nothing there, or a rollout store.
        InvalidValueError: its rows are too wide to be taken as one vector.
    """
    store = Store.open(path, prove=True)
    if store.manifest.kind != "embeddings":
        raise NotAStoreError(
            f"{path} holds frames, not embeddings; first run `pvrpipe embed {path} --pvr NAME`"
        )
    if (width := embedding_width(store)) > WIDEST:
        raise InvalidValueError(
            f"{path}: {width} numbers per row are too wide for a linear map (at most {WIDEST}); "
            "embed with a PVR that gives one vector per frame"
        )
    return store


def embedding_width(store: Store) -> int:
    """Numbers in one row's embedding; tokens are taken side by side."""
    return int(np.prod(store.column("embedding").shape))


class Batches:
    """Batch k of a split, as tensors on the device; a pure function of the seed and k."""

    def __init__(
        self,
        store: Store,
        split: str,
        *,
        batch: int,
        length: int,
        seed: int,
        device: torch.device,
        backing: Backing = "auto",
    ) -> None:
        files: gathering.Backing = "auto" if backing == "device" else backing
        sampler = WindowSampler(
            store, COLUMNS, batch=batch, length=length, seed=seed, split=split, backing=files
        )
        self._load = WindowLoader(
            sampler, device, prepared, "auto" if backing == "auto" else backing == "device"
        )
        self.backing = self._load.backing

    @property
    def waited(self) -> float:
        """Seconds that callers had to wait for batches."""
        return self._load.waited

    def __call__(self, k: int) -> dict[str, Tensor]:
        """Columns (B, T, ...): embedding, action and reward in float32, flags in bool."""
        return self._load(k)

    def first(self, count: int) -> Iterable[dict[str, Tensor]]:
        """The batches 0 … count - 1, for validation."""
        return (self(k) for k in range(count))


def tensors_of(arrays: Mapping[str, Rows], device: torch.device) -> dict[str, Tensor]:
    """Store columns (B, T, ...) as tensors on a device."""
    return prepared({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def prepared(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes: float32 and bool; tokens (B, T, K, D) become (B, T, K·D)."""
    out = {name: rows if rows.dtype == torch.bool else rows.float() for name, rows in batch.items()}
    return {**out, "embedding": out["embedding"].flatten(2)}


def chance(seed: int, *key: int) -> torch.Generator:
    """The random numbers of one update or one probe, from the seed and its number alone."""
    state = np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

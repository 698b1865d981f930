"""Embedding windows as the tensors a world model trains on, and how long it had to wait for them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError, StoreError
from pvrpipe.store.reading import Rows, Store
from pvrpipe.store.windows import WindowSampler

COLUMNS = ("embedding", "action", "reward", "is_first", "is_terminal")
WIDEST = 1 << 15  # numbers in one row's embedding; beyond that a linear map is not the way to read it
DEAD = 1e-4  # an element that varies less is left unscaled


def open_embeddings(path: Path | str) -> Store:
    """Open an embedding store.

    Raises:
        NotAStoreError: nothing there, or a rollout store.
        InvalidValueError: its rows are too wide to be taken as one vector.
    """
    store = Store.open(path)
    if store.manifest.kind != "embeddings":
        raise NotAStoreError(
            f"{path} holds frames, not embeddings; first run `pvrpipe embed {path} --pvr NAME`"
        )
    if (width := embedding_width(store)) > WIDEST:
        raise InvalidValueError(
            f"{path}: {width} numbers per row are too wide for a linear map (at most {WIDEST}); "
            "embed again with --pool"
        )
    return store


def embedding_width(store: Store) -> int:
    """Numbers in one row's embedding; tokens are taken side by side."""
    return int(np.prod(store.column("embedding").shape))


class Normaliser:
    """Embeddings as float32 vectors, to zero mean and unit variance over the training rows if asked.

    Args:
        store: whose manifest knows the mean and standard deviation of each element.
        normalize: False leaves the numbers as they are.
        device: where the vectors go.
    """

    def __init__(self, store: Store, *, normalize: bool, device: torch.device) -> None:
        self.device = device
        shape = store.column("embedding").shape
        statistics = store.manifest.statistics.get("embedding") if normalize else None
        if normalize and statistics is None:
            raise StoreError(f"{store.path} has no statistics of its embeddings; train with normalize off")
        self.mean = self.scale = None
        if statistics is not None:
            std = np.asarray(statistics.std)
            scale = 1 / np.where(std > DEAD, std, 1.0)
            self.mean = self._spread(np.asarray(statistics.mean), shape)
            self.scale = self._spread(scale, shape)

    def _spread(self, values: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """Per element of the last axis -> per number of the flat row."""
        spread = np.broadcast_to(values, shape).reshape(-1)
        return torch.tensor(spread, dtype=torch.float32, device=self.device)

    def __call__(self, embedding: Rows) -> Tensor:
        """(B, T, D) or (B, T, K, D) of any float type -> (B, T, D) or (B, T, K·D) float32."""
        rows = torch.from_numpy(embedding).to(self.device).flatten(2).float()
        if self.mean is None or self.scale is None:
            return rows
        return (rows - self.mean) * self.scale


class Batches:
    """Batch k of a split, as tensors on the device; a pure function of the seed and k.

    ``waited`` is the seconds spent here so far: drawing windows out of the mapped shards takes a
    thousandth of an update, so nothing is read ahead.
    """

    def __init__(
        self, store: Store, split: str, *, batch: int, length: int, seed: int, normaliser: Normaliser
    ) -> None:
        self.sampler = WindowSampler(store, COLUMNS, batch=batch, length=length, seed=seed, split=split)
        self.normaliser = normaliser
        self.waited = 0.0

    def __call__(self, k: int) -> dict[str, Tensor]:
        """Columns (B, T, ...): embedding, action and reward in float32, flags in bool."""
        begun = time.perf_counter()
        batch = tensors_of(self.sampler.batch(k), self.normaliser)
        self.waited += time.perf_counter() - begun
        return batch

    def first(self, count: int) -> Iterable[dict[str, Tensor]]:
        """The batches 0 … count - 1, for validation."""
        return (self(k) for k in range(count))


def tensors_of(arrays: dict[str, Rows], normaliser: Normaliser) -> dict[str, Tensor]:
    """Store columns (B, T, ...) as tensors on the normaliser's device."""
    out = {"embedding": normaliser(arrays["embedding"])}
    for name in ("action", "reward"):
        out[name] = torch.from_numpy(arrays[name]).to(normaliser.device, torch.float32)
    for name in ("is_first", "is_terminal"):
        out[name] = torch.from_numpy(arrays[name]).to(normaliser.device, torch.bool)
    return out


def chance(seed: int, *key: int) -> torch.Generator:
    """The random numbers of one update or one probe, from the seed and its number alone."""
    state = np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

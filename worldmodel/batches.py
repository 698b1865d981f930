"""Windows of a store as the tensors a world model trains on, and how long it had to wait for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError
from pvrpipe.store import gathering
from pvrpipe.store.loading import WindowLoader
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows
from pvrpipe.store.windows import WindowSampler
from pvrpipe.worldmodel.actions import Bounds, bounds_of, scaled
from pvrpipe.worldmodel.inputs import Observation
from pvrpipe.worldmodel.models import Setting
from pvrpipe.worldmodel.ranks import ranks

Backing = Literal["auto", "mapped", "ram", "device"]
OBSERVED = {"embeddings": "embedding", "rollouts": "frame"}  # column by kind of store
COLUMNS = ("action", "reward", "is_first", "is_terminal")
PIXELS = 64  # side of the frames that a model from scratch is shown, where nothing else is asked for
WIDEST = 1 << 15  # numbers in one row's embedding; beyond that a linear map is not the way to read it


def open_observations(path: Path | str) -> Store:
    """Open a store to train on or to probe with: embeddings, or rollouts for a model from scratch.

    Raises:
        NotAStoreError: nothing there, or rows without action or reward.
    """
    store = Store.open(path, prove=True)
    missing = [
        name for name in (OBSERVED[store.manifest.kind], "action", "reward") if name not in store.columns
    ]
    if missing:
        raise NotAStoreError(
            f"{path} has no column {' and no '.join(missing)}, which a world model learns from; "
            "collect or import the rollouts with it, and embed them again"
        )
    return store


def setting_of(
    store: Store, *, pixels: int, encoder: str, embedding: tuple[int, ...] | None = None
) -> Setting:
    """What a store decides about a model.

    Args:
        store: of embeddings or rollouts.
        pixels: side of the frames that a model from scratch is shown.
        encoder: how it is to read them; linear and mlp take tokens side by side, as one vector.
        embedding: shape of what a backbone makes of a frame; None: the model has none.

    Raises:
        InvalidValueError: an embedding is too wide to be taken as one vector.
    """
    if store.manifest.kind == "rollouts" and embedding is None:
        observation = Observation("pixels", (pixels, pixels, 3))
    else:
        if pixels != PIXELS:
            raise InvalidValueError(
                f"--pixels is {pixels}, but the model reads embeddings; leave it out, or "
                "give a rollout store, without --pvr"
            )
        shape = store.column("embedding").shape if embedding is None else embedding
        tokens = len(shape) == 2 and encoder in ("auto", "attention")
        observation = Observation("tokens", shape) if tokens else Observation("vector", (math.prod(shape),))
    if observation.kind == "vector" and observation.width > WIDEST:
        raise InvalidValueError(
            f"{store.path}: {observation.width} numbers per row are too wide for a linear map (at most {WIDEST}); "
            "embed with a PVR that gives one vector per frame, or with --pool mean"
        )
    return Setting(
        observation=observation,
        action=store.column("action").shape[0],
        state=math.prod(store.column("state").shape) if "state" in store.columns else 0,
        steps=int(store.episodes["length"].max()),  # type: ignore[arg-type]
        episodic=bool(store.episodes["terminated"].any()),
        frames=None if embedding is None else Observation("frames", store.column("frame").shape),
        bounds=bounds_of(store.manifest.rollouts),
    )


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
        setting: Setting,
        columns: tuple[str, ...] = (),
        joined: bool = False,
        backing: Backing = "auto",
    ) -> None:
        names = (OBSERVED[store.manifest.kind], *COLUMNS, *columns)
        files: gathering.Backing = "auto" if backing == "device" else backing
        sampler = WindowSampler(
            store,
            names,
            batch=batch,
            length=length,
            seed=seed,
            split=split,
            joined=joined,
            backing=files,
            **ranks()._asdict(),
        )
        resident: Literal["auto"] | bool = "auto" if backing == "auto" else backing == "device"
        self._sampler = sampler
        self._load = WindowLoader(sampler, device, prepared_for(setting.shown, setting.bounds), resident)
        self.backing = self._load.backing

    @property
    def waited(self) -> float:
        """Seconds that callers had to wait for batches."""
        return self._load.waited

    @property
    def too_short(self) -> int:
        """Episodes of the split that no window fits into."""
        plan, episodes = self._sampler.plan, self._sampler.store.episodes
        if plan.joined:
            return 0
        return int(((episodes["split"] == plan.split) & (episodes["rows"] < plan.length)).sum())

    def __call__(self, k: int) -> dict[str, Tensor]:
        """Columns (B, T, ...): embedding, action and reward in float32, flags in bool."""
        return self._load(k)

    def origin(self, k: int) -> str:
        """Which episodes and steps the windows of batch k begin at, for a message."""
        first = self._sampler.pieces(self._sampler.numbers(k)).start
        episodes = self._sampler.store.episodes
        rows = episodes["row_first"].to_numpy()
        at = np.searchsorted(rows, first, "right") - 1
        named = [
            f"{episodes['episode'][int(e)]} from {row - rows[e]}" for e, row in zip(at, first, strict=True)
        ]
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        return f"episodes {', '.join(named[:4])}{more}"

    def first(self, count: int) -> Iterable[dict[str, Tensor]]:
        """The batches 0 … count - 1, for validation."""
        return (self(k) for k in range(count))


def tensors_of(
    arrays: Mapping[str, Rows], device: torch.device, observation: Observation, bounds: Bounds | None = None
) -> dict[str, Tensor]:
    """Store columns (B, T, ...) as a batch on a device."""
    prepare = prepared_for(observation, bounds)
    return prepare({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def prepared_for(
    observation: Observation, bounds: Bounds | None = None
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What makes a model's batch of a store's columns: of what a row shows, and of actions in these bounds."""
    return partial(_prepared, observation, bounds)


def _prepared(observation: Observation, bounds: Bounds | None, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers in float32, actions in [-1, 1], flags in bool, ``observation`` as the model has it; frames stay bytes."""
    others = dict(batch)
    shown = next(others.pop(name) for name in OBSERVED.values() if name in others)
    if observation.kind == "pixels":
        shown = resized(shown, observation.shape[0])
    elif observation.kind != "frames":
        shown = shown.float().reshape(*shown.shape[:2], *observation.shape)
    numbers = {name: rows if rows.dtype == torch.bool else rows.float() for name, rows in others.items()}
    if "action" in numbers:
        numbers["action"] = scaled(numbers["action"], bounds)
    return {**numbers, "observation": shown}


def resized(frames: Tensor, side: int) -> Tensor:
    """Frames (B, T, H, W, 3) uint8 to (B, T, side, side, 3) uint8, each pixel the mean of what it covers."""
    B, T, H, W, _ = frames.shape
    if (side, side) == (H, W):
        return frames
    pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    if H % side == 0 and W % side == 0:
        small = F.avg_pool2d(pixels, (H // side, W // side))
    else:
        small = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (B, T))


def chance(seed: int, *key: int) -> torch.Generator:
    """The random numbers of one update or one probe, from the seed and its number alone."""
    state = np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

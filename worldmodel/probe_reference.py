"""What the training rows say: the controls, and the maps fitted on them that held-out rows are judged with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.predictions import one_step
from pvrpipe.worldmodel.probe_episodes import BATCH_NUMBERS, Padded, Reader
from pvrpipe.worldmodel.probe_networks import effective_rank, watched
from pvrpipe.worldmodel.probe_reward import Event, event_of
from pvrpipe.worldmodel.probe_state import StateReader, fit_state_reader

FIT_ROWS = 8192  # training rows that are looked at
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """What predictions are judged with."""

    usual_reward: float
    """mean reward of a training transition"""
    event: Event | None
    """which rewards are events; None where rewards are not sparse"""
    mean_latent: Tensor
    """(...), the latent that says the same of every row"""
    mean_features: Tensor
    """(n,)"""
    state: StateReader | None
    """what reads the physics state off features; None where the store has none"""


@dataclass(frozen=True)
class Beliefs:
    """What a model believes of M rows, none of them an episode's first."""

    latents: Tensor
    """(M', ...), of as many of the rows as memory is meant for"""
    features: NDArray[np.float32]
    """(M, n)"""
    embedding: NDArray[np.float32]
    """(M, D), what is observed, tokens averaged; no column of frames"""
    reward: Floats
    """(M,)"""
    state: Floats | None
    """(M, S)"""
    episode: NDArray[np.int64]
    """(M,)"""
    step: NDArray[np.int64]
    """(M,)"""


def evenly(numbers: Sequence[int], rows: NDArray[np.int64], wanted: int) -> list[int]:
    """So many of the episodes, spread over all, that together they have about as many rows as wanted."""
    total = int(sum(rows[number] for number in numbers))
    count = min(len(numbers), max(1, round(len(numbers) * wanted / max(1, total))))
    return [numbers[i] for i in np.linspace(0, len(numbers) - 1, count).round().astype(int)]


@torch.no_grad()
def beliefs_of(
    model: Any, reader: Reader, numbers: Sequence[int], seed: int, wanted: int = FIT_ROWS
) -> Beliefs:
    """Filter some of these episodes and lay their rows, about as many as wanted, one under another."""
    numbers = evenly(numbers, reader.store.episodes["rows"].to_numpy(), wanted)
    total = int(reader.store.episodes["rows"].to_numpy()[list(numbers)].sum())
    parts: dict[str, list[Any]] = {name: [] for name in Beliefs.__dataclass_fields__}
    for chosen, episodes in reader.batches(numbers):
        filtered = model.filter(episodes.batch, chance(seed, chosen[0], 0))
        kept = rows_of(episodes)
        lanes, steps = (torch.from_numpy(at) for at in kept)
        every = max(1, -(-filtered.latents[0, 0].numel() * total // BATCH_NUMBERS))
        parts["latents"].append(filtered.latents[lanes[::every], steps[::every]])
        parts["features"].append(filtered.features[lanes, steps].cpu().numpy())
        parts["embedding"].append(_shown(model.seen.embedded(episodes.batch["observation"])[lanes, steps]))
        for name in ("reward", "state"):
            if name in episodes.batch:
                parts[name].append(episodes.batch[name][lanes, steps].double().cpu().numpy())
        parts["episode"].append(np.array(chosen)[kept[0]])
        parts["step"].append(kept[1])
    latents = torch.cat(parts.pop("latents"))
    joined = {name: np.concatenate(arrays) if arrays else None for name, arrays in parts.items()}
    return Beliefs(latents, **joined)  # type: ignore[arg-type]


def rows_of(episodes: Padded) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lane and step of every row of some episodes but their first."""
    length = episodes.batch["reward"].shape[1]
    lanes, steps = np.nonzero(np.arange(length) < episodes.rows[:, None])
    return lanes[steps > 0], steps[steps > 0]


def _shown(observation: Tensor) -> NDArray[np.float32]:
    """Embeddings (M, D); of tokens (M, K, D) the mean; of frames nothing."""
    if observation.dtype == torch.uint8:
        return np.zeros((len(observation), 0), np.float32)
    return (observation.mean(1) if observation.ndim == 3 else observation).cpu().numpy()


def reference_of(model: Any, reader: Reader, rows: Beliefs) -> Reference:
    """What to judge with, learned from what a model believes of training rows."""
    features = rows.features.astype(np.float64)
    state = (
        None
        if rows.state is None
        else fit_state_reader(features, rows.state.reshape(len(features), -1), rows.episode, reader.device)
    )
    return Reference(
        usual_reward=training_reward(reader.store),
        event=event_of(rows.reward),
        mean_latent=model.average(rows.latents),
        mean_features=torch.from_numpy(rows.features.mean(0, dtype=np.float64)).float().to(reader.device),
        state=state,
    )


@torch.no_grad()
def networks_of(model: Any, reader: Reader, rows: Beliefs, seed: int) -> dict[str, Any]:
    """How much of their widths a model's latents and networks use on training rows.

    Returns:
        ``rows`` that were looked at, ``effective_rank`` of features and embeddings, and the ``dormant`` units while the
        model filters the first of their episodes and predicts one step from every row of them.
    """
    _, episodes = next(reader.batches(np.unique(rows.episode).tolist()))
    with watched(model) as activity:
        filtered = model.filter(episodes.batch, chance(seed, 0, 3))
        one_step(model, filtered, episodes.batch["action"], 1, chance(seed, 0, 4))
    return {
        "rows": len(rows.features),
        "effective_rank": {
            "latent": _rank_of(rows.features.astype(np.float64)),
            "embedding": _rank_of(rows.embedding.astype(np.float64)) if rows.embedding.size else None,
        },
        "dormant": activity.report(),
    }


def _rank_of(rows: Floats) -> dict[str, float]:
    return {"rank": effective_rank(rows), "of": min(len(rows) - 1, rows.shape[1])}


def training_reward(store: Store) -> float:
    """Mean reward of a transition in the training episodes, from the episode table alone."""
    train = store.episodes.filter(store.episodes["split"] == "train")
    returns, lengths = train["episode_return"].to_numpy(), train["length"].to_numpy()
    return float(returns.sum() / max(1, lengths.sum()))

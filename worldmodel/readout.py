"""What an embedding contains: reward and state read off it by small networks, without any world model.

The floor under every reward error: a model cannot read from a latent what the embedding does not hold. Each row's
reward (received on arriving there) and state are predicted from that row's embedding alone, by ridge regression, whose
penalty every fifth training episode decides, by an MLP and by the five nearest training rows, all on standardised
embeddings of the ``train`` episodes, and judged on the held-out ones. Tokens are averaged first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.neighbours import neighbours_say

TARGETS = ("reward", "state")
READERS = ("linear", "mlp", "neighbours")
WIDEST = 8192  # numbers; the normal equations are that many squared
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of a ridge on standardised numbers, times the rows
HELD_OUT = 5  # every fifth training episode decides which
BANK = 32768  # training rows, evenly spread, among which neighbours are looked for
UNITS, BATCH, RATE, DECAY = 256, 512, 1e-3, 1e-4
STILL = 1e-8  # variance of a number of the state that never changes, which cannot be explained
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Rows of one split: embeddings (N, D), and what is to be read off them, (N, n) each."""

    embedding: Floats
    targets: dict[str, Floats]
    episode: NDArray[np.int64]
    """(N,), which episode each row is of"""


def read_out(
    place: Place | str, *, updates: int = 2000, seed: int = 0, progress: Progress = silent
) -> dict[str, Any]:
    """Fit and judge every reader on every target of an embedding store.

    Args:
        place: an embedding store.
        updates: of the MLP, on random rows.
        seed: decides its weights and rows.
        progress: told updates done and to do.

    Returns:
        ``store_id``, ``pvr``, ``rows``, and by target and reader ``{"r2": …, "mae": …}`` on held-out episodes, beside
        ``mean``: what predicting the training mean gives. R² is averaged over the numbers of a state that change.

    Raises:
        NotAStoreError: the store holds no embeddings.
        InvalidValueError: an embedding is too wide, or a split has no rows.
    """
    store = Store.open(place, kind="embeddings", prove=True)
    made = store.manifest.embeddings
    assert made is not None
    train, val = (_rows_of(store, split) for split in ("train", "val"))
    mean, scale = train.embedding.mean(0), np.maximum(train.embedding.std(0), 1e-4)
    seen, held_out = ((rows.embedding - mean) / scale for rows in (train, val))
    bank = np.linspace(0, len(seen) - 1, min(len(seen), BANK)).round().astype(int)
    report: dict[str, Any] = {
        "store": str(store.path),
        "store_id": store.manifest.id,
        "pvr": made.encoder.name,
        "random_weights": made.encoder.weights.random_seed is not None,
        "rows": {"train": len(seen), "val": len(held_out)},
    }
    for number, (name, wanted) in enumerate(train.targets.items()):
        centre = wanted.mean(0)
        penalty = penalty_for(seen, wanted - centre, train.episode)
        predictions = {
            "linear": held_out @ ridge_weights(seen, wanted - centre, penalty) + centre,
            "mlp": _mlp(seen, wanted, held_out, updates, (seed, number), progress),
            "neighbours": neighbours_say(held_out, seen[bank], wanted[bank]),
            "mean": np.broadcast_to(centre, val.targets[name].shape),
        }
        report[name] = {reader: judged(p, val.targets[name], centre) for reader, p in predictions.items()}
    return report


def ridge_weights(x: Floats, y: Floats, penalty: float) -> Floats:
    """Ridge regression of y (N, n), centred, on x (N, D), standardised, by its smaller normal equations: (D, n).

    Args:
        x: features.
        y: targets.
        penalty: on the squared weights, times N.
    """
    return next(_ridges(x, y, (penalty,)))


def penalty_for(x: Floats, y: Floats, episode: NDArray[np.int64]) -> float:
    """The penalty with the smallest error on every fifth episode, each number of y counted in its variances.

    Args:
        x: features (N, D), standardised.
        y: targets (N, n), centred; those that do not change have no part in it.
        episode: (N,), which episode each row is of.
    """
    held_out = np.unique(episode, return_inverse=True)[1] % HELD_OUT == 0
    y = y[:, y.var(0) > STILL]
    if held_out.all() or not y.shape[1]:
        return PENALTIES[0]
    spread = y.var(0)
    errors = [
        np.square((y[held_out] - x[held_out] @ weights) / spread**0.5).mean()
        for weights in _ridges(x[~held_out], y[~held_out], PENALTIES)
    ]
    return PENALTIES[int(np.argmin(errors))]


def _ridges(x: Floats, y: Floats, penalties: Sequence[float]) -> Iterator[Floats]:
    """The weights for each penalty; what costs, the products of all features, is computed once."""
    wide = x.shape[1] > len(x)
    normal = x @ x.T if wide else x.T @ x
    diagonal, wanted = normal.diagonal().copy(), y if wide else x.T @ y
    for penalty in penalties:
        normal[np.diag_indices_from(normal)] = diagonal + penalty * len(x)
        solved = np.linalg.solve(normal, wanted).astype(np.float64, copy=False)
        yield x.T @ solved if wide else solved


def judged(predicted: Floats, true: Floats, centre: Floats) -> dict[str, float]:
    """R² against predicting ``centre``, averaged over the numbers that change, and the mean absolute error."""
    spread = np.square(true - centre).mean(0)
    moving = spread > STILL
    unexplained = np.square(true - predicted).mean(0)[moving] / spread[moving]
    return {
        "r2": float(np.mean(1 - unexplained)) if moving.any() else float("nan"),
        "mae": float(np.abs(true - predicted).mean()),
    }


def _mlp(x: Floats, y: Floats, at: Floats, updates: int, key: tuple[int, int], progress: Progress) -> Floats:
    """Two hidden layers, trained on random rows."""
    centre, spread = y.mean(0), np.maximum(y.std(0), 1e-8)
    inputs, wanted = torch.from_numpy(x).float(), torch.from_numpy((y - centre) / spread).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key[0])
        network = nn.Sequential(
            *(nn.Linear(x.shape[1], UNITS), nn.SiLU(), nn.Linear(UNITS, UNITS), nn.SiLU()),
            nn.Linear(UNITS, y.shape[1]),
        )
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    random = np.random.default_rng(key)
    for update in range(updates):
        rows = torch.from_numpy(random.integers(len(x), size=BATCH))
        loss = nn.functional.mse_loss(network(inputs[rows]), wanted[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(update + 1, updates, "updates of the MLP")
    with torch.no_grad():
        parts: list[Tensor] = [network(part) for part in torch.from_numpy(at).float().split(1 << 14)]
    return torch.cat(parts).double().numpy() * spread + centre


def _rows_of(store: Store, split: str) -> Rows:
    """All rows of a split but each episode's first, whose reward is no reward."""
    columns = [name for name in TARGETS if name in store.columns]
    if not columns:
        raise NotAStoreError(f"{store.path} has neither reward nor state to be read off its embeddings")
    parts = list(_episodes(store, split, columns))
    if not parts:
        raise InvalidValueError(
            f"{store.path} has no {split} episodes to read from; collect more with `pvrpipe collect --append`"
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    episode = np.repeat(np.arange(len(parts)), [len(part["embedding"]) for part in parts])
    return Rows(joined.pop("embedding"), joined, episode)


def _episodes(store: Store, split: str, columns: list[str]) -> Iterator[dict[str, Floats]]:
    shape = store.column("embedding").shape
    width = int(np.prod(shape)) if len(shape) != 2 else shape[1]
    if width > WIDEST:
        raise InvalidValueError(
            f"{store.path}: {width} numbers per row are too wide to be read off (at most {WIDEST}); "
            "embed with --pool mean"
        )
    for number in store.episodes.filter(store.episodes["split"] == split)["episode"]:
        episode = store.read_episode(number, ("embedding", *columns))
        rows = {name: episode[name][1:].astype(np.float64) for name in episode}
        embedding = rows.pop("embedding")
        seen = embedding.mean(1) if len(shape) == 2 else embedding.reshape(len(embedding), -1)
        yield {"embedding": seen, **{name: values.reshape(len(seen), -1) for name, values in rows.items()}}

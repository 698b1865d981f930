"""A film strip of an imagined rollout: beside each true frame the training frame whose latent is nearest to it.

A latent cannot be looked at, and models of embeddings decode no frames. The nearest training row can: ``imagined`` is
what it shows for the latent imagined open loop, ``seen`` for the latent filtered from the true observations, which is
as well as this way of looking can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pvrpipe.schemas.errors import InvalidValueError, NotAStoreError
from pvrpipe.store.places import Place
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.neighbours import nearest
from pvrpipe.worldmodel.probe_reference import beliefs_of
from pvrpipe.worldmodel.probe_subject import subject_of

BANK = 8192  # training rows that are looked among
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class FilmStrip:
    """F moments of one episode."""

    episode: int
    step: NDArray[np.int64]
    """(F,), rows of the episode"""
    true: Frames
    """(F, H, W, 3)"""
    imagined: Frames
    """(F, H, W, 3), of the training rows nearest to what was imagined"""
    seen: Frames
    """(F, H, W, 3), of those nearest to what was believed once it was seen"""
    nearest: NDArray[np.int64]
    """(F, 2), episode and step of the rows that ``imagined`` shows"""
    distance: NDArray[np.float64]
    """(F,), of the imagined latent to its nearest row, over that of the filtered latent to its own; 1 is as near"""
    reward: NDArray[np.float64]
    """(F, 2), received and predicted"""


def film_strip(
    run: Path | str,
    frames: Place | str,
    store: Path | str | None = None,
    *,
    episode: int | None = None,
    split: str = "val",
    moments: int = 8,
    horizon: int = 33,
    context: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    backbone: torch.nn.Module | None = None,
) -> FilmStrip:
    """Imagine an episode from its context on, and look up what it looks like.

    Args:
        run: a run's folder.
        frames: the rollout store that the embeddings were made from.
        store: embeddings of the same encoder; the run's own if None.
        episode: which; the first of the split that is longer than the horizon, or the longest, if None.
        split: of the episode, where none is given.
        moments: F, evenly spread over the horizon.
        horizon: rows imagined, as far as the episode goes.
        context: rows seen before.
        seed: decides the samples.
        device: where the model computes.
        backbone: on the device, what the run was trained through, if it was.

    Raises:
        InvalidValueError: there is no such episode.
        NotAStoreError: the frames are not those that were embedded.
    """
    with subject_of(run, store, device, backbone) as subject, torch.no_grad():
        model, reader = subject.model, subject.reader
        pictures = frames_of(subject.store, frames)
        number = _chosen(subject.store, subject.episodes(split, context), episode, context, horizon)
        bank = beliefs_of(model, reader, subject.episodes("train"), seed, BANK)
        batch = reader([number]).batch
        filtered = model.filter(batch, chance(seed, number, 0))
        action = batch["action"][:, context - 1 : context - 1 + horizon][
            :, : len(batch["action"][0]) - context
        ]
        said = model.predict(filtered.state(context - 1), action, chance(seed, number, 2))
    at = np.linspace(0, said.reward.shape[1] - 1, min(moments, said.reward.shape[1])).round().astype(int)
    step = at + context
    (imagined, apart), (seen, floor) = (
        nearest(rows.cpu().numpy(), bank.features, 1)
        for rows in (said.features[0, at], filtered.features[0, step])
    )
    rows = np.stack([bank.episode, bank.step], 1)
    return FilmStrip(
        episode=number,
        step=step,
        true=pictures.read_episode(number, ("frame",))["frame"][step],
        imagined=_shown(pictures, rows[imagined[:, 0]]),
        seen=_shown(pictures, rows[seen[:, 0]]),
        nearest=rows[imagined[:, 0]],
        distance=apart[:, 0] / np.maximum(floor[:, 0], 1e-12),
        reward=np.stack([batch["reward"][0, step].cpu().numpy(), said.reward[0, at].cpu().numpy()], 1).astype(
            np.float64
        ),
    )


def frames_of(store: Store, frames: Place | str) -> Store:
    """The rollout store whose frames a store of embeddings was made from, row for row.

    Raises:
        NotAStoreError: it is another, or its rows are not in the same order.
    """
    pictures = Store.open(frames, kind="rollouts", prove=True)
    made, found = store.manifest.embeddings, pictures.manifest
    known = {found.id, *(revision.id for revision in found.earlier)}
    if made is None:
        known, wanted = {found.id}, store.manifest.id
    else:
        wanted = made.rollouts_id
    same = ["episode", "rows", "seed", "episode_return"]
    here, there = (table.select(same) for table in (store.episodes, pictures.episodes))
    if wanted not in known or not here.equals(there.head(len(here))):
        raise NotAStoreError(
            f"{pictures.path} does not hold the frames of {store.path}, which were embedded from rollouts "
            f"{str(wanted)[:12]}…; give that store"
        )
    return pictures


def _chosen(store: Store, numbers: list[int], episode: int | None, context: int, horizon: int) -> int:
    rows = store.episodes["rows"].to_numpy()
    if episode is None:
        long = [number for number in numbers if rows[number] >= context + horizon]
        return long[0] if long else max(numbers, key=lambda number: int(rows[number]))
    if not 0 <= episode < len(rows) or rows[episode] <= context:
        raise InvalidValueError(
            f"{store.path} has no episode {episode} longer than {context} rows; it has 0 to {len(rows) - 1}"
        )
    return episode


def _shown(pictures: Store, rows: NDArray[np.int64]) -> Frames:
    """Frames of (episode, step) pairs (F, 2): (F, H, W, 3)."""
    return np.stack([pictures.read_episode(int(e), ("frame",))["frame"][s] for e, s in rows])

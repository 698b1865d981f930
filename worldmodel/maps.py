"""Maps of a model's latents, coloured by reward (Schneider et al. 2024, figure 8), and how well reward separates there.

UMAP (McInnes, Healy and Melville 2018, by ``umap-learn``) draws what is near beside each other and distorts the rest;
PCA is linear. So that a map is not judged by eye alone, separation is a number: R² of the reward of a row as the mean
reward of its nearest rows in other episodes, in the latent itself and in each map. 1: neighbours tell the reward.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pvrpipe.store.places import without_password
from pvrpipe.worldmodel.neighbours import NEIGHBOURS, nearest
from pvrpipe.worldmodel.probe_reference import beliefs_of
from pvrpipe.worldmodel.probe_subject import subject_of

ROWS = 4096
THINNED = 4  # rows that are filtered for one that is shown, so that these are of more episodes
NEAR = 15  # neighbours that UMAP keeps together
FEWEST = 5  # rows that it can lay out
FLAT = 1e-7  # of the largest deviation: nothing but rounding
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LatentMap:
    """M rows of held-out episodes, and where they lie."""

    store: str
    """that the rows are in"""
    episode: NDArray[np.int64]
    """(M,)"""
    step: NDArray[np.int64]
    """(M,)"""
    reward: Floats
    """(M,), received on arriving"""
    features: NDArray[np.float32]
    """(M, n), what the model's reward head reads"""
    points: dict[str, Floats]
    """by ``pca`` and ``umap``: (M, 2)"""
    separation: dict[str, float | None]
    """by ``latent``, ``pca`` and ``umap``"""


def latent_map(
    run: Path | str,
    store: Path | str | None = None,
    *,
    split: str = "val",
    rows: int = ROWS,
    methods: tuple[str, ...] = ("pca", "umap"),
    seed: int = 0,
    device: str | torch.device = "cpu",
    backbone: torch.nn.Module | None = None,
) -> LatentMap:
    """Filter held-out episodes and lay out their latents.

    Args:
        run: a run's folder.
        store: embeddings of the same encoder; the run's own if None.
        split: which episodes.
        rows: about how many rows of them, evenly spread.
        methods: ``pca``, ``umap`` or both.
        seed: decides the samples and where UMAP begins.
        device: where the model computes.
        backbone: on the device, what the run was trained through, if it was.

    Raises:
        RunError: no run, or a store of another encoder.
        InvalidValueError: no episodes in the split.
    """
    with subject_of(run, store, device, backbone) as subject:
        seen = beliefs_of(subject.model, subject.reader, subject.episodes(split), seed, THINNED * rows)
    kept = np.linspace(0, len(seen.reward) - 1, min(rows, len(seen.reward))).round().astype(int)
    features, reward, episode = seen.features[kept], seen.reward[kept], seen.episode[kept]
    points = {method: LAYOUTS[method](features, seed) for method in methods}
    return LatentMap(
        store=without_password(subject.store.path),
        episode=episode,
        step=seen.step[kept],
        reward=reward,
        features=features,
        points=points,
        separation={
            name: separation(rows_, reward, episode) for name, rows_ in {"latent": features, **points}.items()
        },
    )


def pca(features: NDArray[Any], seed: int = 0) -> Floats:
    """The two directions of most variance, 0 where there is none: (M, n) -> (M, 2).

    Each direction points where its largest weight is positive.
    """
    from scipy.linalg import eigh

    del seed
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    wide = len(centred) < centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    _, vectors = eigh(gram, subset_by_index=(max(0, len(gram) - 2), len(gram) - 1))
    axes = vectors[:, ::-1]  # the largest value's first
    if wide:
        axes = centred.T @ axes
        strength = np.linalg.norm(axes, axis=0)
        axes = np.divide(axes, strength, out=np.zeros_like(axes), where=strength > FLAT * strength.max())
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0, keepdims=True), 0))
    points = centred @ (axes * signs)
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def umap(features: NDArray[Any], seed: int = 0) -> Floats:
    """UMAP with its authors' defaults and a seed, which makes it repeatable: (M, n) -> (M, 2).

    Of fewer than five rows, which have no neighbourhoods to be kept, it is PCA.
    """
    if len(features) < FEWEST:
        return pca(features)
    import umap as authors  # compiles for seconds when imported

    before = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a seed costs parallelism, which it says every time
            layout = authors.UMAP(n_neighbors=min(NEAR, len(features) - 1), random_state=seed)
            return np.asarray(layout.fit_transform(features), np.float64)
    finally:
        torch.set_num_threads(before)  # numba leaves as many as there are cores, and later runs other bits


LAYOUTS = {"pca": pca, "umap": umap}


def separation(
    points: NDArray[Any], reward: Floats, episode: NDArray[np.int64], count: int = NEIGHBOURS
) -> float | None:
    """R² of each row's reward as the mean of its nearest rows' in other episodes; None where all rewards are the same.

    Args:
        points: (M, n).
        reward: (M,).
        episode: (M,); rows of one episode are near each other in time, and say nothing of what a latent tells.
        count: neighbours.
    """
    if not reward.std() or len(np.unique(episode)) < 2:
        return None
    indices, distances = nearest(points, points, count, of_query=episode, of_bank=episode)
    weight = np.isfinite(distances).astype(np.float64)
    said = (reward[indices] * weight).sum(1) / weight.sum(1)
    return float(1 - np.square(reward - said).mean() / reward.var())

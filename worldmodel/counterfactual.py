"""The same physics seen twice: what changes in an embedding, and in what a model predicts, when only the look does.

``collect --replay`` draws the frames of a rollout store anew, row for row. Embedded by the same encoder, the two stores
differ in nothing but what was seen. A shift here is between the two views of one row; errors are those of
:mod:`pvrpipe.worldmodel.probe`, of each view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.schemas.errors import InvalidValueError
from pvrpipe.schemas.progress import Progress, silent
from pvrpipe.store.places import without_password
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel import runs
from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.predictions import Filtered, Imagined
from pvrpipe.worldmodel.probe import check_horizons, identity_of, labelled, write_findings
from pvrpipe.worldmodel.probe_dynamics import Judged, Key, judge
from pvrpipe.worldmodel.probe_episodes import Padded
from pvrpipe.worldmodel.probe_reference import Beliefs, Reference, beliefs_of, reference_of
from pvrpipe.worldmodel.probe_subject import Subject, subject_of
from pvrpipe.worldmodel.probe_table import horizons_of, mean_sem, table_of

VIEWS = ("source", "replay")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How far two unrelated training rows are apart, squared, on average: what a shift is counted in."""

    embedding: float
    features: float

    @classmethod
    def of(cls, rows: Beliefs) -> Spread:
        """Twice the variances, summed."""
        embedding, features = (
            2 * float(array.var(0, dtype=np.float64).sum()) for array in (rows.embedding, rows.features)
        )
        return cls(embedding, features)


def probe_pairs(
    run: Path | str,
    replay: Path | str,
    store: Path | str | None = None,
    *,
    horizons: Sequence[int] = (33, 500),
    context: int = 1,
    split: str = "val",
    seed: int = 0,
    device: str | torch.device = "cpu",
    backbone: torch.nn.Module | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Probe a run on a store and on a replay of it, pair by pair; writes ``pairs-ID.json`` and ``.parquet``.

    Args:
        run: the run's folder.
        replay: embeddings, by the same encoder, of rollouts that replay those of the store.
        store: what is replayed; the run's own if None.
        horizons: rows to accumulate over.
        context: rows seen before predicting.
        split: which episodes.
        seed: decides the samples, the same ones for both views.
        device: where to compute.
        backbone: on the device, what the run was trained through, if it was.
        progress: told episodes done and to do.

    Returns:
        ``measures``: by measure and horizon, ``source``, ``replay`` (errors of each view) and ``shift`` (between them),
        each ``accumulated`` and ``per_step``; and what was compared.

    Raises:
        InvalidValueError: the stores are no pair.
    """
    check_horizons(horizons, context)
    with (
        subject_of(run, store, device, backbone) as subject,
        subject_of(run, replay, device, backbone) as anew,
    ):
        check_pair(subject.store, anew.store)
        numbers = subject.episodes(split, context)
        rows = beliefs_of(subject.model, subject.reader, subject.episodes("train"), seed)
        reference, spread = reference_of(subject.model, subject.reader, rows), Spread.of(rows)
        known = horizons_of(horizons, subject.longest - context)
        tables = []
        for chosen, episodes in subject.reader.batches(numbers, rows.features.shape[1]):
            judged = _pair(
                subject, episodes, anew.reader(chosen), context, reference, spread, (seed, chosen[0])
            )
            tables.append(table_of(judged, anew.store.episodes[chosen], known))
            progress(numbers.index(chosen[-1]) + 1, len(numbers), "pairs of episodes")
    about = {**identity_of(subject, Path(run)), "replay_id": anew.store.manifest.id}
    table = pl.concat(tables)
    report = {
        **about,
        "store": without_password(subject.store.path),
        "replay": without_password(anew.store.path),
        "variation": anew.store.manifest.rollouts.variation,
        "split": split,
        "context": context,
        "seed": seed,
        "episodes": len(numbers),
        "measures": _entries(table, horizons),
    }
    name = runs.PAIRS + str(anew.store.manifest.id)[:12]
    return write_findings(Path(run), f"{name}.parquet", f"{name}.json", labelled(table, about), report)


def check_pair(source: Store, replay: Store) -> None:
    """Refuse two stores whose rows are not of the same physics.

    Raises:
        InvalidValueError: one is not made of a replay of what the other is made of.
    """
    original, again = source.manifest, replay.manifest
    made_of = original.embeddings.rollouts_id if original.embeddings is not None else original.id
    same = source.episodes.select("episode", "rows", "seed", "split").equals(
        replay.episodes.select("episode", "rows", "seed", "split")
    )
    if again.rollouts.replay_of not in (made_of, original.rollouts.replay_of or made_of) or not same:
        raise InvalidValueError(
            f"{replay.path} is no replay of {source.path}; make one with `pvrpipe collect --replay ROLLOUTS "
            "--variation …` and embed it as the store was"
        )


@torch.no_grad()
def _pair(
    subject: Subject,
    source: Padded,
    replay: Padded,
    context: int,
    reference: Reference,
    spread: Spread,
    key: tuple[int, ...],
) -> Judged:
    """Errors of both views under ``source`` and ``replay``, and what is between them under ``shift``."""
    model, values = subject.model, dict[Key, Floats]()
    steps = source.rows - context
    for view, episodes in zip(VIEWS, (source, replay), strict=True):
        judged = judge(model, episodes, context, reference, key)
        for (prediction, control, measure), rows in judged.values.items():
            if control == "model":
                values[prediction, view, measure] = rows
    seen = [model.filter(episodes.batch, chance(*key, 0)) for episodes in (source, replay)]
    action = source.batch["action"][:, context - 1 : -1]
    said = [model.predict(one.state(context - 1), action, chance(*key, 2)) for one in seen]
    shifts = {
        **{("filtered", name): rows[:, context:] for name, rows in _shifts(model, seen, spread).items()},
        **{("open_loop", name): rows for name, rows in _shifts(model, said, spread).items()},
        ("open_loop", "reward_shift"): (said[1].reward.double() - said[0].reward.double()).abs(),
    }
    if spread.embedding:
        x, y = (
            model.seen.embedded(episodes.batch["observation"])[:, context:] for episodes in (source, replay)
        )
        shifts["filtered", "embedding_shift"] = _apart(x, y, spread.embedding)
    for (prediction, measure), rows in shifts.items():
        values[prediction, "shift", measure] = rows.double().cpu().numpy()
    return Judged(values, steps)


def _shifts(model: Any, views: Sequence[Filtered] | Sequence[Imagined], spread: Spread) -> dict[str, Tensor]:
    """How far the latents of two views are apart: (N, T) each."""
    a, b = views
    divergences = model.divergences(b.latents, a.latents)
    return {
        **{f"latent_{name}": rows for name, rows in divergences.items()},
        "latent_shift": _apart(a.features, b.features, spread.features),
    }


def _apart(a: Tensor, b: Tensor, spread: float) -> Tensor:
    """Squared distance of rows (N, T, n), or of the mean of tokens (N, T, K, n), in that of unrelated rows: (N, T)."""
    if a.ndim == 4:
        a, b = a.mean(2), b.mean(2)
    return (a - b).square().sum(-1) / spread if spread else torch.zeros_like(a[..., 0])


def _entries(table: pl.DataFrame, horizons: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """By ``prediction.measure``, horizon and view."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    keys = ("prediction", "measure", "horizon", "control")
    for row in mean_sem(table.filter(pl.col("horizon").is_in(list(horizons))), keys):
        name = f"{row['prediction']}.{row['measure']}"
        entry = found.setdefault(name, {}).setdefault(str(row["horizon"]), {})
        entry[row["control"]] = {"accumulated": row["accumulated"], "per_step": row["per_step"]}
    return found

"""Predictions along episodes, open loop and one step ahead, and every measure of them row by row.

``N`` episodes; of ``T`` rows after the context each has a number for every (prediction, control, measure).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.worldmodel.batches import chance
from pvrpipe.worldmodel.predictions import Filtered, Imagined, one_step
from pvrpipe.worldmodel.probe_episodes import Padded, shuffled_actions
from pvrpipe.worldmodel.probe_reference import Reference
from pvrpipe.worldmodel.probe_reward import reward_rows

PREDICTIONS = ("open_loop", "one_step")
CONTROLS = ("model", "shuffled_actions", "no_change", "mean", "filtered")
Floats = NDArray[np.float64]
Key = tuple[str, str, str]  # prediction, control, measure


@dataclass(frozen=True)
class Judged:
    """Every measure of N episodes at the T rows after the context, and how many of these each has."""

    values: dict[Key, Floats]
    """(N, T) each"""
    steps: NDArray[np.int64]
    """(N,)"""

    def within(self, horizon: int, key: Key) -> Floats:
        """One measure of all rows within a horizon, (M,)."""
        values = self.values[key][:, :horizon]
        return values[np.arange(values.shape[1]) < self.steps[:, None]]


@dataclass(frozen=True)
class Truth:
    """What the rows after the context turned out to be."""

    latents: Tensor
    features: Tensor
    reward: Tensor
    state: Tensor | None


@torch.no_grad()
def judge(model: Any, episodes: Padded, context: int, reference: Reference, key: tuple[int, ...]) -> Judged:
    """Predict along episodes in every way, and measure it all.

    Args:
        model: any world model.
        episodes: N of them.
        context: rows seen before predicting, at least 1.
        reference: what the training rows say.
        key: seed of the samples and of the shuffled actions.
    """
    batch = episodes.batch
    filtered = model.filter(batch, chance(*key, 0))
    after = slice(context, None)
    truth = Truth(
        filtered.latents[:, after],
        filtered.features[:, after],
        batch["reward"][:, after],
        batch["state"][:, after].flatten(2) if "state" in batch else None,
    )
    shuffled = shuffled_actions(batch["action"], episodes.rows, context, np.random.default_rng((*key, 1)))
    begin = filtered.state(context - 1)
    found: dict[Key, Tensor] = {}
    for control, along in (("model", batch["action"]), ("shuffled_actions", shuffled)):
        for prediction, imagined in (
            ("open_loop", model.predict(begin, along[:, context - 1 : -1], chance(*key, 2))),
            ("one_step", one_step(model, filtered, along, context, chance(*key, 2))),
        ):
            for name, rows in measured(model, imagined, truth, reference).items():
                found[prediction, control, name] = rows
    before = {"open_loop": slice(context - 1, context), "one_step": slice(context - 1, -1)}
    for prediction, held in before.items():
        for name, rows in unchanged(model, filtered, held, truth, reference).items():
            found[prediction, "no_change", name] = rows
        for control, name, rows in averages(model, truth, reference):
            found[prediction, control, name] = rows
    steps = np.minimum(episodes.rows - context, truth.reward.shape[1])
    return Judged({k: rows.double().cpu().numpy() for k, rows in found.items()}, steps)


def measured(model: Any, imagined: Imagined, truth: Truth, reference: Reference) -> dict[str, Tensor]:
    """Every measure of a prediction, (N, T) each."""
    return {
        **_dynamics(model, imagined.latents, truth),
        **reward_rows(
            imagined.reward, imagined.reward_logits, truth.reward, model.two_hot, reference.threshold
        ),
        **_state(imagined.features, truth, reference),
    }


def unchanged(
    model: Any, filtered: Filtered, held: slice, truth: Truth, reference: Reference
) -> dict[str, Tensor]:
    """The latents of earlier rows, and the usual reward, as a prediction of the rows to come."""
    latents, features = (
        rows[:, held].expand_as(true)
        for rows, true in ((filtered.latents, truth.latents), (filtered.features, truth.features))
    )
    return {
        **_dynamics(model, latents, truth),
        "reward_error": (reference.usual_reward - truth.reward.double()).abs(),
        **_state(features, truth, reference),
    }


def averages(model: Any, truth: Truth, reference: Reference) -> Iterator[tuple[str, str, Tensor]]:
    """The mean of the training rows as a prediction; and the state as read off what is believed once it is seen."""
    for name, rows in _dynamics(model, reference.mean_latent.expand_as(truth.latents), truth).items():
        yield "mean", name, rows
    for name, rows in _state(reference.mean_features.expand_as(truth.features), truth, reference).items():
        yield "mean", name, rows
    for name, rows in _state(truth.features, truth, reference).items():
        yield "filtered", name, rows


def _dynamics(model: Any, latents: Tensor, truth: Truth) -> dict[str, Tensor]:
    return {f"dynamics_{name}": rows for name, rows in model.divergences(latents, truth.latents).items()}


def _state(features: Tensor, truth: Truth, reference: Reference) -> dict[str, Tensor]:
    if reference.state is None or truth.state is None:
        return {}
    return {"state_error": reference.state.error(features, truth.state)}

"""Predictions along episodes, open loop and one step ahead, and every measure of them row by row.

``N`` episodes; of ``T`` rows after the context each has a number for every (prediction, control, measure).
"""

from __future__ import annotations

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

    def only(self, *measures: str) -> Judged:
        """Some measures of the model alone."""
        kept = {key: rows for key, rows in self.values.items() if key[1] == "model" and key[2] in measures}
        return Judged(kept, self.steps)

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
            measures = measured(model, imagined, truth, reference)
            found |= {(prediction, control, name): rows for name, rows in measures.items()}
    still = standing(model, truth, reference)
    for prediction, held in (
        ("open_loop", slice(context - 1, context)),
        ("one_step", slice(context - 1, -1)),
    ):
        unmoved = unchanged(model, filtered, held, truth, reference)
        for control, measures in {"no_change": unmoved, **still}.items():
            found |= {(prediction, control, name): rows for name, rows in measures.items()}
    steps = np.minimum(episodes.rows - context, truth.reward.shape[1])
    return Judged({k: rows.double().cpu().numpy() for k, rows in found.items()}, steps)


def measured(model: Any, imagined: Imagined, truth: Truth, reference: Reference) -> dict[str, Tensor]:
    """Every measure of a prediction, (N, T) each."""
    return {
        **_dynamics(model, imagined.latents, truth),
        **reward_rows(imagined.reward, imagined.reward_logits, truth.reward, model.two_hot, reference.event),
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


def standing(model: Any, truth: Truth, reference: Reference) -> dict[str, dict[str, Tensor]]:
    """Controls that say the same at every step: the ``mean`` of the training rows, and the state as ``filtered``."""
    mean = reference.mean_features.expand_as(truth.features)
    return {
        "mean": {
            **_dynamics(model, reference.mean_latent.expand_as(truth.latents), truth),
            **_state(mean, truth, reference),
        },
        "filtered": _state(truth.features, truth, reference),
    }


def _dynamics(model: Any, latents: Tensor, truth: Truth) -> dict[str, Tensor]:
    return {f"dynamics_{name}": rows for name, rows in model.divergences(latents, truth.latents).items()}


def _state(features: Tensor, truth: Truth, reference: Reference) -> dict[str, Tensor]:
    if reference.state is None or truth.state is None:
        return {}
    return {"state_error": reference.state.error(features, truth.state)}

"""The physics state decoded from latents: an error in the same units whatever the representation.

Ridge regression from a latent's features to the state, fitted on what the model believes of training rows, and then
read off what it imagines, within the range that each number of the state has in these rows: off a latent unlike
theirs a linear map would otherwise read any number whatever. The error is the squared error over the variance of
each number of the state in the training rows, averaged over the numbers that change: 0 is exact, 1 is what their mean
would get.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvrpipe.worldmodel.readout import STILL, penalty_for, ridge_weights

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StateReader:
    """A linear map from features (n,) to the S' numbers of the state that change."""

    weight: Tensor
    """(n, S')"""
    offset: Tensor
    """(S',)"""
    spread: Tensor
    """(S',), variance over the training rows"""
    low: Tensor
    """(S',), the least in the training rows"""
    high: Tensor
    """(S',), the most"""
    moving: Tensor
    """(S',), which numbers of the state"""
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """(..., n) -> (..., S')."""
        return (features @ self.weight + self.offset).clamp(self.low, self.high)

    def error(self, features: Tensor, state: Tensor) -> Tensor:
        """Squared error in variances, averaged over the state: (..., n), (..., S) -> (...)."""
        return ((self(features) - state[..., self.moving]).square() / self.spread).mean(-1)


def fit_state_reader(
    features: Floats, state: Floats, episode: NDArray[np.int64], device: torch.device
) -> StateReader | None:
    """Fit the map, its penalty chosen on every fifth episode; None where no number of the state changes.

    Args:
        features: (M, n).
        state: (M, S).
        episode: (M,), which episode each row is of.
        device: where it is to be used.
    """
    moving = np.flatnonzero(state.var(0) > STILL)
    if not len(moving):
        return None
    state = state[:, moving]
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-4)
    x, centre = (features - mean) / scale, state.mean(0)
    penalty = penalty_for(x, state - centre, episode)
    weight = ridge_weights(x, state - centre, penalty) / scale[:, None]

    def tensor(array: Floats) -> Tensor:
        return torch.from_numpy(array).float().to(device)

    return StateReader(
        weight=tensor(weight),
        offset=tensor(centre - mean @ weight),
        spread=tensor(state.var(0)),
        low=tensor(state.min(0)),
        high=tensor(state.max(0)),
        moving=torch.from_numpy(moving).to(device),
        penalty=penalty,
    )

"""What a world model is shown at each row, and its values made fit for a network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from pvrpipe.worldmodel.distributions import symlog

DEAD = 1e-4  # an element that varies less is left unscaled


@dataclass(frozen=True)
class Observation:
    """What is observed at each row: one embedding (D,), tokens (K, D), or a frame (H, W, 3) of bytes."""

    kind: Literal["vector", "tokens", "pixels"]
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers in one row."""
        return math.prod(self.shape)


def vector(width: int) -> Observation:
    """One embedding of D numbers."""
    return Observation("vector", (width,))


class Standardise(nn.Module):
    """(x - mean) / std per element; the identity until it is set.

    Args:
        width: D.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def set(self, mean: ArrayLike, std: ArrayLike) -> None:
        """Take the moments of the training rows, (D,) each, or (D / K,) for K tokens side by side."""
        mean, std = np.atleast_1d(np.asarray(mean)), np.atleast_1d(np.asarray(std))
        scale = 1 / np.where(std > DEAD, std, 1.0)
        tokens = len(self.mean) // len(mean)
        self.mean.copy_(torch.from_numpy(np.tile(mean, tokens)))
        self.scale.copy_(torch.from_numpy(np.tile(scale, tokens)))

    def forward(self, embedding: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (embedding - self.mean) * self.scale


class Seen(nn.Module):
    """Embeddings standardised, and squashed by symlog if so wished; frames in [0, 1].

    Args:
        observation: what is seen.
        symlog_inputs: whether embeddings pass through symlog.
    """

    def __init__(self, observation: Observation, *, symlog_inputs: bool = False) -> None:
        super().__init__()
        self.pixels, self.symlog = observation.kind == "pixels", symlog_inputs
        self.standardise = Standardise(0 if self.pixels else observation.shape[-1])

    def forward(self, observation: Tensor) -> Tensor:
        """(B, T, *shape) -> float32 of the same shape."""
        if self.pixels:
            return observation.float() / 255
        standard = self.standardise(observation)
        return symlog(standard) if self.symlog else standard

"""Embeddings to zero mean and unit variance, by numbers that travel with the model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

DEAD = 1e-4  # an element that varies less is left unscaled


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

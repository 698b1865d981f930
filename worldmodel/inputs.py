"""What a world model is shown at each row, and its values made fit for a network.

A model may look at frames through an encoder of theirs, its backbone, whose last parts learn with the model
(``docs/decisions/0011-fine-tuning.md``). The model itself is the one that it would be on the encoder's embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call

from pvrpipe.worldmodel.distributions import symlog

BACKBONE = "seen.backbone."  # what the names of a backbone's tensors begin with in every model
DEAD = 1e-4  # an element that varies less is left unscaled


@dataclass(frozen=True)
class Observation:
    """What is observed at each row: one embedding (D,), tokens (K, D), or a frame (H, W, 3) of bytes.

    Of ``pixels`` a model makes what it likes; ``frames`` are as the store has them, for a backbone.
    """

    kind: Literal["vector", "tokens", "pixels", "frames"]
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
    """Embeddings, a backbone's too, standardised and squashed by symlog if so wished; frames in [0, 1].

    Args:
        observation: what is seen.
        symlog_inputs: whether embeddings pass through symlog.
    """

    def __init__(self, observation: Observation, *, symlog_inputs: bool = False) -> None:
        super().__init__()
        self.pixels, self.symlog = observation.kind == "pixels", symlog_inputs
        self.shape = observation.shape
        self.standardise = Standardise(0 if self.pixels else observation.shape[-1])
        self.backbone: nn.Module | None = None
        self._before: dict[str, Tensor] = {}

    def look_through(self, backbone: nn.Module) -> None:
        """See frames by what a backbone makes of them; those of its parameters that require gradients learn.

        Args:
            backbone: frames (N, H, W, 3) uint8 -> (N, ...), as many numbers as are observed; it is put into evaluation
                mode, so that batch norms keep their statistics.
        """
        self.backbone = backbone.eval()
        self._before = {
            name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad
        }

    def forward(self, observation: Tensor) -> Tensor:
        """(B, T, *shape), or frames (B, T, H, W, 3) for a backbone -> float32 (B, T, *shape)."""
        return observation.float() / 255 if self.pixels else self._fit(self.embedded(observation))

    def embedded(self, observation: Tensor) -> Tensor:
        """What a store would hold of it: the backbone's embedding where there is one, else what is given."""
        return observation if self.backbone is None else self._embedded(self.backbone, observation)

    @torch.no_grad()
    def target(self, observation: Tensor, seen: Tensor) -> Tensor:
        """What is to be predicted of what is ``seen``: the same, by the backbone as it was before it learned anything.

        So it is the same data however much of the backbone learns; predicting what oneself may change is learned by
        changing it into what is easily predicted.
        """
        if self.backbone is None or not self._before:
            return seen.detach()
        return self._fit(self._embedded(partial(functional_call, self.backbone, self._before), observation))

    def _embedded(self, backbone: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        return backbone(frames.flatten(0, 1)).float().reshape(*frames.shape[:2], *self.shape)

    def _fit(self, embedding: Tensor) -> Tensor:
        standard = self.standardise(embedding)
        return symlog(standard) if self.symlog else standard

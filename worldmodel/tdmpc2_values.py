"""TD-MPC2's action values and its policy prior, on latents.

After nicklashansen/tdmpc2 at e9f5932 (``common/world_model.py``, ``math.py``, ``scale.py``). Chance is drawn
before and handed in; dropout is on only while gradients are recorded.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.worldmodel.ranks import gathered, own_part

DROPOUT = 0.01  # in the first layer of each value
LOG_STD = (-10.0, 2.0)
ENTROPY = 1e-4
PERCENTILES = (0.05, 0.95)
TAU = 0.01  # of the target values, and of the scale


class Ensemble(nn.Module):
    """``members`` networks of two hidden Mish layers side by side, each product one batched product.

    Args:
        features: of the input.
        units: of a hidden layer.
        out: of the output.
        members: how many.
    """

    def __init__(self, features: int, units: int, out: int, members: int) -> None:
        super().__init__()
        widths = (features, units, units, out)
        self.weights = nn.ParameterList(torch.empty(members, a, b) for a, b in itertools.pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(members, 1, width) for width in widths[1:])
        self.gains = nn.ParameterList(torch.ones(members, 1, units) for _ in range(2))
        self.shifts = nn.ParameterList(torch.zeros(members, 1, units) for _ in range(2))

    def kept(self, rows: int, random: torch.Generator) -> Tensor:
        """Which units of the first layer dropout keeps: ones among zeros (members, rows, units)."""
        members, _, units = self.weights[0].shape

        def draw(shape: tuple[int, ...]) -> Tensor:
            return self.weights[0].new_empty(shape).bernoulli_(1 - DROPOUT, generator=random)

        return own_part(draw, (members, rows, units), 1)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """(N, features) -> (members, N, out); with ``kept``, only these units of the first layer are."""
        x = x.expand(len(self.weights[0]), *x.shape)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer == len(self.gains):
                return x
            if layer == 0 and kept is not None:
                x = x * kept.to(x.dtype) / (1 - DROPOUT)
            x = F.layer_norm(x, x.shape[-1:]) * self.gains[layer] + self.shifts[layer]
            x = F.mish(x)
        raise AssertionError("an ensemble ends in a linear layer")


class Drawn(NamedTuple):
    """All chance in the loss of B windows over a horizon of H: of the targets, and of what is learned."""

    noise: tuple[Tensor, Tensor]
    """of the policy's actions, (B, H, A) and (B, H + 1, A)"""
    pairs: tuple[Tensor, Tensor]
    """the two values of the ensemble that are compared, (2,) each"""
    shifts: tuple[Tensor, Tensor] | None
    """of frames, (2, B·H, 1) and (2, B, 1); None where nothing is shifted"""
    kept: Tensor | None
    """units of the values' first layer, (members, B·H, units); None where nothing is dropped"""
    ends: Tensor | None
    """(B,), of windows that are a whole episode, whether its last rows are taken; None where no end is learned"""


def sample_action(mean_and_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A squashed Gaussian action and its scaled entropy.

    Args:
        mean_and_log_std: (..., 2·A), the latter squeezed into :data:`LOG_STD`.
        noise: (..., A), normal.

    Returns:
        Actions (..., A) in [-1, 1]; entropy (..., 1), scaled as upstream does, by A times the Gaussian's share of it.
    """
    mean, log_std = mean_and_log_std.chunk(2, -1)
    log_std = LOG_STD[0] + (LOG_STD[1] - LOG_STD[0]) / 2 * (torch.tanh(log_std) + 1)
    action = torch.tanh(mean + noise * log_std.exp())
    gaussian, logp = log_probabilities(noise, log_std, action)
    scale = gaussian * mean.shape[-1] / (logp + 1e-8)
    return action, -logp * scale


def log_probabilities(noise: Tensor, log_std: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Of a Gaussian before and after its squashing onto ``action``: (..., A) thrice -> (..., 1) twice."""
    gaussian = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
    squashed = torch.log(F.relu(1 - action.square()) + 1e-6).sum(-1, keepdim=True)
    return gaussian, gaussian - squashed


class RunningScale(nn.Module):
    """How far values are spread, from their 5th to their 95th percentile; at least 1."""

    value: Tensor
    percentiles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(()))
        self.register_buffer("percentiles", torch.tensor(PERCENTILES), persistent=False)

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Move towards the spread of these values (N,)."""
        low, high = torch.quantile(gathered(values).to(self.value.dtype), self.percentiles)
        self.value.lerp_((high - low).clamp_min(1.0), TAU)

    def forward(self, values: Tensor) -> Tensor:
        """Values in units of their spread."""
        return values / self.value


def discount_of(steps: int) -> float:
    """The discount that upstream chooses for episodes of so many transitions (``tdmpc2.py: _get_discount``)."""
    fraction = steps / 5
    return min(max((fraction - 1) / fraction, 0.95), 0.995)

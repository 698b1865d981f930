"""What TD-MPC2's networks are made of, and how it reads a stack of three observations.

After nicklashansen/tdmpc2 at e9f5932 (``tdmpc2/common/layers.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pvrpipe.worldmodel.ranks import own_part

STACK = 3
GROUP = 8  # a latent is groups of eight numbers that sum to one
PIXELS, CHANNELS, PAD = 64, 32, 3  # of the frames, of the convolutions, of the random shift
ENCODERS = {"vector": ("mlp",), "tokens": ("attention",), "pixels": ("cnn",)}


class SimNorm(nn.Module):
    """Softmax over groups of eight (TD-MPC2, equation 5)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        groups = x.unflatten(-1, (-1, GROUP))
        if x.device.type == "cpu":  # whose softmax along a few neighbours is slow
            return torch.softmax(groups.mT, -2).mT.flatten(-2)
        return torch.softmax(groups, -1).flatten(-2)


def layer(features: int, units: int, activation: nn.Module) -> list[nn.Module]:
    """A linear map, layer norm, and the activation."""
    return [nn.Linear(features, units), nn.LayerNorm(units), activation]


def mlp(features: int, units: int, layers: int, last: list[nn.Module]) -> nn.Sequential:
    """``layers`` hidden Mish layers and the last one as given."""
    hidden = [m for i in range(layers) for m in layer(units if i else features, units, nn.Mish())]
    return nn.Sequential(*hidden, *last)


def stacked(observation: Tensor) -> Tensor:
    """The last three observations of each row side by side along their last axis, oldest first.

    Args:
        observation: (B, T, ..., D); before row 0, it is repeated.

    Returns:
        (B, T, ..., 3·D).
    """
    rows = observation.shape[1]
    before = observation[:, :1].expand(-1, STACK - 1, *observation.shape[2:])
    led = torch.cat([before, observation], 1)
    return torch.cat([led[:, lag : lag + rows] for lag in range(STACK)], -1)


class ConvEncoder(nn.Module):
    """Upstream's convolutions over three frames of 64 × 64, randomly shifted while learning, onto the latent.

    Their 512 numbers are the latent of the published size for pixels, 5m; other sizes get a linear map.
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        widths, kernels, strides = (3 * STACK, *[CHANNELS] * 4), (7, 5, 3, 3), (2, 2, 2, 1)
        convolutions = [
            nn.Conv2d(a, b, kernel, stride)
            for a, b, kernel, stride in zip(widths, widths[1:], kernels, strides, strict=False)
        ]
        layers = [part for c in convolutions for part in (c, nn.ReLU())][:-1]
        flat = CHANNELS * 4 * 4
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), *([nn.Linear(flat, latent)] if latent != flat else [])
        )
        self.simnorm = SimNorm()

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """(..., 64, 64, 9) in [0, 1] -> (..., latent), each stack shifted ``by`` so many pixels (2, N, 1)."""
        frames = x.flatten(0, -4).permute(0, 3, 1, 2) - 0.5
        if by is not None:
            frames = shifted(frames, by)
        return self.simnorm(self.layers(frames)).unflatten(0, x.shape[:-3])


def shifts(count: int, random: torch.Generator) -> Tensor:
    """Pixels to move so many frames by, each way: (2, N, 1) from -3 to 3."""
    return own_part(
        lambda whole: torch.randint(-PAD, PAD + 1, whole, generator=random, device=random.device),
        (2, count, 1),
        1,
    )


def shifted(frames: Tensor, by: Tensor) -> Tensor:
    """Frames (N, C, H, W) moved ``by`` so many pixels (2, N, 1), their edges repeated (Yarats et al. 2021)."""
    N, _, H, W = frames.shape
    rows, columns = (
        (torch.arange(side, device=frames.device) + shift).clamp(0, side - 1)
        for side, shift in zip((H, W), by, strict=True)
    )
    lanes = torch.arange(N, device=frames.device)[:, None, None]
    return frames.permute(0, 2, 3, 1)[lanes, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

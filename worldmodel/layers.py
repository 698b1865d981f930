"""The layers DreamerV3 is made of, and how its authors initialise them (danijar/dreamerv3 ``embodied/jax/nets.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvrpipe.worldmodel.steps import NORM_EPS

INIT_STD = 1.1368  # makes up for cutting a normal off at two standard deviations


class BlockLinear(nn.Module):
    """G independent linear maps over G equal slices of the features."""

    def __init__(self, features: int, out: int, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, features // blocks, out // blocks))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, in / G) -> (B, G, out / G)."""
        G, _, width = self.weight.shape
        return torch.einsum("bgi,gio->bgo", x, self.weight) + self.bias.view(G, width)


class Layer(nn.Module):
    """A linear map, RMS norm without shift, and silu."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, units)
        self.norm = nn.RMSNorm(units, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., units)."""
        return F.silu(self.norm(self.linear(x).to(self.norm.weight.dtype)))  # norms in full precision


class MLP(nn.Module):
    """Hidden layers and a linear output."""

    def __init__(self, features: int, units: int, layers: int, out: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(*(Layer(units if i else features, units) for i in range(layers)))
        self.out = nn.Linear(units, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., out)."""
        return self.out(self.hidden(x))


class ConvLayer(nn.Module):
    """A convolution that keeps the size, the largest of each ``pool`` × ``pool``, RMS norm over the channels, silu."""

    def __init__(self, channels: int, out: int, kernel: int, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
        self.norm = nn.RMSNorm(out, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out, H / pool, W / pool); in channels-last memory nothing is moved."""
        x = self.conv(x)
        x = F.max_pool2d(x, self.pool) if self.pool > 1 else x
        x = x.permute(0, 2, 3, 1).to(self.norm.weight.dtype)
        return F.silu(self.norm(x)).permute(0, 3, 1, 2)


def initialise(module: nn.Module) -> None:
    """Truncated normal by fan-in; a block kernel counts the fan-in of all its blocks together."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, BlockLinear, nn.Conv2d)):
            kernel = part.weight
            fan_in = kernel[..., 0].numel() if isinstance(part, BlockLinear) else kernel[0].numel()
            std = INIT_STD / fan_in**0.5
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

"""Position embeddings for another grid than a network was trained on; every implementation has its own way."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrpipe.pipeline.pvrs import Positions
from pvrpipe.schemas.errors import WeightsError

INTERPOLATION_OFFSET = 0.1  # "historical kludge" of DINOv2's hub


def resample_positions(positions: Tensor, tokens: int, how: Positions = "dinov2-hub") -> Tensor:
    """Position embeddings (1, P + h², D) on a smaller or larger grid (1, P + H², D), P being 0 or 1.

    - ``dinov2-hub``: bicubic by a scale of (H + 0.1) / h, without antialiasing: facebookresearch/dinov2,
      hub/backbones.py (``interpolate_offset=0.1``). timm and transformers differ from it, and from each other.
    - ``bicubic-antialias``: to the size H, as that hub does with registers, and timm with every model.
    - ``bilinear``: to the size H, as RADIO does.

    Raises:
        WeightsError: they are of no square grid.
    """
    if positions.shape[1] == tokens:
        return positions
    (old, prefix), (side, others) = _grid(positions.shape[1]), _grid(tokens)
    if prefix != others:
        raise WeightsError(
            f"positions of {positions.shape[1]} tokens do not fit {tokens}; give the checkpoint of this very encoder"
        )
    grid = positions[:, prefix:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if how == "dinov2-hub":
        scale = (side + INTERPOLATION_OFFSET) / old
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    else:
        bilinear = how == "bilinear"
        grid = F.interpolate(
            grid, size=(side, side), mode="bilinear" if bilinear else "bicubic", antialias=not bilinear
        )
    patches = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    return torch.cat([positions[:, :prefix].float(), patches], dim=1)


def _grid(tokens: int) -> tuple[int, int]:
    """Side of the square grid, and how many tokens come before it."""
    for prefix in (0, 1):
        side = isqrt(tokens - prefix)
        if side * side == tokens - prefix:
            return side, prefix
    raise WeightsError(
        f"positions of {tokens} tokens are of no square grid; give the checkpoint of this very encoder"
    )

"""Frames resized, cut and normalised on a GPU: one kernel for each axis, in Triton.

To resize is a linear map of each axis, so its weights are what torch makes of the identity, and no filter is written
here. Out of torch's own kernels the same takes longer than a small ViT takes for the frames (docs/LOG.md).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from pvrpipe.schemas.specifications import Recipe

BLOCK = 1024  # values that one program makes


def resize_and_normalise(
    frames: Tensor,
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    recipe: Recipe,
    normalise: tuple[Tensor, Tensor],
) -> Tensor:
    """Frames (B, H, W, 3) uint8 to (B, 3, h, w) float32, channels last in memory.

    Args:
        frames: on a GPU.
        size: height and width that they are resized to; the width comes first.
        window: top, left, height h and width w of what is kept of that.
        recipe: which filter, and whether values are rounded to 8 bits after each axis.
        normalise: what values are multiplied by, and what is subtracted then, (1, 3, 1, 1) each.
    """
    batch, height, width, _ = frames.shape
    top, left, tall, wide = window
    values = frames.contiguous()
    if (size[1], wide) != (width, width):
        taps = _taps(width, size[1], left, wide, recipe.interpolation, recipe.antialias, frames.device)
        kind = torch.uint8 if recipe.rounded else torch.float32
        narrow = torch.empty((batch * height, wide, 3), dtype=kind, device=frames.device)
        _along_an_axis(values.view(batch * height, width, 3), narrow, taps, recipe.rounded)
        values = narrow
    taps = _taps(height, size[0], top, tall, recipe.interpolation, recipe.antialias, frames.device)
    found = torch.empty((batch, tall, wide * 3), dtype=torch.float32, device=frames.device)
    _along_an_axis(values.view(batch, height, wide * 3), found, taps, recipe.rounded, normalise)
    return found.view(batch, tall, wide, 3).permute(0, 3, 1, 2)


@functools.cache
@torch.inference_mode(mode=False)
def _taps(
    length: int, size: int, begin: int, kept: int, interpolation: str, antialias: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each value kept of an axis of ``length`` resized to ``size``: the first that it is made of, and K weights."""
    identity = torch.eye(length, dtype=torch.float64)[None, None]
    made = F.interpolate(
        identity, size=[length, size], mode=interpolation, antialias=antialias, align_corners=False
    )
    weights = made[0, 0, :, begin : begin + kept].T
    used = weights != 0
    first = used.long().argmax(1)
    count = int((length - used.flip(1).long().argmax(1) - first).max())
    first = first.clamp(max=length - count)
    weights = weights.gather(1, first[:, None] + torch.arange(count))
    return first.int().to(device), weights.float().contiguous().to(device)


def _along_an_axis(
    values: Tensor,
    found: Tensor,
    taps: tuple[Tensor, Tensor],
    rounded: bool,
    normalise: tuple[Tensor, Tensor] | None = None,
) -> None:
    """(outer, length, inner) to (outer, kept, inner)."""
    first, weights = taps
    _, kept, inner = found.shape
    _axis[triton.cdiv(found.numel(), BLOCK),](
        values,
        found,
        first,
        weights,
        *(normalise or (weights, weights)),
        found.numel(),
        values.shape[1],
        KEPT=kept,
        INNER=inner,
        TAPS=weights.shape[1],
        ROUNDED=rounded,
        NORMALISED=normalise is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # a product and a difference round twice, as torch's do
    )


@triton.jit
def _axis(
    values: tl.tensor,
    found: tl.tensor,
    first: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    total: tl.tensor,
    length: tl.tensor,
    KEPT: tl.constexpr,
    INNER: tl.constexpr,
    TAPS: tl.constexpr,
    ROUNDED: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    i, outer = at // INNER % KEPT, at // (INNER * KEPT)
    source = (outer * length + tl.load(first + i, inside, 0)) * INNER + at % INNER
    made = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TAPS):
        value = tl.load(values + source + k * INNER, inside, 0).to(tl.float32)
        made += tl.load(weights + i * TAPS + k, inside, 0.0) * value
    if ROUNDED:  # halves go up, as in PIL
        made = tl.minimum(tl.maximum(tl.floor(made + 0.5), 0.0), 255.0)
    if NORMALISED:
        made = made * tl.load(scale + at % 3) - tl.load(shift + at % 3)
    tl.store(found + at, made.to(found.dtype.element_ty), inside)

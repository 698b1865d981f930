"""From uint8 frames to the input of a network, on the device, by the recipe in the manifest.

The authors' pipelines resize 8-bit images with PIL, which rounds and clips to 0 … 255; so do we, and
the result is theirs to two grey levels, and to a tenth of one on average (tests/test_pipeline_preprocessing.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrpipe.schemas.errors import EncodingError
from pvrpipe.schemas.specifications import Recipe


def preprocess(frames: Tensor, recipe: Recipe) -> Tensor:
    """Frames (B, H, W, 3) uint8 to (B, 3, crop, crop) float32, channels last in memory.

    Raises:
        EncodingError: the frames are not uint8 RGB, or smaller than the crop where nothing resizes them.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
        raise EncodingError(
            f"frames must be uint8 (B, H, W, 3), these are {frames.dtype} {list(frames.shape)}; "
            "store RGB frames as uint8"
        )
    pixels = frames.permute(0, 3, 1, 2)
    if recipe.resize is not None:
        pixels = _resized(pixels, recipe, recipe.resize)
    if recipe.crop is not None:
        pixels = _middle(pixels, recipe.crop)
    scale, shift = _scale_and_shift(recipe.mean, recipe.std, frames.device)
    values = pixels.to(torch.float32, memory_format=torch.channels_last)
    return values.mul_(scale).sub_(shift)


@functools.cache
@torch.inference_mode(mode=False)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What bytes are multiplied by, and what is subtracted then, (1, 3, 1, 1) each.

    Kept, because to bring numbers to a GPU from memory that is not pinned is to wait for all that it has to do.
    """
    means, deviations = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return 1 / (255 * deviations), means / deviations


def _resized(pixels: Tensor, recipe: Recipe, side: int) -> Tensor:
    """The shortest side, or with ``squash`` both, to ``side`` pixels.

    ``rounded``: as Pillow up to 12 does; on a CPU by torch's kernels for bytes, which compute in fixed point as Pillow
    does, and take a tenth of the time. Not ``rounded``: as torchvision resizes a float tensor.
    """
    height, width = pixels.shape[2:]
    shortest = min(height, width)
    wide, tall = (side, side) if recipe.squash else (side * width // shortest, side * height // shortest)
    if (tall, wide) == (height, width):
        return pixels
    if not recipe.rounded:
        return _interpolated(pixels.float(), recipe, tall, wide)
    if pixels.device.type == "cpu":
        return _interpolated(pixels, recipe, tall, wide)
    return resized_in_two_passes(pixels, recipe, tall, wide)


def resized_in_two_passes(pixels: Tensor, recipe: Recipe, tall: int, wide: int) -> Tensor:
    """Bytes (B, 3, H, W) to whole floats (B, 3, tall, wide): the width and then the height, 8 bits in between.

    In one pass, an overshoot of the bicubic filter along one axis would be seen along the other, and values next
    to black and white would come out up to 18 grey levels away from PIL's.
    """
    values = pixels.float()
    for size in ((pixels.shape[2], wide), (tall, wide)):
        values = _interpolated(values, recipe, *size)
        values = values.add_(0.5).floor_().clamp_(0, 255)  # halves go up, as in PIL
    return values


def _interpolated(pixels: Tensor, recipe: Recipe, tall: int, wide: int) -> Tensor:
    return F.interpolate(
        pixels, size=[tall, wide], mode=recipe.interpolation, antialias=recipe.antialias, align_corners=False
    )


def _middle(pixels: Tensor, crop: int) -> Tensor:
    """The middle ``crop`` × ``crop`` pixels; torchvision's CenterCrop rounds the same way."""
    height, width = pixels.shape[2:]
    if height < crop or width < crop:
        raise EncodingError(
            f"frames of {height} × {width} are smaller than the {crop} pixels that this encoder takes; "
            f"collect with --size {crop}"
        )
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    return pixels[:, :, top : top + crop, left : left + crop]

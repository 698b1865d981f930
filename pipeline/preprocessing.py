"""From uint8 frames to the input of a network, on the device, by the recipe in the manifest.

The authors' pipelines resize 8-bit images with PIL, which rounds and clips to 0 … 255; so do we, and
the result is theirs to two grey levels, and to a tenth of one on average (tests/test_pipeline_preprocessing.py).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrpipe.schemas.errors import EncodingError, one_line
from pvrpipe.schemas.specifications import Recipe

MOST_VALUES = 1 << 29  # of a batch of frames: the kernels count in 32 bits


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
    size = _resized_to(frames, recipe)
    window = _middle(size, recipe.crop)
    normalise = _scale_and_shift(recipe.mean, recipe.std, frames.device)
    kernels = own_kernels(frames.device)
    if kernels is not None and frames.numel() < MOST_VALUES:
        return kernels(frames, size, window, recipe, normalise)
    pixels = frames.permute(0, 3, 1, 2)
    if pixels.shape[2:] != size:
        pixels = _resized(pixels, recipe, size)
    top, left, tall, wide = window
    scale, shift = normalise
    values = pixels[:, :, top : top + tall, left : left + wide]
    return values.to(torch.float32, memory_format=torch.channels_last).mul_(scale).sub_(shift)


@functools.cache
def own_kernels(device: torch.device) -> Callable[..., Tensor] | None:
    """Those for a GPU, where Triton is and finds a C compiler; else torch's own do the work, more slowly."""
    if device.type != "cuda":
        return None
    try:
        from pvrpipe.pipeline.resizing import resize_and_normalise

        recipe = Recipe(
            resize=4, interpolation="bicubic", antialias=True, crop=4, mean=(0,) * 3, std=(1,) * 3
        )
        frames, one = (
            torch.zeros((1, 8, 8, 3), dtype=torch.uint8, device=device),
            torch.ones(3, device=device),
        )
        resize_and_normalise(frames, (4, 4), (0, 0, 4, 4), recipe, (one, one))
    except ImportError:
        return None
    except Exception as error:  # of Triton, of its compiler, of the driver: there is no common one
        warnings.warn(
            f"Triton cannot be used, frames are resized more slowly: {one_line(error)}", stacklevel=2
        )
        return None
    return resize_and_normalise


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


def _resized_to(frames: Tensor, recipe: Recipe) -> tuple[int, int]:
    """Height and width: the shortest side, or with ``squash`` both, as the recipe says."""
    height, width = frames.shape[1:3]
    side, shortest = recipe.resize, min(height, width)
    if side is None:
        return height, width
    return (side, side) if recipe.squash else (side * height // shortest, side * width // shortest)


def _resized(pixels: Tensor, recipe: Recipe, size: tuple[int, int]) -> Tensor:
    """Pixels (B, 3, H, W) of another height and width.

    ``rounded``: as Pillow up to 12 does; on a CPU by torch's kernels for bytes, which compute in fixed point as Pillow
    does, and take a tenth of the time. Not ``rounded``: as torchvision resizes a float tensor.
    """
    if not recipe.rounded:
        return _interpolated(pixels.float(), recipe, *size)
    if pixels.device.type == "cpu":
        return _interpolated(pixels, recipe, *size)
    return resized_in_two_passes(pixels, recipe, *size)


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


def _middle(size: tuple[int, int], crop: int | None) -> tuple[int, int, int, int]:
    """Top, left, height and width of the middle ``crop`` × ``crop`` pixels, as torchvision's CenterCrop rounds them."""
    height, width = size
    if crop is None:
        return 0, 0, height, width
    if height < crop or width < crop:
        raise EncodingError(
            f"frames of {height} × {width} are smaller than the {crop} pixels that this encoder takes; "
            f"collect with --size {crop}"
        )
    return round((height - crop) / 2), round((width - crop) / 2), crop, crop

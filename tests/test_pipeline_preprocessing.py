"""Preprocessing agrees with the authors' PIL pipeline, whatever the size of the frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pvrpipe.pipeline.preprocessing import preprocess, resized_in_two_passes
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import EncodingError
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.specifications import Recipe

from .zoo_table import bound_of

PIL = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def smooth_frames(height: int, width: int) -> np.ndarray:
    """Rendered scenes are smooth with edges: a gradient, a disc and some noise."""
    y, x = np.mgrid[:height, :width]
    random = np.random.default_rng(0)
    image = np.stack(
        [x * 255 / width, y * 255 / height, 255 * ((x - width / 2) ** 2 + (y - height / 3) ** 2 < 400)], -1
    )
    return (image + random.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)[None]


def widths_first(image: Image.Image, size: tuple[int, int], filter_: str) -> Image.Image:
    """PIL's resize as the authors' Pillow does it; Pillow 13 begins with the axis that is cheaper."""
    wide = image.resize((size[0], image.height), RESAMPLE[filter_])
    return wide.resize(size, RESAMPLE[filter_])


RECIPES = {canonical_json(p.recipe.model_dump(mode="json")): name for name, p in reversed(PVRS.items())}


@pytest.mark.parametrize("name", sorted(n for n in RECIPES.values() if PVRS[n].recipe.resize))
@pytest.mark.parametrize("size", [(256, 256), (64, 64), (224, 224), (480, 640), (300, 200)])
def test_agrees_with_the_authors_pipeline(name: str, size: tuple[int, int]) -> None:
    """PIL's to a grey level, torchvision's of float tensors to a thousandth of one; each recipe of the zoo once."""
    recipe = PVRS[name].recipe
    frames = smooth_frames(*size)
    side = (recipe.resize, recipe.resize) if recipe.squash else recipe.resize
    resize = transforms.Resize(side, interpolation=PIL[recipe.interpolation], antialias=recipe.antialias)
    crop, to_tensor = transforms.CenterCrop(recipe.crop), transforms.ToTensor()
    steps = [to_tensor, resize, crop]
    if recipe.rounded:
        steps = [lambda image: widths_first(image, resize(image).size, recipe.interpolation), crop, to_tensor]
    pipeline = transforms.Compose([*steps, transforms.Normalize(recipe.mean, recipe.std)])
    theirs = pipeline(Image.fromarray(frames[0]))
    values = preprocess(torch.from_numpy(frames), recipe)[0]
    difference = (values - theirs).abs() * torch.tensor(recipe.std).view(3, 1, 1) * 255
    assert difference.max() < bound_of(recipe) + (0.01 if recipe.rounded else 0)
    if not recipe.rounded:
        return
    # PIL computes in fixed point: a tie may fall to the other side twice
    assert (difference > 1.01).double().mean() < 2e-4
    assert difference.mean() < 0.1


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(256, 256), (64, 64), (480, 640), (300, 200)])
def test_a_gpu_resizes_as_pil_does_too(filter_: str, size: tuple[int, int]) -> None:
    """Where torch has no kernels for bytes, two passes in float stand in for them."""
    frames = smooth_frames(*size)
    recipe = PVRS["vc1"].recipe.model_copy(update={"interpolation": filter_})
    tall, wide = (224 * side // min(size) for side in size)
    theirs = np.asarray(widths_first(Image.fromarray(frames[0]), (wide, tall), filter_))
    ours = resized_in_two_passes(torch.from_numpy(frames).permute(0, 3, 1, 2), recipe, tall, wide)
    difference = np.abs(ours[0].permute(1, 2, 0).numpy() - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.11  # halves of a bilinear filter: PIL's fixed point takes them down


def test_an_overwide_frame_is_squashed_or_cropped_as_its_recipe_says() -> None:
    frames = torch.from_numpy(smooth_frames(100, 400))
    for name, side in (("dinov3-b", 256), ("siglip-b16", 224), ("vc1", 224)):
        assert preprocess(frames, PVRS[name].recipe).shape == (1, 3, side, side)
    left = frames.clone()
    left[:, :, :40] = 255  # outside of the middle: only a squashed frame shows it
    for name, seen in (("siglip-b16", True), ("vc1", False)):
        recipe = PVRS[name].recipe
        assert bool((preprocess(frames, recipe) != preprocess(left, recipe)).any()) == seen


def test_frames_of_the_right_size_are_only_cropped_and_normalised() -> None:
    recipe = PVRS["vc1"].recipe
    frames = torch.from_numpy(smooth_frames(256, 256))
    expected = (
        frames[:, 16:240, 16:240].permute(0, 3, 1, 2).double() / 255 - torch.tensor(recipe.mean).view(3, 1, 1)
    ) / (torch.tensor(recipe.std).view(3, 1, 1))
    torch.testing.assert_close(preprocess(frames, recipe).double(), expected, rtol=1e-5, atol=1e-6)


def test_frames_taken_as_they_are_keep_every_level() -> None:
    """PIE-G's x / 255 - 0.5, whatever their size."""
    recipe, frames = PVRS["pieg"].recipe, torch.from_numpy(smooth_frames(84, 112))
    levels = (preprocess(frames, recipe) + 0.5) * 255
    assert bound_of(recipe) == 0
    assert torch.equal(levels.round().to(torch.uint8).permute(0, 2, 3, 1), frames)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 256, 256, 3),
        torch.zeros(1, 256, 256, 4, dtype=torch.uint8),
        torch.zeros(1, 256, 256, 1, dtype=torch.uint8),
        torch.zeros(256, 256, 3, dtype=torch.uint8),
    ],
    ids=["float", "alpha", "grey", "no batch"],
)
def test_frames_that_are_not_uint8_rgb_are_refused(frames: torch.Tensor) -> None:
    with pytest.raises(EncodingError, match="must be uint8"):
        preprocess(frames, PVRS["vc1"].recipe)


def test_frames_smaller_than_the_crop_are_refused_where_nothing_resizes_them() -> None:
    recipe = PVRS["vc1"].recipe.model_copy(update={"resize": None})
    with pytest.raises(EncodingError, match="collect with --size 224"):
        preprocess(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), recipe)


@pytest.mark.parametrize("size", [(9, 11), (11, 9), (10, 13), (15, 8)])
def test_the_crop_is_torchvisions_to_the_pixel(size: tuple[int, int]) -> None:
    """Half a pixel over goes to one side or to the other: round, as torchvision does, not floor."""
    recipe = Recipe(
        resize=None, interpolation="bilinear", antialias=True, crop=8, mean=(0,) * 3, std=(1 / 255,) * 3
    )
    pixels = torch.arange(size[0] * size[1], dtype=torch.uint8).view(1, *size, 1).expand(-1, -1, -1, 3)
    theirs = transforms.CenterCrop(8)(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(preprocess(pixels, recipe), theirs.float())

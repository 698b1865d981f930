"""Preprocessing agrees with the authors' PIL pipeline, whatever the size of the frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import EncodingError

PIL = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}


def smooth_frames(height: int, width: int) -> np.ndarray:
    """Rendered scenes are smooth with edges: a gradient, a disc and some noise."""
    y, x = np.mgrid[:height, :width]
    random = np.random.default_rng(0)
    image = np.stack(
        [x * 255 / width, y * 255 / height, 255 * ((x - width / 2) ** 2 + (y - height / 3) ** 2 < 400)], -1
    )
    return (image + random.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)[None]


@pytest.mark.parametrize("name", ["vc1", "resnet18", "clip-l14"])
@pytest.mark.parametrize("size", [(256, 256), (64, 64), (112, 112), (224, 224), (480, 640), (300, 200)])
def test_agrees_with_the_authors_pipeline_to_a_grey_level(name: str, size: tuple[int, int]) -> None:
    recipe = PVRS[name].recipe
    frames = smooth_frames(*size)
    pipeline = transforms.Compose(
        [
            transforms.Resize(recipe.resize, interpolation=PIL[recipe.interpolation]),
            transforms.CenterCrop(recipe.crop),
            transforms.ToTensor(),
        ]
    )
    theirs = pipeline(Image.fromarray(frames[0])) * 255
    values = preprocess(torch.from_numpy(frames), recipe)[0]
    ours = (values * torch.tensor(recipe.std).view(3, 1, 1) + torch.tensor(recipe.mean).view(3, 1, 1)) * 255
    difference = (ours - theirs).abs()
    assert difference.max() < 2.01  # PIL computes in fixed point: a tie may fall to the other side twice
    assert (difference > 1.01).double().mean() < 1e-4
    assert difference.mean() < 0.02


def test_frames_of_the_right_size_are_only_cropped_and_normalised() -> None:
    recipe = PVRS["vc1"].recipe
    frames = torch.from_numpy(smooth_frames(256, 256))
    expected = (
        frames[:, 16:240, 16:240].permute(0, 3, 1, 2).double() / 255 - torch.tensor(recipe.mean).view(3, 1, 1)
    ) / (torch.tensor(recipe.std).view(3, 1, 1))
    torch.testing.assert_close(preprocess(frames, recipe).double(), expected, rtol=1e-5, atol=1e-6)


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

"""Recipes read off timm's registry, or off a processor on the Hub, against timm and transformers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.schemas.specifications import Recipe

from .test_pipeline_hub import IMAGES, OLD_CLIP, clip_folder
from .test_pipeline_preprocessing import smooth_frames

SIZES = [(96, 128), (300, 200)]
SQUARE = {"height": 56, "width": 56}


def grey_levels(recipe: Recipe, frames: Any, theirs: Tensor) -> float:
    """By how many of 255 what the network sees differs at most."""
    ours = preprocess(torch.from_numpy(frames), recipe)
    assert ours.shape == theirs.shape
    return float(((ours - theirs) * torch.tensor(recipe.std).view(3, 1, 1) * 255).abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k",
        "resnet18.tv_in1k",
        "vit_base_patch16_clip_224.openai",
        "convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384",  # squashed
    ],
)
def test_a_timm_names_recipe_is_the_transform_that_timm_makes(name: str, size: tuple[int, int]) -> None:
    frames = smooth_frames(*size)
    transform = create_transform(
        **resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    )
    theirs = transform(Image.fromarray(frames[0]))[None]
    assert grey_levels(find_pvr(f"timm:{name}").recipe, frames, theirs) < 2.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        OLD_CLIP,
        {"image_processor_type": "ViTImageProcessor", "size": SQUARE, **IMAGES},
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 64},
            "crop_size": SQUARE,
            **IMAGES,
        },
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, **IMAGES},
        {"image_processor_type": "DINOv3ViTImageProcessor", "size": SQUARE, **IMAGES},
    ],
    ids=lambda processor: processor.get("image_processor_type", "an old one"),
)
def test_a_hub_folders_recipe_is_what_its_processor_does(
    tmp_path: Path, processor: dict[str, Any], size: tuple[int, int]
) -> None:
    clip_folder(tmp_path, processor)
    frames = smooth_frames(*size)
    made: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = made(Image.fromarray(frames[0]), return_tensors="pt").pixel_values
    assert grey_levels(find_pvr(f"hf:{tmp_path}").recipe, frames, theirs) < 0.01

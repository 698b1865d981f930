"""What a frozen pre-trained visual representation is, as data: weights, architecture, recipe, readout.

The specifications themselves are in ``zoo_*.py``; facts and pitfalls of each are in docs/pvrs.md. Nothing here
computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pvrpipe.schemas.specifications import Frozen, Recipe

SPEC_FILE = "pvr.json"  # what makes a folder an encoder of one's own
WEIGHTS_FILE = "encoder.safetensors"

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # values in [-1, 1]

Pooling = Literal[
    "cls", "cls+registers", "mean", "map", "projected", "patches", "summary",  # of tokens
    "average", "conv-map", "flat",  # of convolutional maps
    "keypoints",  # of R2D2
    "pooled",  # as the network's own `forward` does
]  # fmt: skip
Positions = Literal["dinov2-hub", "bicubic-antialias", "bilinear", "rope-bf16"]


LARGEST = 2048  # pixels of a side
#: Of timm's ``create_model``: weights from elsewhere, unchecked, and another kind of output.
NOT_OVERRIDES = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
    "features_only",
}


class WeightsSource(Frozen):
    """A file on the Hugging Face Hub at a pinned revision, at an address, or beside its ``pvr.json``."""

    repo: str | None = None
    revision: str | None = None
    url: str | None = None
    file: str = Field(min_length=1, max_length=255)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    # Its first digits, where that is all that its authors publish.
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{6,32}$")
    note: str | None = None  # what there is to know before it is fetched


class KeyMap(Frozen):
    """From the names in a checkpoint to those of our network, in this order.

    ``under``: the entry that holds the tensors, where there is one; a file without it is taken for these tensors
    alone, and is refused if they are not. ``drop``: tensors that belong to other parts of the upstream model, by
    regular expressions of upstream's names. ``rename``: regular expressions, applied one after another.
    ``transpose``: matrices, by regular expressions of the new names, that upstream multiplies from the other side.
    Separate q, k, v are then joined to the qkv that timm uses, one called ``q+kv`` is split into its q and its
    kv, one called ``q-v_bias`` into its q's and its v's. ``fold_class_position``: the class token's position is
    added to the token, as timm stores both. Leading axes of one are added where the network has them.
    """

    under: str | None = None
    drop: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    transpose: tuple[str, ...] = ()
    fold_class_position: bool = False


class Properties(Frozen):
    """How the study groups representations (Schneider et al. 2024, section 3.2)."""

    trained_on: str
    language: bool = False  # text was part of the training
    sequential: bool = False  # neighbouring frames of videos were part of the training
    diverse: bool = False  # more than one kind of images, such as only ImageNet or only indoor scenes


class Pvr(Frozen):
    """One representation, and how it is read out."""

    name: str = Field(pattern=r"^[^.\s\pC][^\pC]*$")  # also of a folder; \pC are what controls a terminal
    title: str
    source: WeightsSource
    architecture: str  # a timm name, or one of those of pipeline/networks.py
    overrides: dict[str, int | float | str | bool] = Field(default_factory=dict)
    keys: KeyMap = KeyMap()
    positions: Positions | None = None  # how position embeddings are made for another grid
    projection: int | None = None  # width after a linear map without bias, as CLIP has
    recipe: Recipe
    layer: str = "last"
    blocks: tuple[int, ...] | None = None
    final_norm: bool = True
    pooling: Pooling
    width: int = Field(gt=0)  # D, of the embedding or of each token; channels of a map
    licence: str
    properties: Properties = Properties(trained_on="")

    @model_validator(mode="after")
    def _can_compute(self) -> Self:
        """Blocks that rise, as they compute one after another; frames that have pixels, values that differ."""
        made, blocks = self.recipe, self.blocks
        if blocks is not None and (not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0):
            raise ValueError(f"blocks {list(blocks)} are no rising list of numbers")
        sizes = [size for size in (made.resize, made.crop) if size is not None]
        if not all(1 <= size <= LARGEST for size in sizes):
            raise ValueError(f"the recipe's resize and crop must be 1 to {LARGEST} pixels")
        if sizes and sizes[-1] > sizes[0]:
            raise ValueError(f"the recipe cuts {made.crop} pixels out of frames of {made.resize}")
        if min(made.std) <= 0 or not all(map(math.isfinite, (*made.mean, *made.std))):
            raise ValueError("the recipe's mean and std must be numbers, and std positive")
        if made.backend != "torch":
            raise ValueError(f"the recipe's backend is torch, there is no '{made.backend}'")
        if elsewhere := sorted(NOT_OVERRIDES & self.overrides.keys()):
            raise ValueError(f"override {elsewhere[0]} is not of the architecture; source names the weights")
        return self

    @property
    def is_transformer(self) -> bool:
        """Whether it is a vision transformer, and not a convolutional network."""
        return self.architecture.startswith(("vit_", "radio", "vjepa"))


def recipe(
    resize: int | None,
    interpolation: Literal["bilinear", "bicubic"],
    values: Mapping[str, tuple[float, ...]],
    crop: int | None = 224,
    **others: Any,
) -> Recipe:
    """A recipe in one line: ``values`` are mean and standard deviation of [0, 1]."""
    return Recipe.model_validate(
        {
            "resize": resize,
            "interpolation": interpolation,
            "antialias": True,
            "crop": crop,
            **values,
            **others,
        }
    )


VIT_RECIPE = recipe(256, "bicubic", IMAGENET)
RESNET_RECIPE = recipe(256, "bilinear", IMAGENET)

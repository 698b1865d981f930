"""A network of one's own that fails as it is told to: timm finds it once this module is imported.

It knows a frame by the number of its first pixel (RGB), which must reach it neither resized nor cut.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm.models
import torch
from torch import Tensor, nn

from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pvrs import SPEC_FILE, Pvr, WeightsSource
from pvrpipe.schemas.manifest import canonical_json
from pvrpipe.schemas.specifications import Recipe

SETTINGS = ("size", "width", "most", "nan_at", "die_at", "lives", "wait")


class Brittle(nn.Module):
    """Embeddings (B, width) of frames (B, 3, size, size)."""

    def __init__(
        self,
        size: int,
        width: int,
        most: int,
        nan_at: int,
        die_at: int,
        lives: str,
        wait: float,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * size * size, width)
        self.most, self.nan_at, self.die_at, self.lives, self.wait = most, nan_at, die_at, Path(lives), wait

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:  # only the shape is asked for
            return self.linear(x.flatten(1))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"a batch of {len(x)} does not fit")
        time.sleep(self.wait)
        first = (x[:, :, 0, 0] * 255).round().long()
        number = (first[:, 0] * 256 + first[:, 1]) * 256 + first[:, 2]
        if (number == self.die_at).any() and any(self.lives.glob("*")):
            next(self.lives.glob("*")).unlink()
            os._exit(1)
        embedding: Tensor = self.linear(x.flatten(1))
        return torch.where((number == self.nan_at)[:, None], torch.nan, embedding)


@timm.models.register_model
def brittle_test_network(pretrained: bool = False, **settings: Any) -> Brittle:
    return Brittle(**{name: value for name, value in settings.items() if name in SETTINGS})


def number_of(frame: np.ndarray) -> int:
    """The number by which the network knows a frame (H, W, 3)."""
    red, green, blue = (int(value) for value in frame[0, 0])
    return (red * 256 + green) * 256 + blue


def brittle(
    folder: Path,
    size: int = 24,
    *,
    batch: int | None = 16,
    most: int = 1 << 20,
    nan_at: int = -1,
    die_at: int = -1,
    lives: int = 0,
    wait: float = 0.0,
    name: str = "brittle",
    seed: int = 0,
) -> EncoderRequest:
    """A request for the network, whose specification is written to ``folder``; ``lives`` is how often it dies."""
    left = folder / "lives"
    left.mkdir(parents=True, exist_ok=True)
    for number in range(lives):
        (left / str(number)).touch()
    pvr = Pvr(
        name=name,
        title="a network that fails",
        source=WeightsSource(file="none"),
        architecture="brittle_test_network",
        overrides={
            "size": size,
            "width": 8,
            "most": most,
            "nan_at": nan_at,
            "die_at": die_at,
            "lives": str(left),
            "wait": wait,
        },
        recipe=Recipe(
            resize=None, interpolation="bilinear", antialias=True, crop=size, mean=(0, 0, 0), std=(1, 1, 1)
        ),
        pooling="pooled",
        width=8,
        licence="none",
    )
    (folder / SPEC_FILE).write_text(canonical_json(pvr.model_dump(mode="json")))
    return EncoderRequest(str(folder), f"random:{seed}", device="cpu", batch=batch)

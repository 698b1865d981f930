"""The small convolutional autoencoder that ``pvrpipe pretrain autoencoder`` trains.

The study's "autoencoder pre-trained on in-distribution task data" (Schneider et al. 2024, section 3.2).
Its stages follow DreamerV3's image encoder: stride-2 convolutions and SiLU, then one linear map to the
latent; the decoder mirrors it. Without norms: on a CPU they cost five times the convolutions (docs/LOG.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.full_precision import in_full

DEPTHS = (1, 2, 3, 4)  # channels of the four stages, as multiples of `channels`


class ConvEncoder(nn.Module):
    """Frames (B, 3, size, size) to latents (B, width)."""

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for depth in DEPTHS:
            layers += [nn.Conv2d(inputs, depth * channels, 4, stride=2, padding=1), nn.SiLU()]
            inputs = depth * channels
        self.stages = nn.Sequential(*layers)
        self.latent = nn.Linear(inputs * (size >> len(DEPTHS)) ** 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch."""
        return in_full(self.latent, self.stages(x).flatten(1))


class ConvDecoder(nn.Module):
    """Latents (B, width) to frames (B, 3, size, size)."""

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__()
        self.side = size >> len(DEPTHS)
        top = DEPTHS[-1] * channels
        self.expand = nn.Linear(width, top * self.side**2)
        layers: list[nn.Module] = []
        for depth in reversed((0, *DEPTHS[:-1])):
            outputs = depth * channels or 3
            layers += [nn.ConvTranspose2d(top, outputs, 4, stride=2, padding=1)]
            layers += [nn.SiLU()] if depth else []
            top = outputs
        self.stages = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Decode a batch."""
        grid = self.expand(z).unflatten(1, (-1, self.side, self.side))
        return self.stages(grid)


class Autoencoder(nn.Module):
    """Encoder and decoder; the loss is the mean squared error of pixels in [-1, 1]."""

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder = (part(size, channels, width) for part in (ConvEncoder, ConvDecoder))

    def objective(self, images: Tensor, later: Tensor, draw: torch.Generator) -> tuple[Tensor, None]:
        """Loss of images (B, 3, size, size)."""
        del later, draw
        return F.mse_loss(self.decoder(self.encoder(images)), images), None

    def follow(self) -> None:
        """Nothing follows by momentum."""

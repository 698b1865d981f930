"""Contrastive objectives: CURL (Laskin et al. 2020, MishaLaskin/curl) and ATC (Stooke et al. 2021, astooke/rlpyt).

Both tell a frame's partner from the other frames of the batch, by a bilinear product with the code of an encoder that
follows by momentum. CURL's partner is another crop of the same frame; ATC's is what is seen ``AHEAD`` steps later,
shifted at random, and a residual predictor stands between.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.autoencoder import ConvEncoder

AHEAD = 3  # steps to ATC's partner, as upstream for the DeepMind Control suite
SHIFT = 4  # pixels, at most, either way
CROPPED = 84 / 100  # side of CURL's crop, as a share of the frame's


class Contrastive(nn.Module):
    """An encoder, its follower, and the bilinear product of their codes."""

    momentum: float

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__()
        self.encoder = ConvEncoder(size, channels, width)
        self.follower = copy.deepcopy(self.encoder).requires_grad_(False)
        self.product = nn.Linear(width, width, bias=False)

    def predicted(self, code: Tensor) -> Tensor:
        """What is compared with the partners' codes (B, D)."""
        return code

    def logits(self, anchors: Tensor, partners: Tensor) -> Tensor:
        """Logits (B, B) of views (B, 3, H, W): row i is of anchor i, and its partner is in column i."""
        with torch.no_grad():
            codes = self.follower(partners)
        return self.product(self.predicted(self.encoder(anchors))) @ codes.T

    @torch.no_grad()
    def follow(self) -> None:
        """Let the follower move towards the encoder; after each update."""
        for mine, its in zip(self.follower.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(its, self.momentum)


class Curl(Contrastive):
    """Another crop of the same frame."""

    momentum = 0.05

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__(size, channels, width)
        self.side = size

    def objective(self, images: Tensor, later: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on frames (B, 3, S, S) that are larger than what the encoder takes."""
        del later
        return info_nce(self.logits(*(random_crops(images, self.side, draw) for _ in range(2))))


class Atc(Contrastive):
    """What is seen some steps later."""

    momentum = 0.01

    def __init__(self, size: int, channels: int, width: int) -> None:
        super().__init__(size, channels, width)
        self.residual = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def predicted(self, code: Tensor) -> Tensor:
        """The code moved on in time by a residual MLP."""
        moved: Tensor = code + self.residual(code)
        return moved

    def objective(self, images: Tensor, later: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on frames (B, 3, size, size) and those ``AHEAD`` steps later."""
        return info_nce(self.logits(random_shifts(images, draw), random_shifts(later, draw)))


def info_nce(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the diagonal of logits (B, B), and how often it is the largest of its row."""
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def random_crops(images: Tensor, side: int, draw: torch.Generator) -> Tensor:
    """A window of ``side`` pixels of each image (B, 3, H, W), anywhere."""
    room = torch.tensor(images.shape[2:]) - side + 1
    corners = (torch.rand(len(images), 2, generator=draw) * room).long().tolist()
    return torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
    )


def random_shifts(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image moved by up to ``SHIFT`` pixels either way, its border repeated."""
    return random_crops(F.pad(images, (SHIFT,) * 4, mode="replicate"), images.shape[2], draw)

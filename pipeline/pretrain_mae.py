"""Masked autoencoding (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; facebookresearch/mae).

Three quarters of the patches are hidden; the encoder sees the rest, a light decoder fills the gaps, and the loss is on
the hidden patches only, each normalised by its own mean and deviation. So predicting every patch's mean costs 1.
The encoder is timm's plain ViT, by its names, and loads like any other ViT.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

MASKED = 0.75
HEAD = 64  # width of an attention head
ARCHITECTURE = "vit_tiny_patch16_224"


class MaskedAutoencoder(nn.Module):
    """A small ViT and its decoder, half as wide and two blocks deep."""

    def __init__(self, size: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = patch
        vit: Any = timm.create_model(
            ARCHITECTURE, num_classes=0, **dict[str, Any](overrides(size, patch, width, depth))
        )
        self.encoder: VisionTransformer = vit
        patches, half = (size // patch) ** 2, width // 2
        self.enter = nn.Linear(width, half)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, half))
        self.positions = nn.Parameter(torch.zeros(1, 1 + patches, half))
        self.decoder = nn.Sequential(*(Block(half, max(1, half // 32), qkv_bias=True) for _ in range(2)))
        self.norm, self.leave = nn.LayerNorm(half), nn.Linear(half, 3 * patch**2)
        for drawn in (self.mask_token, self.positions):
            nn.init.normal_(drawn, std=0.02)

    def objective(self, images: Tensor, later: Tensor, draw: torch.Generator) -> tuple[Tensor, None]:
        """Mean loss over the hidden patches of images (B, 3, size, size)."""
        del later
        target = patches_of(images, self.patch)
        batch, count = target.shape[:2]
        order = torch.rand(batch, count, generator=draw).argsort(1).to(images.device)
        visible = order[:, : max(1, round(count * (1 - MASKED)))]
        seen = self.encode(images, visible)
        predicted = self.decode(seen, order)
        return masked_loss(predicted, target, order[:, visible.shape[1] :]), None

    def follow(self) -> None:
        """Nothing follows by momentum."""

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """CLS token and tokens of the patches ``visible`` (B, V) → (B, 1 + V, D), normed."""
        vit: Any = self.encoder
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        encoded: Tensor = vit.norm(vit.blocks(torch.cat([first, tokens], dim=1)))
        return encoded

    def decode(self, seen: Tensor, order: Tensor) -> Tensor:
        """Tokens of the first patches of ``order`` (B, K) → pixels of all patches (B, K, 3 patch²), in place."""
        tokens = self.enter(seen)
        hidden = self.mask_token.expand(len(tokens), order.shape[1] + 1 - tokens.shape[1], -1)
        shuffled = torch.cat([tokens[:, 1:], hidden], dim=1)
        back = order.argsort(1)[..., None].expand(-1, -1, shuffled.shape[2])
        tokens = torch.cat([tokens[:, :1], shuffled.gather(1, back)], dim=1) + self.positions
        pixels: Tensor = self.leave(self.norm(self.decoder(tokens)))[:, 1:]
        return pixels


def overrides(size: int, patch: int, width: int, depth: int) -> dict[str, int | float | str | bool]:
    """What the encoder differs in from timm's architecture."""
    return {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": max(1, width // HEAD),
    }


def patches_of(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) as patches (B, K, patch² · 3), rows of patches first."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def masked_loss(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Squared error of the patches ``hidden`` (B, M) against normalised targets; both (B, K, P)."""
    mean, variance = target.mean(2, keepdim=True), target.var(2, keepdim=True)
    error = (predicted - (target - mean) / (variance + 1e-6).sqrt()).square().mean(2)
    return error.gather(1, hidden).mean()

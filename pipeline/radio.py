"""RADIO's ViT (Ranzinger et al. 2024): several class tokens, linear patches, positions cut from a large grid.

As NVlabs/RADIO computes it at one resolution; its input conditioner is part of the recipe, and the
positions are brought to that resolution when they are loaded (pipeline/positions.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


class Radio(nn.Module):
    """Frames (B, 3, size, size) to tokens: class and register tokens first, then patches."""

    def __init__(
        self,
        *,
        img_size: int,
        width: int,
        depth: int,
        heads: int,
        class_tokens: int,
        registers: int,
        summaries: str,
        patch: int = 16,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = class_tokens + registers
        # which of the class tokens say what is seen
        self.summaries = [int(n) for n in summaries.split(",")]
        self.patch = patch
        self.patch_embed = nn.Linear(3 * patch * patch, width, bias=False)
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch) ** 2, width) * 0.02)
        self.prefix = nn.Parameter(torch.randn(self.num_prefix_tokens, width) * 0.02)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )

    def tokens(self, x: Tensor, places: Sequence[int], _norm: bool) -> list[tuple[Tensor, Tensor]]:
        """Patches (B, K, D) and prefix tokens (B, P, D) after the blocks at ``places``; there is no final norm."""
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        patches = self.patch_embed(patches) + self.pos_embed
        x = torch.cat([self.prefix.expand(len(x), -1, -1), patches], dim=1)
        outputs = []
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place in places:
                outputs.append((x[:, self.num_prefix_tokens :], x[:, : self.num_prefix_tokens]))
        return outputs

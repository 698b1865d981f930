"""V-JEPA 2's encoder (Assran et al. 2025), transformers' class, seeing one frame at a time.

A frame is a tubelet of two equal frames, as the authors' code takes an image. What the blocks add up is float32 under
``--precision bf16``, as in the other ViTs here, whose position embeddings make it so; and so are the angles of its
positions, which transformers computes in the precision of the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Embeddings, VJEPA2Layer, VJEPA2RopeAttention


class ExactlyTurned(VJEPA2RopeAttention):
    """Queries and keys turned by angles in float32: in bfloat16 the largest, 15, is 0.03 off."""

    def apply_rotary_embeddings(self, qk: Tensor, pos_ids: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Of queries or keys (B, heads, K, D)."""
        turned: Tensor = super().apply_rotary_embeddings(qk.float(), pos_ids)
        return turned.to(qk.dtype)


class VJepa2(nn.Module):
    """Frames (B, 3, size, size) to patch tokens; there is no class token."""

    num_prefix_tokens = 0

    def __init__(self, **config: Any) -> None:
        super().__init__()
        made = VJEPA2Config(**{**config, "attn_implementation": "sdpa"})
        self.patch = made.patch_size
        sizes = {"hidden_size": made.hidden_size, "num_attention_heads": made.num_attention_heads}
        self.embeddings = VJEPA2Embeddings(made, hidden_size=made.hidden_size)
        self.blocks = nn.Sequential(
            *(VJEPA2Layer(made, **sizes, mlp_ratio=made.mlp_ratio) for _ in range(made.num_hidden_layers))
        )
        for block in self.blocks:
            block.attention.__class__ = ExactlyTurned  # another made in its place would draw weights
        self.norm = nn.LayerNorm(made.hidden_size, eps=made.layer_norm_eps)

    def tokens(self, x: Tensor, places: Sequence[int], norm: bool) -> list[tuple[Tensor, Tensor]]:
        """Patches (B, K, D) after the blocks at ``places``, and no prefix tokens (B, 0, D)."""
        x = self.embeddings(x[:, None]).float()  # one frame; transformers repeats it to a tubelet
        outputs = []
        for place, block in enumerate(self.blocks):
            x = block(x, None)[0]
            if place in places:
                y = self.norm(x) if norm else x
                outputs.append((y, y[:, :0]))
        return outputs

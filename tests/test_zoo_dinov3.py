"""DINOv3 in transformers' layout and in Meta's, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from .upstream import (
    FRAMES,
    embed_with,
    encoder_with,
    joined_qkv,
    pixels_for,
    published,
    randomised,
    relative_error,
    shrink,
)

DINOV3_TO_HUB = ((r"^model\.layer\.", "layer."),)


def dinov3(gated: bool) -> nn.Module:
    config = transformers.DINOv3ViTConfig(
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=1536,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        image_size=224,
        attn_implementation="eager",
    )
    return randomised(transformers.DINOv3ViTModel(config))


@pytest.mark.parametrize("name", ["dinov3-s", "dinov3-s+", "dinov3-b", "dinov3-l", "dinov3-h+"])
def test_dinov3_equals_transformers_with_the_authors_periods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Meta's checkpoints hold the periods of the positions in bfloat16; transformers computes them in float32."""
    shrink(monkeypatch, name, overrides={"depth": 2, "embed_dim": 384, "num_heads": 6})
    reference = dinov3(gated=name.endswith("+"))
    safetensors.torch.save_file(published(reference.state_dict(), DINOV3_TO_HUB), tmp_path / "w.safetensors")
    with torch.no_grad():
        in_float32 = reference(pixels_for(name)).last_hidden_state[:, 0]
        rope = next(m for m in reference.modules() if hasattr(m, "inv_freq"))
        rope.inv_freq.copy_(1 / (1 / rope.inv_freq).bfloat16().float())
        theirs = reference(pixels_for(name)).last_hidden_state
    ours = embed_with(name, tmp_path / "w.safetensors")
    assert relative_error(ours, theirs[:, 0]) < 1e-5
    assert relative_error(ours, in_float32) > 1e-5
    assert relative_error(ours, theirs[:, 5:].mean(dim=1)) > 1e-2  # timm's own default pools the patches
    shrink(monkeypatch, name, positions=None)
    assert relative_error(embed_with(name, tmp_path / "w.safetensors"), in_float32) < 1e-5


def in_metas_layout(reference: nn.Module) -> dict[str, Tensor]:
    """facebookresearch/dinov3: joined q, k, v with a masked bias of k, storage tokens, periods in bfloat16."""
    named = published(
        reference.state_dict(),
        (
            (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
            (r"^embeddings\.register_tokens$", "storage_tokens"),
            (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (r"^model\.layer\.", "blocks."),
            (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.up_proj\.", ".mlp.w2." if reference.config.use_gated_mlp else ".mlp.fc1."),
            (r"\.mlp\.gate_proj\.", ".mlp.w1."),
            (r"\.mlp\.down_proj\.", ".mlp.w3." if reference.config.use_gated_mlp else ".mlp.fc2."),
        ),
    )
    for name in [name for name in named if name.endswith(".attn.q.bias")]:
        place = name.removesuffix("q.bias")
        named[f"{place}k.bias"] = torch.full_like(named[name], 7.0)  # masked: it must not count
        named[f"{place}qkv.bias_mask"] = torch.ones(3 * len(named[name]))
    named["rope_embed.periods"] = torch.ones(16, dtype=torch.bfloat16)
    return joined_qkv(named)


@pytest.mark.parametrize("name", ["dinov3-s", "dinov3-s+"])
def test_dinov3_from_metas_form_is_dinov3_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shrink(monkeypatch, name)
    reference = dinov3(gated=name.endswith("+"))
    safetensors.torch.save_file(published(reference.state_dict(), DINOV3_TO_HUB), tmp_path / "w.safetensors")
    torch.save(in_metas_layout(reference), tmp_path / "w.pth")
    ours = encoder_with(name, tmp_path / "w.pth")
    np.testing.assert_array_equal(ours(FRAMES), embed_with(name, tmp_path / "w.safetensors"))

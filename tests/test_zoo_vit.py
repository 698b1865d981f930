"""Vision transformers in upstream's own layout equal an independent implementation with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from pvrpipe.pipeline.positions import resample_positions
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import WeightsError

from .upstream import (
    VIT_TO_HUB,
    VIT_TO_TIMM,
    embed_with,
    joined_qkv,
    noise,
    pixels_for,
    published,
    randomised,
    relative_error,
    shrink,
)

SIZES = {
    "t": (192, 3),
    "s": (384, 6),
    "b": (768, 12),
    "l": (128, 4),
    "h": (128, 4),
}  # large ones in small: the code is the same


def plain_vit(letter: str, depth: int = 2, **config: Any) -> transformers.ViTModel:
    """Transformers' ViT of a size, with weights drawn at random."""
    width, heads = SIZES[letter]
    sizes = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "layer_norm_eps": 1e-6,
    }
    made = transformers.ViTConfig(**{**sizes, **config}, attn_implementation="eager")
    return randomised(transformers.ViTModel(made, add_pooling_layer=False))


def in_timm_layout(vit: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    named = joined_qkv(published(vit.state_dict(), VIT_TO_TIMM))
    return {prefix + name: value for name, value in named.items()}


def mae_checkpoint(path: Path, vit: nn.Module) -> None:
    """facebookresearch/mae and ir413/mvp: encoder, mask token and decoder under ``model``."""
    decoder = {
        "mask_token": noise(1, 1, 512),
        "decoder_pos_embed": noise(1, 197, 512),
        "decoder_embed.weight": noise(512, 8),
        "decoder_blocks.0.attn.qkv.weight": noise(24, 8),
    }
    torch.save({"model": {**in_timm_layout(vit), **decoder}, "epoch": 1}, path)


def mocov3_checkpoint(path: Path, vit: nn.Module) -> None:
    """facebookresearch/moco-v3: a training state with two encoders and a predictor."""
    state = {
        **in_timm_layout(vit, "module.base_encoder."),
        "module.base_encoder.head.0.weight": noise(4, 4),
        "module.momentum_encoder.cls_token": noise(1, 1, 4),
        "module.predictor.0.weight": noise(4, 4),
    }
    torch.save({"epoch": 300, "arch": "vit", "state_dict": state, "optimizer": {"lr": 0.1}}, path)


@pytest.mark.parametrize(
    ("name", "letter", "write", "config"),
    [
        ("vc1", "b", mae_checkpoint, {}),
        ("vc1-l", "l", mae_checkpoint, {}),
        ("vc1-l-permissive", "l", mae_checkpoint, {}),
        ("mae-b", "b", mae_checkpoint, {}),
        ("mae-l", "l", mae_checkpoint, {}),
        ("mae-h", "h", mae_checkpoint, {"patch_size": 14}),
        ("mvp-s", "s", mae_checkpoint, {"num_attention_heads": 12}),
        ("mvp-b", "b", mae_checkpoint, {}),
        ("mvp-l", "l", mae_checkpoint, {"image_size": 256}),
        ("mocov3-s", "s", mocov3_checkpoint, {"num_attention_heads": 12}),
        ("mocov3-b", "b", mocov3_checkpoint, {}),
    ],
)
def test_a_plain_vit_equals_transformers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    letter: str,
    write: Any,
    config: dict[str, int],
) -> None:
    width, heads = SIZES[letter]
    narrow = {"embed_dim": width, "num_heads": heads} if letter in "lh" else {}
    shrink(monkeypatch, name, overrides={"depth": 2, **narrow})
    vit = plain_vit(letter, **config)
    write(tmp_path / "w.pth", vit)
    with torch.no_grad():
        tokens = vit(pixels_for(name)).last_hidden_state
    assert relative_error(embed_with(name, tmp_path / "w.pth"), tokens[:, 0]) < 1e-5
    if config.get("num_attention_heads"):  # timm's ViT-S has 6 heads: it loads, and is another network
        shrink(monkeypatch, name, overrides={"num_heads": 6})
        assert relative_error(embed_with(name, tmp_path / "w.pth"), tokens[:, 0]) > 1e-3


def test_the_cls_token_before_the_final_norm_is_another_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MVP's ``extract_feat`` is what its reinforcement learning used; ``forward`` applies the norm."""
    shrink(monkeypatch, "mvp-b")
    vit = plain_vit("b")
    mae_checkpoint(tmp_path / "w.pth", vit)
    with torch.no_grad():
        hidden = vit(pixels_for("mvp-b"), output_hidden_states=True).hidden_states[-1][:, 0]
        normed = vit.layernorm(hidden)
    before = embed_with("mvp-b", tmp_path / "w.pth", final_norm=False)
    assert relative_error(before, hidden) < 1e-5
    assert relative_error(before, normed) > 1e-2


def dinov2(registers: bool, swiglu: bool, image_size: int) -> nn.Module:
    """Transformers' DINOv2 in small, trained positions for ``image_size``."""
    kind = ("Dinov2WithRegisters" if registers else "Dinov2", {"num_register_tokens": 4} if registers else {})
    config = getattr(transformers, f"{kind[0]}Config")(
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=image_size,
        use_swiglu_ffn=swiglu,
        patch_size=14,
        attn_implementation="eager",
        **kind[1],
    )
    return randomised(getattr(transformers, f"{kind[0]}Model")(config))


def in_dinov2_layout(model: nn.Module) -> dict[str, Tensor]:
    """facebook/dinov2-*: transformers' layout on the Hub, the two halves of SwiGLU in one tensor."""
    named = published(model.state_dict(), VIT_TO_HUB[1:5])
    for name in list(named):
        if ".mlp.gate_proj." in name:
            up = named.pop(name.replace("gate_proj", "up_proj"))
            named[name.replace("gate_proj", "weights_in")] = torch.cat([named.pop(name), up])
        elif ".mlp.down_proj." in name:
            named[name.replace("down_proj", "weights_out")] = named.pop(name)
    return named


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("letter", ["s", "b", "l", "g"])
def test_dinov2_equals_transformers_at_the_size_of_its_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registers: bool, letter: str
) -> None:
    name = f"dinov2-{letter}{'-reg' if registers else ''}"
    shrink(monkeypatch, name, overrides={"depth": 2, "embed_dim": 384, "num_heads": 6})
    reference = dinov2(registers, letter == "g", 224)
    safetensors.torch.save_file(in_dinov2_layout(reference), tmp_path / "w.safetensors")
    with torch.no_grad():
        tokens = reference(pixels_for(name)).last_hidden_state
    assert relative_error(embed_with(name, tmp_path / "w.safetensors"), tokens[:, 0]) < 1e-5
    patches = embed_with(name, tmp_path / "w.safetensors", pooling="patches")
    assert relative_error(patches, tokens[:, 5 if registers else 1 :]) < 1e-5
    if registers:
        prefix = embed_with(name, tmp_path / "w.safetensors", pooling="cls+registers")
        assert relative_error(prefix, tokens[:, :5].flatten(1)) < 1e-5


def test_registers_have_positions_resampled_as_their_own_hub_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Antialiased and by size; DINOv2 without registers is resampled another way, and so is other."""
    shrink(monkeypatch, "dinov2-s-reg")
    reference = dinov2(True, False, 518)
    safetensors.torch.save_file(in_dinov2_layout(reference), tmp_path / "w.safetensors")
    with torch.no_grad():
        theirs = reference(pixels_for("dinov2-s-reg")).last_hidden_state[:, 0]
    assert relative_error(embed_with("dinov2-s-reg", tmp_path / "w.safetensors"), theirs) < 1e-5
    shrink(monkeypatch, "dinov2-s-reg", positions="dinov2-hub")
    assert relative_error(embed_with("dinov2-s-reg", tmp_path / "w.safetensors"), theirs) > 1e-4


def test_positions_of_another_size_equal_timms_and_not_the_hubs() -> None:
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 1 + 14 * 14, 8, generator=torch.Generator().manual_seed(0))
    ours = resample_positions(positions, 1 + 16 * 16, "bicubic-antialias")
    torch.testing.assert_close(ours, resample_abs_pos_embed(positions, [16, 16]))
    assert (ours - resample_positions(positions, 1 + 16 * 16, "dinov2-hub")).abs().max() > 1e-3
    without = resample_positions(positions[:, 1:], 16 * 16, "bicubic-antialias")
    torch.testing.assert_close(without, ours[:, 1:])
    for tokens in (200, 16 * 16):
        with pytest.raises(WeightsError, match="this very encoder"):
            resample_positions(positions, tokens)


def test_ijepa_is_the_mean_of_its_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"depth": 2, "embed_dim": 384, "num_heads": 6}
    shrink(monkeypatch, "ijepa-h", overrides=small)
    config = transformers.IJepaConfig(
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=1536,
        patch_size=14,
        layer_norm_eps=1e-6,
        attn_implementation="eager",
    )
    reference = randomised(transformers.IJepaModel(config, add_pooling_layer=False))
    tensors = published(reference.state_dict(), VIT_TO_HUB)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        theirs = reference(pixels_for("ijepa-h")).last_hidden_state.mean(dim=1)
    assert relative_error(embed_with("ijepa-h", tmp_path), theirs) < 1e-5


@pytest.mark.parametrize("letter", ["t", "s", "b"])
def test_theia_is_its_backbones_patches_without_the_translators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    name = f"theia-{letter}"
    shrink(monkeypatch, name)
    reference = plain_vit(letter, layer_norm_eps=1e-12)
    tensors = published(reference.state_dict(), VIT_TO_HUB, prefix="backbone.model.")
    tensors["translator.translator_heads.x.weight"] = noise(3, 3)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        tokens = reference(pixels_for(name)).last_hidden_state
    assert tokens.shape[1:] == (197, SIZES[letter][0])
    assert relative_error(embed_with(name, tmp_path), tokens[:, 1:]) < 1e-5


def radio_checkpoint(path: Path, config: transformers.RadioConfig) -> nn.Module:
    """nvidia/C-RADIOv4-H: the layout of NVlabs/RADIO under ``radio_model``."""
    reference = randomised(transformers.RadioModel(config))
    for layer in reference.encoder.layer:
        for scale in (layer.layer_scale1, layer.layer_scale2):
            nn.init.ones_(scale.lambda1)
    mean, std = (torch.tensor(getattr(config, f"norm_{n}")).view(3, 1, 1) for n in ("mean", "std"))
    reference.input_conditioner.norm_mean.copy_(mean)
    reference.input_conditioner.norm_std.copy_(std)
    named = joined_qkv(
        published(
            reference.state_dict(),
            (
                (r"^embeddings\.patch_projection", "radio_model.model.patch_generator.embedder"),
                (r"^embeddings\.position_embedding", "radio_model.model.patch_generator.pos_embed"),
                (r"^embeddings\.cls_register_token", "radio_model.model.patch_generator.cls_token.token"),
                (r"^encoder\.layer\.", "radio_model.model.blocks."),
                (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
                (r"\.attention\.o_proj\.", ".attn.proj."),
                (r"^(input_conditioner|summary_idxs)", r"radio_model.\1"),
            ),
        )
    )
    kept = {name: value for name, value in named.items() if "layer_scale" not in name}
    safetensors.torch.save_file(kept, path)
    return reference


def test_radio_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "c-radio-v4-h", overrides={"depth": 2, "width": 64, "heads": 4})
    config = transformers.RadioConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_img_size=512,
        attn_implementation="eager",
    )
    reference = radio_checkpoint(tmp_path / "model.safetensors", config)
    recipe = PVRS["c-radio-v4-h"].recipe
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    with torch.no_grad():
        theirs = reference(pixels_for("c-radio-v4-h") * std + mean)
    assert relative_error(embed_with("c-radio-v4-h", tmp_path), theirs.summary) < 1e-5
    patches = embed_with("c-radio-v4-h", tmp_path, pooling="patches")
    assert relative_error(patches, theirs.features) < 1e-5
    larger = embed_with("c-radio-v4-h", tmp_path, size=256)
    assert np.abs(larger - embed_with("c-radio-v4-h", tmp_path)).max() > 1e-3


def reference_vjepa2(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """facebookresearch/vjepa2 in float64 from its tensors: a frame seen twice, rotary positions along t, y, x."""
    state = {name.removeprefix("encoder."): value.double() for name, value in state.items()}
    kernel = state["embeddings.patch_embeddings.proj.weight"].sum(dim=2)  # both frames are the same
    x = F.conv2d(pixels.double(), kernel, state["embeddings.patch_embeddings.proj.bias"], stride=16)
    side, width = x.shape[-1], x.shape[1]
    x = x.flatten(2).transpose(1, 2)
    head = width // heads
    axis = 2 * ((head // 3) // 2)
    place = torch.arange(side * side)
    axes = (torch.zeros_like(place), place // side, place % side)

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def rotate(y: Tensor, position: Tensor) -> Tensor:
        rate = 10000.0 ** -(torch.arange(axis // 2, dtype=torch.float64) / (axis / 2))
        angle = (position[:, None] * rate).repeat(1, 2)  # as the authors tile it, not repeated pair by pair
        even, odd = y[..., ::2], y[..., 1::2]
        return y * angle.cos() + torch.stack([-odd, even], dim=-1).flatten(-2) * angle.sin()

    def positioned(y: Tensor) -> Tensor:
        parts = [rotate(y[..., n * axis : (n + 1) * axis], position) for n, position in enumerate(axes)]
        return torch.cat([*parts, y[..., 3 * axis :]], dim=-1)

    for n in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("layer."))):
        y = norm(x, f"layer.{n}.norm1")
        q, k, v = (
            linear(y, f"layer.{n}.attention.{part}").unflatten(-1, (heads, head)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weight = (positioned(q) @ positioned(k).transpose(-1, -2) / head**0.5).softmax(dim=-1)
        x = x + linear((weight @ v).transpose(1, 2).flatten(2), f"layer.{n}.attention.proj")
        y = F.gelu(linear(norm(x, f"layer.{n}.norm2"), f"layer.{n}.mlp.fc1"))
        x = x + linear(y, f"layer.{n}.mlp.fc2")
    return norm(x, "layernorm")


@pytest.mark.parametrize("name", ["vjepa2-l", "vjepa2-h", "vjepa2-g"])
def test_vjepa2_equals_a_float64_reference_and_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    shrink(monkeypatch, name, overrides=small)
    config = transformers.VJEPA2Config(
        **PVRS[name].overrides, pred_num_hidden_layers=1, pred_hidden_size=48, pred_num_attention_heads=3
    )
    reference = randomised(transformers.VJEPA2Model(config))
    state = reference.state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    encoder_state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    pixels = pixels_for(name)
    with torch.no_grad():
        theirs = reference(pixels[:, None], skip_predictor=True).last_hidden_state
    ours = embed_with(name, tmp_path, pooling="patches")
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, reference_vjepa2(encoder_state, pixels, heads=3)) < 1e-5
    assert relative_error(embed_with(name, tmp_path), theirs.mean(dim=1)) < 1e-5

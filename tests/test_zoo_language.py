"""CLIP, OpenCLIP, SigLIP and LIV in upstream's own layout equal transformers and open_clip."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.pvrs import CLIP, recipe

from .upstream import (
    FRAMES,
    embed_with,
    encoder_with,
    noise,
    pixels_for,
    published,
    randomised,
    relative_error,
    shrink,
)

SMALL = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "num_hidden_layers": 2}
NARROW = {"depth": 2, "embed_dim": 128, "num_heads": 2}
TEXT = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 100}


@pytest.mark.parametrize(
    ("name", "size", "patch", "width"),
    [("clip-b32", "base", 32, 512), ("clip-b16", "base", 16, 512), ("clip-l14", "large", 14, 768)],
)
def test_clip_equals_transformers_with_quickgelu_and_the_projection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: str, patch: int, width: int
) -> None:
    shrink(monkeypatch, name, overrides=NARROW)
    config = transformers.CLIPConfig(
        vision_config={**SMALL, "patch_size": patch, "image_size": 224},
        text_config=TEXT,
        projection_dim=width,
    )
    reference = randomised(transformers.CLIPModel(config))
    tensors = {**reference.state_dict(), "vision_model.embeddings.position_ids": torch.arange(50)[None]}
    if size == "base":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        pooled = reference.vision_model(pixels_for(name)).pooler_output
        theirs = reference.visual_projection(pooled)
    assert relative_error(embed_with(name, tmp_path), theirs) < 1e-5
    assert relative_error(embed_with(name, tmp_path, pooling="cls"), pooled) < 1e-5
    shrink(monkeypatch, name, architecture=f"vit_{size}_patch{patch}_clip_224")  # with GELU
    assert relative_error(embed_with(name, tmp_path), theirs) > 1e-3


def test_openclip_equals_open_clip_with_gelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, "openclip-h", overrides=NARROW, projection=96, width=96)
    vision = open_clip.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=14, image_size=224)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=100, width=64, heads=2, layers=1)
    reference = randomised(open_clip.model.CLIP(96, vision, text))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "open_clip_model.safetensors")
    with torch.no_grad():
        theirs = reference.encode_image(pixels_for("openclip-h"))
    assert relative_error(embed_with("openclip-h", tmp_path), theirs) < 1e-5
    shrink(monkeypatch, "openclip-h", architecture="vit_huge_patch14_clip_quickgelu_224")
    assert relative_error(embed_with("openclip-h", tmp_path), theirs) > 1e-3


@pytest.mark.parametrize(("name", "patch"), [("siglip-b16", 16), ("siglip2-b16", 16), ("siglip-so400m", 14)])
def test_siglip_equals_transformers_with_its_map_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, patch: int
) -> None:
    shrink(monkeypatch, name, overrides={**NARROW, "mlp_ratio": 4})
    config = transformers.SiglipVisionConfig(**SMALL, patch_size=patch, image_size=224)
    reference = randomised(transformers.SiglipVisionModel(config))
    tensors = published(reference.state_dict(), (), prefix="vision_model.")
    text = {"text_model.final_layer_norm.weight": noise(4), "logit_scale": noise(1), "logit_bias": noise(1)}
    safetensors.torch.save_file({**tensors, **text}, tmp_path / "model.safetensors")
    with torch.no_grad():
        outputs = reference(pixels_for(name))
    assert relative_error(embed_with(name, tmp_path), outputs.pooler_output) < 1e-5
    mean = embed_with(name, tmp_path, pooling="mean")
    assert relative_error(mean, outputs.last_hidden_state.mean(dim=1)) < 1e-5
    assert relative_error(mean, outputs.pooler_output) > 1e-2  # timm's `_gap_` variants have no head
    shrink(monkeypatch, name, overrides={"act_layer": "gelu"})  # timm's own; the authors approximate by tanh
    assert relative_error(embed_with(name, tmp_path), outputs.pooler_output) > 1e-4


def clip_resnet(
    pixels: int = 224, blocks: tuple[int, ...] = (3, 4, 6, 3), heads: int = 32, width: int = 64
) -> nn.Module:
    """open_clip's ModifiedResNet, which is OpenAI's: the 50 where no other is asked for."""
    from open_clip.modified_resnet import ModifiedResNet

    return randomised(ModifiedResNet(blocks, output_dim=1024, heads=heads, image_size=pixels, width=width))


def of_openai(reference: nn.Module, prefix: str) -> dict[str, Tensor]:
    text = {
        "positional_embedding": noise(8, 4),
        "text_projection": noise(4, 4),
        "logit_scale": noise(1),
        "token_embedding.weight": noise(4, 4),
        "transformer.resblocks.0.ln_1.weight": noise(4),
        "ln_final.weight": noise(4),
    }
    tensors = {f"visual.{name}": value for name, value in reference.state_dict().items()}
    return {prefix + name: value for name, value in {**tensors, **text}.items()}


def test_clip_resnet_and_liv_equal_open_clip(tmp_path: Path) -> None:
    reference = clip_resnet()
    torch.save(of_openai(reference, ""), tmp_path / "open_clip_pytorch_model.bin")
    torch.save({"liv": of_openai(reference, "module.model."), "global_step": 1}, tmp_path / "model.pt")
    for name, tensors in (("clip-rn50", 305), ("liv", 305)):
        with torch.no_grad():
            theirs = reference(pixels_for(name))
        encoder = encoder_with(name, tmp_path)
        assert relative_error(embed_with(name, tmp_path), theirs) < 1e-5
        assert encoder.identity.weights.loaded == encoder.identity.weights.expected >= tensors
    batch = clip_resnet().train()(pixels_for("liv"))
    assert relative_error(embed_with("liv", tmp_path), batch) > 1e-2  # statistics of the batch


@pytest.mark.slow  # 420 million parameters
def test_clips_largest_resnet_equals_open_clip(tmp_path: Path) -> None:
    reference = clip_resnet(448, (3, 15, 36, 10), heads=64, width=128)
    safetensors.torch.save_file(of_openai(reference, ""), tmp_path / "model.safetensors")
    with torch.no_grad():
        theirs = reference(pixels_for("clip-rn50x64"))
    assert relative_error(embed_with("clip-rn50x64", tmp_path), theirs) < 1e-5


def test_clips_resnet_at_another_size_resamples_the_positions_of_its_pooling(tmp_path: Path) -> None:
    reference, at_256 = clip_resnet(), clip_resnet(256)
    torch.save(of_openai(reference, ""), tmp_path / "open_clip_pytorch_model.bin")
    tensors = reference.state_dict()
    one, grid = tensors["attnpool.positional_embedding"].split([1, 49])
    grid = grid.T.reshape(1, -1, 7, 7)
    larger = nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)[0].flatten(1).T
    at_256.load_state_dict({**tensors, "attnpool.positional_embedding": torch.cat([one, larger])})
    with torch.no_grad():
        theirs = at_256(preprocess(torch.from_numpy(FRAMES), recipe(256, "bicubic", CLIP, crop=256)))
    assert relative_error(embed_with("clip-rn50", tmp_path, size=256), theirs) < 1e-5


def test_timms_own_layout_of_clips_resnet_loads_too(tmp_path: Path) -> None:
    import timm

    reference = randomised(timm.create_model("resnet50_clip", num_classes=1024))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        theirs = reference(pixels_for("clip-rn50"))
    assert relative_error(embed_with("clip-rn50", tmp_path / "model.safetensors"), theirs) < 1e-5

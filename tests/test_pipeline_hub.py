"""Representations on the Hub by their configuration equal transformers, or timm, with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers
from timm.layers import resample_abs_pos_embed

from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.zoo import find_pvr
from pvrpipe.schemas.errors import WeightsError

from .test_zoo_vit import in_dinov2_layout
from .upstream import FRAMES, VIT_TO_HUB, pixels_of, published, randomised, relative_error

PROCESSOR = {
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 56},
    "size": {"shortest_edge": 64},
    "resample": 3,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


IMAGES = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.4, 0.5]}
CLIP_VISION = {**SMALL, "intermediate_size": 100, "projection_dim": 32}
OLD_CLIP = {**IMAGES, "feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56}


def hub_folder(folder: Path, model: Any, tensors: dict[str, torch.Tensor], processor: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("gated", [False, True])
def test_a_hub_folder_of_dinov2_is_built_by_its_configuration(tmp_path: Path, gated: bool) -> None:
    config = transformers.Dinov2Config(
        **SMALL, mlp_ratio=4, use_swiglu_ffn=gated, attn_implementation="eager"
    )
    reference = randomised(transformers.Dinov2Model(config))
    hub_folder(tmp_path, reference, in_dinov2_layout(reference), PROCESSOR)
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(pixels_of(encoder)).last_hidden_state[:, 0]
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert (encoder.pvr.recipe.resize, encoder.pvr.recipe.crop) == (64, 56)
    assert encoder.identity.weights.source == "file"


@pytest.mark.parametrize(
    ("kind", "settings", "pooled"),
    [
        ("ViTForImageClassification", {"intermediate_size": 128}, lambda tokens: tokens[:, 0]),
        (
            "ViTModel",
            {"intermediate_size": 128},
            lambda tokens: tokens[:, 0],
        ),  # has a pooler, which is left out
        ("Dinov2ForImageClassification", {}, lambda tokens: tokens[:, 0]),
        (
            "Dinov2WithRegistersForImageClassification",
            {"num_register_tokens": 2},
            lambda tokens: tokens[:, 0],
        ),
        ("IJepaForImageClassification", {"intermediate_size": 128}, lambda tokens: tokens.mean(1)),
    ],
)
def test_a_hub_folder_of_a_model_with_a_head_is_its_encoder(
    tmp_path: Path, kind: str, settings: dict[str, Any], pooled: Any
) -> None:
    """As transformers writes it: beside a head, the encoder is under a name of its own."""
    model = getattr(transformers, kind)
    config = model.config_class(**SMALL, **settings, attn_implementation="eager")
    reference = randomised(model(config))
    reference.save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 56, "width": 56}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = pooled(reference.base_model(pixels_of(encoder)).last_hidden_state)
    assert relative_error(encoder(FRAMES), theirs) < 1e-5


def test_a_hub_folder_of_a_plain_vit_has_sizes_of_its_own(tmp_path: Path) -> None:
    """Its sizes are such that 60 times their ratio is less than they are, and its norms are of their own."""
    sizes = SMALL | {"hidden_size": 60, "intermediate_size": 123, "layer_norm_eps": 0.01}
    config = transformers.ViTConfig(**sizes, attn_implementation="eager")
    reference = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    tensors = published(reference.state_dict(), VIT_TO_HUB)
    squash = {"do_resize": True, "size": {"height": 56, "width": 56}, "resample": 2}
    hub_folder(tmp_path, reference, tensors, squash)
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(pixels_of(encoder)).last_hidden_state[:, 0]
    assert encoder.pvr.recipe.squash
    assert relative_error(encoder(FRAMES), theirs) < 1e-5


def test_a_hub_folder_whose_frames_are_larger_than_its_positions_resamples_them_as_timm(
    tmp_path: Path,
) -> None:
    config = transformers.ViTConfig(**SMALL, intermediate_size=128, attn_implementation="eager")
    reference = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    tensors = published(reference.state_dict(), VIT_TO_HUB)
    hub_folder(tmp_path, reference, tensors, {"size": {"height": 84, "width": 84}, "resample": 2})
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    larger = transformers.ViTModel(
        transformers.ViTConfig(**SMALL | {"image_size": 84}, intermediate_size=128), add_pooling_layer=False
    ).eval()
    state, positions = reference.state_dict(), "embeddings.position_embeddings"
    larger.load_state_dict(state | {positions: resample_abs_pos_embed(state[positions], [6, 6])})
    with torch.no_grad():
        theirs = larger(pixels_of(encoder)).last_hidden_state[:, 0]
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert encoder.identity.positions == "bicubic-antialias"


def test_a_hub_folder_with_a_pickle_is_read_and_one_in_shards_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SMALL, intermediate_size=128)
    reference = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    tensors = published(reference.state_dict(), VIT_TO_HUB)
    hub_folder(tmp_path, reference, tensors, PROCESSOR)
    whole = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    pickled = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    assert pickled.identity.weights.tensors_sha256 == whole.identity.weights.tensors_sha256
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="in several files"):
        find_pvr(f"hf:{tmp_path}")


def clip_folder(folder: Path, processor: dict[str, Any], forget: tuple[str, ...] = (), **said: Any) -> Any:
    """A CLIP vision tower as transformers saves it, without some of its configuration."""
    config = transformers.CLIPVisionConfig(**CLIP_VISION, **said)
    reference = randomised(transformers.CLIPVisionModelWithProjection(config))
    hub_folder(folder, reference, reference.state_dict(), processor)
    kept = {key: value for key, value in config.to_dict().items() if key not in forget}
    (folder / "config.json").write_text(json.dumps(kept, default=str))
    return reference


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new", "relu"])
def test_a_hub_folder_says_its_activation_and_leaves_the_rest_to_transformers(
    tmp_path: Path, act: str
) -> None:
    reference = clip_folder(tmp_path, OLD_CLIP, ("layer_norm_eps",), hidden_act=act)
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(pixels_of(encoder)).image_embeds
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert not encoder.pvr.recipe.squash  # a lone number is CLIP's shortest side, and others' both sides
    assert encoder.pvr.recipe.interpolation == "bicubic"  # not said: CLIP's own


@pytest.mark.parametrize(
    ("processor", "said", "refusal"),
    [
        ({"do_resize": False}, {}, "resizes"),
        ({"do_rescale": False}, {}, "rescale_factor"),
        ({"rescale_factor": 1 / 127.5}, {}, "rescale_factor 0.0078"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 56}}, {}, "a ConvNext"),
        ({"resample": 0}, {}, "filter 0"),
        ({"size": {"height": 56, "width": 64}}, {}, "56.*64"),
        ({"size": 48}, {}, "48 pixels"),
        ({}, {"hidden_act": "silu"}, "activation 'silu'"),
    ],
)
def test_what_a_hub_folder_asks_for_and_cannot_be_had_is_refused(
    tmp_path: Path, processor: dict[str, Any], said: dict[str, Any], refusal: str
) -> None:
    clip_folder(tmp_path, OLD_CLIP | processor, **said)
    with pytest.raises(WeightsError, match=refusal):
        find_pvr(f"hf:{tmp_path}")


def test_a_hub_folder_is_the_same_encoder_wherever_it_lies(tmp_path: Path) -> None:
    (here := tmp_path / "a" / "mine").mkdir(parents=True)
    clip_folder(here, OLD_CLIP)
    there = shutil.copytree(here, tmp_path / "b" / "mine")
    first, second = (Encoder(EncoderRequest(f"hf:{folder}", device="cpu")) for folder in (here, there))
    assert first.identity == second.identity
    assert first.identity.name == "hf:mine"


def test_a_processor_that_normalises_nothing_is_a_recipe(tmp_path: Path) -> None:
    clip_folder(tmp_path, OLD_CLIP | {"do_normalize": False})
    recipe = find_pvr(f"hf:{tmp_path}").recipe
    assert (recipe.mean, recipe.std) == ((0, 0, 0), (1, 1, 1))


def test_a_hub_folder_of_a_tower_alone_gives_its_class_token(tmp_path: Path) -> None:
    reference = randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_VISION)))
    reference.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD_CLIP))
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(pixels_of(encoder)).pooler_output
    assert relative_error(encoder(FRAMES), theirs) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_a_hub_folder_of_dinov3_has_its_registers_periods_and_gates(tmp_path: Path, gated: bool) -> None:
    sizes = {
        **SMALL,
        "patch_size": 16,
        "intermediate_size": 128,
        "num_register_tokens": 2,
        "rope_theta": 50.0,
    }
    config = transformers.DINOv3ViTConfig(
        **sizes, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", attn_implementation="eager"
    )
    reference = randomised(transformers.DINOv3ViTModel(config))
    rope = next(m for m in reference.modules() if hasattr(m, "inv_freq"))
    tensors = published(reference.state_dict(), ((r"^model\.layer\.", "layer."),))
    rope.inv_freq.copy_(1 / (1 / rope.inv_freq).bfloat16().float())
    hub_folder(tmp_path, reference, tensors, {"size": {"height": 64, "width": 64}})
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(pixels_of(encoder)).last_hidden_state[:, 0]
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert not encoder.pvr.recipe.rounded  # transformers resizes for it in floating point


def test_a_hub_folder_of_timm_is_built_with_its_arguments(tmp_path: Path) -> None:
    arguments = {"act_layer": "relu", "img_size": 64}
    reference = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments))
    settings = {"input_size": [3, 64, 64], "interpolation": "bicubic", "classifier": "head"}
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": settings, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        assert relative_error(encoder(FRAMES), reference(pixels_of(encoder))) < 1e-5
    for odd, refusal in (({"nothing": 1}, "cannot be built"), ({"img_size": [64, 64]}, r"\[64, 64\]")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": odd}))
        with pytest.raises(WeightsError, match=refusal):
            find_pvr(f"hf:{tmp_path}")


def test_a_hub_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "r3m", "auto_map": {"AutoModel": "evil.Evil"}}')
    with pytest.raises(WeightsError, match=r"of type 'r3m'.*dinov2"):
        find_pvr(f"hf:{tmp_path}")
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        find_pvr(f"hf:{tmp_path.parent}")

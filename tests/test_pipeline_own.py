"""Representations of one's own: timm's, the Hub's by configuration, a specification file, a package."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.pipeline import own
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.zoo import PVRS, all_pvrs, find_pvr
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError, WeightsError

from .test_zoo_vit import in_dinov2_layout
from .upstream import FRAMES, VIT_TO_HUB, encoder_with, noise, published, randomised, relative_error

EXAMPLE = Path(__file__).parent.parent / "examples" / "pvrpipe-gray"


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "mobilenetv3_small_050"]
)
def test_a_timm_name_is_the_models_own_output(tmp_path: Path, name: str) -> None:
    reference = randomised(timm.create_model(name))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    encoder = encoder_with(f"timm:{name}", tmp_path)
    pixels = _pixels(encoder)
    with torch.no_grad():
        theirs = reference.forward_head(reference.forward_features(pixels), pre_logits=True)
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert encoder.identity.name == f"timm:{name}"
    assert encoder.identity.shape == (encoder.pvr.width,)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "efficientnet_b0", "regnety_002", "swin_tiny_patch4_window7_224"]
)
def test_a_timm_network_has_the_maps_of_its_stages(tmp_path: Path, name: str) -> None:
    reference = randomised(timm.create_model(name))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    for stage, layer in ((1, "stage1"), (-1, "last")):
        encoder = encoder_with(f"timm:{name}", tmp_path, layer=layer, pooling="conv-map")
        with torch.no_grad():
            maps = reference.forward_intermediates(_pixels(encoder), intermediates_only=True)[stage]
        assert relative_error(encoder(FRAMES), maps) < 1e-5
        assert (encoder.identity.layer, encoder.identity.shape) == (layer, tuple(maps.shape[1:]))
        average = encoder_with(f"timm:{name}", tmp_path, layer=layer, pooling="average")
        assert relative_error(average(FRAMES), maps.mean((2, 3))) < 1e-5
    for layer, pooling, said in (
        ("stage9", "average", "stage0, stage1"),
        ("stage1", "pooled", "--pool average"),
        ("last", "map", "average, conv-map, flat"),
    ):
        with pytest.raises(InvalidValueError, match=said):
            encoder_with(f"timm:{name}", tmp_path, layer=layer, pooling=pooling)


def test_a_timm_vit_has_layers_and_sizes(tmp_path: Path) -> None:
    encoder = encoder_with(
        "timm:vit_tiny_patch16_224", Path("random:0"), layer="3", pooling="patches", size=64
    )
    assert encoder.identity.shape == (16, 192)
    assert encoder.identity.blocks == (0, 1, 2, 3)
    with pytest.raises(UnknownNameError, match="vit_tiny_patch16_224"):
        find_pvr("timm:vit_tiny_patch17_224")


def _pixels(encoder: Encoder) -> torch.Tensor:
    from pvrpipe.pipeline.preprocessing import preprocess

    return preprocess(torch.from_numpy(FRAMES), encoder.pvr.recipe).contiguous()


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


def test_a_hub_folder_of_dinov2_is_built_by_its_configuration(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**SMALL, mlp_ratio=4, attn_implementation="eager")
    reference = randomised(transformers.Dinov2Model(config))
    hub_folder(tmp_path, reference, in_dinov2_layout(reference), PROCESSOR)
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(_pixels(encoder)).last_hidden_state[:, 0]
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert (encoder.pvr.recipe.resize, encoder.pvr.recipe.crop) == (64, 56)
    assert encoder.identity.weights.source == "file"


def test_a_hub_folder_of_a_plain_vit_drops_its_classifier(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SMALL, intermediate_size=128, attn_implementation="eager")
    reference = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    tensors = published(reference.state_dict(), VIT_TO_HUB) | {"classifier.weight": noise(3, 64)}
    squash = {"do_resize": True, "size": {"height": 56, "width": 56}, "resample": 2}
    hub_folder(tmp_path, reference, tensors, squash)
    encoder = Encoder(EncoderRequest(f"hf:{tmp_path}", device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(_pixels(encoder)).last_hidden_state[:, 0]
    assert encoder.pvr.recipe.squash
    assert relative_error(encoder(FRAMES), theirs) < 1e-5


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
        theirs = reference(_pixels(encoder)).image_embeds
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    assert not encoder.pvr.recipe.squash  # a lone number is CLIP's shortest side, and others' both sides
    assert encoder.pvr.recipe.interpolation == "bicubic"  # not said: CLIP's own


@pytest.mark.parametrize(
    ("processor", "said", "refusal"),
    [
        ({"do_resize": False}, {}, "resizes"),
        ({"do_rescale": False}, {}, "rescale_factor"),
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
        theirs = reference(_pixels(encoder)).pooler_output
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
        theirs = reference(_pixels(encoder)).last_hidden_state[:, 0]
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
        assert relative_error(encoder(FRAMES), reference(_pixels(encoder))) < 1e-5
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


def test_a_specification_file_lies_beside_its_weights(tmp_path: Path) -> None:
    reference = randomised(timm.create_model("resnet18"))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "mine.safetensors")
    spec = PVRS["resnet18"].model_dump(mode="json")
    spec |= {"name": "mine", "source": {"file": "mine.safetensors"}}
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    encoder = Encoder(EncoderRequest(str(tmp_path / "mine.json"), device="cpu", batch=2))
    assert encoder.identity.name == "mine"
    np.testing.assert_array_equal(
        encoder(FRAMES), encoder_with("resnet18", tmp_path / "mine.safetensors")(FRAMES)
    )
    spec["source"]["sha256"] = "0" * 64
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    with pytest.raises(WeightsError, match=r"pinned to 0000.*--weights"):
        Encoder(EncoderRequest(str(tmp_path / "mine.json"), device="cpu"))
    meant = EncoderRequest(str(tmp_path / "mine.json"), str(tmp_path / "mine.safetensors"), device="cpu")
    assert Encoder(meant).identity.weights == encoder.identity.weights
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"broken\.json"):
        find_pvr(str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"blocks": []}, "rising"),
        ({"blocks": [2, 0]}, "rising"),  # it was block 0 alone
        ({"blocks": [-1]}, "rising"),
        ({"width": 0}, "width"),
        ({"width": 7}, r"width 7, but its embeddings are \[384\]; write 384"),
        ({"source": {"file": "a" * 300}}, "255 characters"),
        ({"source": {"file": "é" * 200}}, "there is no file"),  # 400 bytes
        ({"recipe": {"backend": "PIL"}}, "backend is torch"),
        ({"name": ".."}, "name"),
        ({"recipe": {"resize": -3}}, "1 to 2048 pixels"),
        ({"recipe": {"resize": 0}}, "1 to 2048 pixels"),
        ({"recipe": {"crop": 10**30}}, "1 to 2048 pixels"),
        ({"recipe": {"std": [0, 0, 0]}}, "std positive"),
        ({"recipe": {"mean": ["nan", 0, 0]}}, "must be numbers"),
        ({"overrides": {"checkpoint_path": "/etc/passwd"}}, "source names the weights"),
        ({"overrides": {"pretrained": True}}, "source names the weights"),
        ({"keys": {"drop": ["["]}}, r"'\['.*regular expression"),
        ({"keys": {"rename": [["(a)", r"\3"]]}}, "regular expression"),
        ({"positions": "rope-bf16"}, "cannot be built"),
        ({"overrides": {"depth": 0}}, "cannot be built"),
        ({"overrides": {"act_layer": "swoosh"}}, "cannot be built"),
        (
            {"source": {"file": "w", "repo": "a b/c"}},
            r"no place \(Repo id must use.*; mend its specification",
        ),
        ({"source": {"file": "w", "url": "https://[a/w"}}, "no place .*; mend its specification"),
        ({"recipe": {"resize": 100}}, "cuts 224 pixels out of frames of 100"),
        ({"source": {"file": "w", "sha256": "AB"}}, "sha256"),
    ],
)
def test_what_a_specification_cannot_mean_is_one_line(
    tmp_path: Path, changes: dict[str, Any], refusal: str
) -> None:
    spec = PVRS["mocov3-s"].model_dump(mode="json")
    spec |= {"source": {"file": "w.safetensors"}, "keys": {}}
    for name, value in changes.items():
        spec[name] = {**spec[name], **value} if isinstance(value, dict) else value
    (tmp_path / "pvr.json").write_text(json.dumps(spec))
    safetensors.torch.save_file({"a": noise(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=refusal):
        Encoder(EncoderRequest(str(tmp_path), "random:0" if "width" in changes else "auto", device="cpu"))


def test_a_package_registers_a_representation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example that docs/pvrs.md names, as if it were installed."""
    point = EntryPoint("gray", "pvrpipe_gray", own.ENTRY_POINTS)
    monkeypatch.setattr(own, "entry_points", lambda **_: [point])
    monkeypatch.syspath_prepend(str(EXAMPLE))
    assert "gray" in all_pvrs()[0]
    weights = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1)
    safetensors.torch.save_file({"weigh.weight": weights}, tmp_path / "gray.safetensors")
    encoder = encoder_with("gray", tmp_path)
    dim = np.full((2, 64, 64, 3), 51, np.uint8)
    np.testing.assert_allclose(encoder(dim), 0.2, rtol=1e-6)
    assert encoder.identity.shape == (64,)
    sys.modules.pop("pvrpipe_gray")


def test_a_package_that_is_broken_is_named_and_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"gray": "pvrpipe_gray", "gone": "pvrpipe_gray_that_is_not_there", "other": "json"}
    points = EntryPoints(EntryPoint(name, module, own.ENTRY_POINTS) for name, module in modules.items())
    monkeypatch.setattr(own, "entry_points", points.select)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    known, failed = all_pvrs()
    assert {"gray", "vc1"} <= known.keys()
    assert [str(error).split()[0] for error in failed] == ["gone", "other"]
    assert find_pvr("gray") == known["gray"]
    for name, refusal in (("gone", "install its package again"), ("other", "a `pvr` and a `build`")):
        with pytest.raises(WeightsError, match=refusal):
            find_pvr(name)
    with pytest.raises(UnknownNameError, match="nearest: gray"):
        find_pvr("grey")
    listed = CliRunner().invoke(app, ["pvrs"])
    assert listed.exit_code == 0
    assert "gone (pvrpipe_gray_that_is_not_there) cannot be loaded" in listed.stderr
    sys.modules.pop("pvrpipe_gray")


def test_a_package_takes_no_name_that_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [("vc1", "pvrpipe_gray"), ("gray", "pvrpipe_gray"), ("gray", "json")]
    points = EntryPoints(EntryPoint(name, module, own.ENTRY_POINTS) for name, module in taken)
    monkeypatch.setattr(own, "entry_points", points.select)
    known, failed = all_pvrs()
    assert known["vc1"] == find_pvr("vc1") == PVRS["vc1"]
    assert "gray" not in known
    hidden, twice = map(str, failed)
    assert hidden == "vc1 of a package is hidden by pvrpipe's own; register another name"
    assert twice == "gray is registered by several packages (pvrpipe_gray and json); uninstall all but one"


def test_a_timm_names_recipe_is_that_of_its_registry() -> None:
    made = find_pvr("timm:resnet18.tv_in1k").recipe  # crop_pct 0.875
    assert (made.resize, made.crop, made.interpolation) == (256, 224, "bilinear")


def test_weights_that_timm_does_not_know_are_one_line() -> None:
    with pytest.raises(UnknownNameError, match=r"nearest: resnet10t\.c3_in1k"):
        find_pvr("timm:resnet10t.c3_in1")

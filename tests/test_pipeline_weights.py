"""Weights: loaded strictly, in the upstream's own layout, equal to an independent implementation."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import nn

from pvrpipe.pipeline.checkpoints import read_tensors
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.positions import resample_positions
from pvrpipe.pipeline.weights import tensors_sha256
from pvrpipe.pipeline.zoo import PVRS, find_pvr
from pvrpipe.schemas.errors import UnknownNameError, WeightsError

from .upstream import (
    FRAMES,
    VIT_TO_HUB,
    VIT_TO_TIMM,
    embed_with,
    joined_qkv,
    noise,
    pixels_for,
    published,
    randomised,
    relative_error,
)
from .zoo_table import DOCUMENT, with_table


def vc1_checkpoint(path: Path) -> transformers.ViTModel:
    """A full MAE checkpoint as facebook/vc1-base has it: encoder, mask token and decoder under ``model``.

    Returns the same encoder as transformers' independent ViT.
    """
    size = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = transformers.ViTConfig(**size, layer_norm_eps=1e-6, attn_implementation="eager")
    reference = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    tensors = joined_qkv(published(reference.state_dict(), VIT_TO_TIMM))
    decoder = {
        "mask_token": torch.randn(1, 1, 512),
        "decoder_pos_embed": torch.randn(1, 197, 512),
        "decoder_embed.weight": torch.randn(512, 768),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(1536, 512),
        "decoder_norm.weight": torch.randn(512),
        "decoder_pred.weight": torch.randn(768, 512),
    }
    torch.save({"model": {**tensors, **decoder}, "epoch": 182}, path)
    return reference


def test_vc1_from_a_full_mae_checkpoint_equals_transformers_vit(tmp_path: Path) -> None:
    reference = vc1_checkpoint(tmp_path / "pytorch_model.bin")
    encoder = Encoder(EncoderRequest("vc1", str(tmp_path / "pytorch_model.bin"), device="cpu", batch=2))
    with torch.no_grad():
        theirs = reference(pixels_for("vc1")).last_hidden_state[:, 0]
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    weights = encoder.identity.weights
    assert (weights.loaded, weights.expected) == (150, 150)
    assert weights.random_seed is None
    assert encoder.identity.weights.licence == "CC-BY-NC-4.0"
    folder = Encoder(EncoderRequest("vc1", str(tmp_path), device="cpu", batch=2))
    assert folder.identity == encoder.identity
    assert not folder.network.training
    assert not any(p.requires_grad for p in folder.network.parameters())


def dinov2_checkpoint(path: Path, image_size: int) -> transformers.Dinov2Model:
    """facebook/dinov2-small's layout on disk, and the model that transformers makes of it."""
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=image_size,
        attn_implementation="eager",
    )
    reference = randomised(transformers.Dinov2Model(config))
    safetensors.torch.save_file(published(reference.state_dict(), VIT_TO_HUB[1:5]), path)
    return reference


def test_dinov2_from_transformers_layout_equals_transformers(tmp_path: Path) -> None:
    reference = dinov2_checkpoint(tmp_path / "model.safetensors", image_size=224)
    with torch.no_grad():
        theirs = reference(pixels_for("dinov2-s")).last_hidden_state[:, 0]
    assert relative_error(embed_with("dinov2-s", tmp_path / "model.safetensors"), theirs) < 1e-5


def test_a_checkpoint_of_another_width_is_refused_whatever_its_positions_are(tmp_path: Path) -> None:
    dinov2_checkpoint(tmp_path / "small.safetensors", image_size=224)
    with pytest.raises(WeightsError, match=r"of 174 tensors expected, 174 of another shape"):
        Encoder(EncoderRequest("dinov2-b", str(tmp_path / "small.safetensors"), device="cpu"))


def test_dinov2_positions_are_resampled_as_its_own_hub_does(tmp_path: Path) -> None:
    positions = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    ours = resample_positions(positions, 1 + 16 * 16)
    grid = positions[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    hub = nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    torch.testing.assert_close(ours[:, 1:], hub.permute(0, 2, 3, 1).reshape(1, 256, 8))
    torch.testing.assert_close(ours[:, :1], positions[:, :1])
    by_size = (
        nn.functional.interpolate(grid, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 256, 8)
    )
    assert (ours[:, 1:] - by_size).abs().max() > 1e-3  # transformers' way is another embedding
    reference = dinov2_checkpoint(tmp_path / "model.safetensors", image_size=518)
    embedding = embed_with("dinov2-s", tmp_path / "model.safetensors")
    reference.embeddings.position_embeddings = nn.Parameter(
        resample_positions(reference.embeddings.position_embeddings, 257)
    )
    with torch.no_grad():
        theirs = reference(pixels_for("dinov2-s")).last_hidden_state[:, 0]
    assert relative_error(embedding, theirs) < 1e-5


def test_clip_from_openai_layout_equals_transformers_projected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PVRS, "clip-l14", PVRS["clip-l14"].model_copy(update={"overrides": {"depth": 2}}))
    vision = {
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    text = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 100}
    config = transformers.CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224}, text_config=text, projection_dim=768
    )
    reference = randomised(transformers.CLIPModel(config))
    tensors = published(reference.state_dict(), ())
    tensors["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        pooled = reference.vision_model(pixels_for("clip-l14")).pooler_output
        theirs = reference.visual_projection(pooled)
    assert relative_error(embed_with("clip-l14", tmp_path / "model.safetensors"), theirs) < 1e-5


def test_r3m_from_its_own_layout_equals_torchvision(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    reference = randomised(resnet50())
    reference.fc = nn.Identity()
    tensors = published(reference.state_dict(), (), prefix="module.convnet.")
    tensors["module.lang_enc.model.embeddings.weight"] = noise(3, 3)
    tensors["module.lang_rew.pred.0.weight"] = noise(3, 3)
    torch.save({"r3m": tensors, "global_step": 1}, tmp_path / "r3m_50.pt")
    with torch.no_grad():
        theirs = reference(pixels_for("r3m-50"))
    assert relative_error(embed_with("r3m-50", tmp_path / "r3m_50.pt"), theirs) < 1e-5


@pytest.mark.parametrize(("name", "depth"), [("resnet18", "resnet18"), ("resnet50", "resnet50")])
def test_resnet_from_timm_layout_equals_torchvision(tmp_path: Path, name: str, depth: str) -> None:
    import torchvision

    reference = randomised(getattr(torchvision.models, depth)())
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    reference.fc = nn.Identity()
    with torch.no_grad():
        theirs = reference(pixels_for(name))
    assert relative_error(embed_with(name, tmp_path / "model.safetensors"), theirs) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer3.1.bn2.bias"), r"1 missing \(layer3.1.bn2.bias\)"),
        (lambda t: t.update(stray=torch.zeros(1)), r"1 unexpected \(stray\)"),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
            r"1 of another shape \(conv1.weight\)",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_checkpoint_that_does_not_fit_exactly_is_refused(tmp_path: Path, change, message: str) -> None:
    tensors = timm.create_model("resnet18").state_dict()
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message + r".*--weights"):
        Encoder(EncoderRequest("resnet18", str(tmp_path / "w.safetensors"), device="cpu"))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("/tmp/pvrpipe-was-executed", "w")


class Worse:  # of a module that torch has on a list
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/pvrpipe-was-executed",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    torch.save({"model": {"x": Evil()}}, path)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_tensors(path)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Evil()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user reads one line, not what torch tells its developers
        with pytest.raises(WeightsError):
            read_tensors(tmp_path / "plain.bin")
    torch.save({"model": Worse()}, path)
    with pytest.raises(WeightsError, match=r"it holds posix\.system, which runs code, and none is run"):
        read_tensors(path)
    assert not Path("/tmp/pvrpipe-was-executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"export PATH=here\n", b"PK\x03\x04", b"\x80\x02.", b"<html></html>"]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_tensors(tmp_path / "other.bin")


def test_weights_that_cannot_be_had_name_the_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(WeightsError, match=r"facebook/vc1-base cannot be reached.*--weights") as caught:
        Encoder(EncoderRequest("vc1", device="cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="there is no file"):
        Encoder(EncoderRequest("vc1", str(tmp_path / "nowhere.bin"), device="cpu"))
    with pytest.raises(WeightsError, match=r"there is no file random_init\.pt"):
        Encoder(EncoderRequest("vc1", "random_init.pt", device="cpu"))
    for unseeded in ("random", "random:", "random:x"):
        with pytest.raises(WeightsError, match="random:SEED"):
            Encoder(EncoderRequest("vc1", unseeded, device="cpu"))
    with pytest.raises(WeightsError, match="below 2\\^63"):
        Encoder(EncoderRequest("vc1", f"random:{2**63}", device="cpu"))
    with pytest.raises(UnknownNameError, match="unknown device 'mps'; nearest: auto, cpu, cuda"):
        Encoder(EncoderRequest("vc1", "random:0", device="mps"))


def test_random_weights_follow_from_their_seed_and_are_marked() -> None:
    one, same, other = (
        Encoder(EncoderRequest("resnet18", f"random:{s}", device="cpu", batch=2)) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one(FRAMES), same(FRAMES))
    assert one.identity == same.identity
    assert one.identity.weights.tensors_sha256 != other.identity.weights.tensors_sha256
    assert one.identity.weights.random_seed == 1
    assert "random weights" in one.identity.title


@pytest.mark.parametrize("name", sorted(PVRS))
def test_every_specification_gives_the_width_it_promises(name: str) -> None:
    pvr = PVRS[name]
    with torch.device("meta"):
        network = build_network(pvr, seed=0)
        side = pvr.recipe.crop or 224
        shape = network(torch.zeros(1, 3, side, side)).shape[1:]
    channels = shape[0] if pvr.pooling == "conv-map" else shape[-1]
    assert channels == pvr.width
    assert pvr.source.revision is None or re.fullmatch(r"[0-9a-f]{40}", pvr.source.revision)
    assert pvr.source.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", pvr.source.sha256)


def test_unknown_pvr_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"nearest: .*dinov2-b"):
        find_pvr("dinov2-base")


def test_the_table_of_the_documentation_is_that_of_the_specifications() -> None:
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run `python -m tests.zoo_table`"
    measured = re.findall(r"^\| `(\S+)` \| 0\.9", text.partition("## bfloat16")[2], re.MULTILINE)
    assert [*measured, "r2d2"] == list(PVRS), "run benchmarks/precision.py for what is new"
    assert set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) >= set(PVRS)


def test_each_tensor_is_in_the_hash_with_its_name_dtype_and_shape() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    seen = {tensors_sha256(network)}
    changes = [
        *(lambda tensor=tensor: tensor.add_(1) for tensor in network.state_dict().values()),
        lambda: network.register_buffer("more", torch.zeros(4)),
        lambda: network.register_buffer("more", torch.zeros(2, 2)),
        lambda: network.register_buffer("more", torch.zeros(2, 2, dtype=torch.int32)),
        lambda: (
            delattr(network, "more"),
            network.register_buffer("most", torch.zeros(2, 2, dtype=torch.int32)),
        ),
    ]
    for change in changes:
        change()
        seen.add(tensors_sha256(network))
    assert len(seen) == 1 + len(changes) == 12

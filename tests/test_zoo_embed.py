"""Every representation goes through the whole stage on Ray, and fabricated checkpoints come out as they should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
import transformers

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .test_zoo_cnn import pooled, reference_taskonomy, taskonomy_encoder
from .test_zoo_language import clip_resnet, of_openai
from .test_zoo_vit import mocov3_checkpoint, plain_vit
from .upstream import noise, pixels_for, published, randomised, relative_error

TOGETHER = 600e6  # parameters of the encoders of one pass; the largest, of 1.1e9, go alone
PIECES = 8  # of the zoo, so that `-k` can choose


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(PVRS[name], 0).parameters())


def passes(names: Sequence[str]) -> list[list[str]]:
    """Representations in passes of several encoders, as many as fit."""
    sizes = {name: parameters(name) for name in names}
    made: list[list[str]] = [[]]
    for name in sorted(names, key=sizes.__getitem__):
        if made[-1] and sum(sizes[n] for n in made[-1]) + sizes[name] > TOGETHER:
            made.append([])
        made[-1].append(name)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", range(PIECES))
def test_every_representation_is_embedded_on_ray(
    piece: int, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts = write_rollouts((2,), size=48)
    for names in passes(list(PVRS)[piece::PIECES]):
        outputs = [(EncoderRequest(n, "random:0", device="cpu", batch=3), tmp_path / n) for n in names]
        results = embed(rollouts, outputs, EmbedConfig(engine="ray", workers=1))
        assert [result.pvr for result in results] == names
        for result in results:
            assert verify(result.store) == []
            values = Store.open(result.store).read_episode(0)["embedding"]
            assert values.shape == (3, *result.shape)
            assert np.isfinite(values).all()
            assert result.random_weights


def fabricated(folder: Path) -> dict[str, tuple[Path, Any]]:
    """A checkpoint in upstream's layout for one of each kind of network, and what computes its embedding."""
    vit = plain_vit("s", depth=12, num_attention_heads=12)
    mocov3_checkpoint(folder / "vit.pth.tar", vit)

    config = transformers.SiglipVisionConfig(patch_size=16, image_size=224)
    siglip = randomised(transformers.SiglipVisionModel(config))
    tensors = published(siglip.state_dict(), (), prefix="vision_model.")
    safetensors.torch.save_file({**tensors, "logit_scale": noise(1)}, folder / "siglip.safetensors")

    clip = clip_resnet()
    safetensors.torch.save_file(of_openai(clip, ""), folder / "clip.safetensors")

    resnet = randomised(torchvision.models.resnet18())
    state = {f"module.convnet.{k}": v for k, v in resnet.state_dict().items() if not k.startswith("fc")}
    torch.save({"r3m": state}, folder / "r3m.pt")

    taskonomy = taskonomy_encoder().state_dict()
    torch.save({"state_dict": taskonomy}, folder / "taskonomy.pth")
    return {
        "mocov3-s": (folder / "vit.pth.tar", lambda x: vit(x).last_hidden_state[:, 0]),
        "siglip-b16": (folder / "siglip.safetensors", lambda x: siglip(x).pooler_output),
        "clip-rn50": (folder / "clip.safetensors", clip),
        "r3m-18": (folder / "r3m.pt", lambda x: pooled(resnet, x)),
        "taskonomy-depth-zbuffer": (
            folder / "taskonomy.pth",
            lambda x: reference_taskonomy(taskonomy, x).flatten(1),
        ),
    }


@pytest.mark.slow
def test_fabricated_checkpoints_of_each_kind_are_embedded_on_ray(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts, made = write_rollouts((2, 3), size=64), fabricated(tmp_path)
    outputs = [
        (EncoderRequest(name, str(path), device="cpu", batch=4), tmp_path / "stores" / name)
        for name, (path, _) in made.items()
    ]
    results = embed(rollouts, outputs, EmbedConfig(engine="ray", workers=2, dtype="float32"))
    frames = Store.open(rollouts).read_episode(1)["frame"]
    for result in results:
        stored = Store.open(result.store).read_episode(1)["embedding"]
        with torch.no_grad():
            theirs = made[result.pvr][1](pixels_for(result.pvr, frames))
        assert relative_error(stored, theirs) < 1e-5
        encoder = Store.open(result.store).manifest.embeddings
        assert encoder is not None
        assert encoder.encoder.weights.loaded == encoder.encoder.weights.expected > 0

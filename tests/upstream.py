"""Checkpoints in upstream's own layout, and what compares our embeddings with an independent implementation."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.preprocessing import preprocess
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.clusters import ray_cluster
from pvrpipe.store.reading import Store

from .conftest import random_episode, write_episodes

#: In the environment, a folder: then the stage embeds on Ray, once for each representation, and leaves its name there.
ON_RAY = "PVRPIPE_TEST_ZOO_ON_RAY"
EMBEDDED = ".embedded"
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor distinct values, so that a swapped or dropped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dtype.is_floating_point:
                noise = torch.randn(tensor.shape, generator=generator)
                if "running_var" in name or (tensor.dim() == 1 and name.endswith("weight")):
                    tensor.copy_(1 + 0.1 * noise.abs())
                elif tensor.dim() == 4:  # convolutions pass on what they see
                    tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
                else:
                    tensor.copy_(0.05 * noise)
    return module.eval()


def noise(*shape: int) -> Tensor:
    """A tensor of a part that the encoder does not use."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative_error(ours: np.ndarray, theirs: Tensor) -> float:
    reference = theirs.detach().double().numpy()
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """The same specification with fewer blocks, so that a test is quick; its code path is the same."""
    pvr = PVRS[name]
    update: dict[str, Any] = {
        "overrides": {**pvr.overrides, **changes.pop("overrides", {"depth": 2})},
        **changes,
    }
    monkeypatch.setitem(PVRS, name, pvr.model_copy(update=update))


def encoder_with(name: str, weights: Path, **readout: Any) -> Encoder:
    return Encoder(EncoderRequest(name, str(weights), device="cpu", batch=2, readout=Readout(**readout)))


def embed_with(name: str, weights: Path, frames: np.ndarray = FRAMES, **readout: Any) -> np.ndarray:
    """Embeddings of two frames."""
    folder = Path(os.environ.get(ON_RAY, ""))
    if ON_RAY in os.environ and not (folder / f"{name}{EMBEDDED}").exists():
        return _embedded_on_ray(folder, name, weights, frames, Readout(**readout))
    return encoder_with(name, weights, **readout)(frames)


def _embedded_on_ray(
    folder: Path, name: str, weights: Path, frames: np.ndarray, readout: Readout
) -> np.ndarray:
    """The same by the stage, with the specification in a file: workers see nothing of what a test changed in ours."""
    _cluster()
    shape = encoder_with(name, weights).identity.shape
    width = shape[0] if PVRS[name].pooling == "conv-map" else shape[-1]
    own = Path(tempfile.mkdtemp(dir=folder))
    (own / "pvr.json").write_text(PVRS[name].model_copy(update={"width": width}).model_dump_json())
    episode = random_episode(0, len(frames) - 1)
    episode.arrays["frame"] = frames
    write_episodes(own / "rollouts", [episode])
    request = EncoderRequest(str(own), str(weights), device="cpu", batch=2, readout=readout)
    config = EmbedConfig(engine="ray", workers=1, dtype="float32")
    (result,) = embed(own / "rollouts", [(request, own / "embeddings")], config)
    store = Store.open(result.store)
    made = store.manifest.embeddings
    assert made is not None
    assert made.encoder.weights.loaded == made.encoder.weights.expected > 0
    (folder / f"{name}{EMBEDDED}").touch()
    return store.read_episode(0, ["embedding"])["embedding"]


@functools.cache
def _cluster() -> ExitStack:
    """One for all tests of a process."""
    stack = ExitStack()
    stack.enter_context(ray_cluster(None, 2))
    return stack


def pixels_for(name: str, frames: np.ndarray = FRAMES) -> Tensor:
    return preprocess(torch.from_numpy(frames), PVRS[name].recipe).contiguous()


def pixels_of(encoder: Encoder, frames: np.ndarray = FRAMES) -> Tensor:
    """What an encoder's network sees of frames."""
    return preprocess(torch.from_numpy(frames), encoder.pvr.recipe).contiguous()


def published(
    tensors: Mapping[str, Tensor], renames: Sequence[tuple[str, str]], prefix: str = ""
) -> dict[str, Tensor]:
    """Tensors under upstream's names."""
    named = {}
    for name, value in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        named[prefix + name] = value.clone()
    return named


def joined_qkv(tensors: dict[str, Tensor], template: str = ".attn.{}.") -> dict[str, Tensor]:
    """Separate q, k, v as one tensor, the way most repositories have them."""
    joined = dict(tensors)
    for name in tensors:
        if template.format("q") in name:
            parts = [joined.pop(name.replace(template.format("q"), template.format(p))) for p in "qkv"]
            joined[name.replace(template.format("q"), template.format("qkv"))] = torch.cat(parts)
    return joined


#: transformers' ViT in memory to the names of timm's and MAE's repositories.
VIT_TO_TIMM = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"^layernorm\.", "norm."),
)

#: transformers' ViT in memory to its layout on the Hub.
VIT_TO_HUB = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

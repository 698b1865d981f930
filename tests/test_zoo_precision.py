"""What ``--precision bf16`` computes in float32: all that is done once a frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pvrpipe.pipeline.attention_pools import attention_pooled
from pvrpipe.pipeline.autoencoder import ConvEncoder
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, Precision
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.vjepa2 import VJepa2

from .upstream import FRAMES, randomised, shrink

SHALLOW: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vip": {},
    "clip-rn50": {},
    "clip-b16": {"depth": 1},
    "siglip-b16": {"depth": 1},
    "vjepa2-l": {"hidden_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1},
    "vc1": {"depth": 1},
    "dinov3-s": {"depth": 1},
    "c-radio-v4-h": {"width": 64, "heads": 2, "depth": 1},
}


def encoder_of(name: str, precision: Precision = "bf16") -> Encoder:
    return Encoder(EncoderRequest(name, "random:0", precision, "cpu", len(FRAMES)))


@pytest.mark.parametrize("name", SHALLOW)
def test_embeddings_are_not_rounded_to_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has eight bits of a number, float16, which stores it, eleven."""
    shrink(monkeypatch, name, overrides=SHALLOW[name])
    embedding = encoder_of(name).forward(torch.from_numpy(FRAMES))
    assert embedding.dtype == torch.float32
    values = embedding[embedding != 0]
    assert (values.bfloat16() == values).float().mean() < 0.1


def test_neither_are_those_of_an_autoencoder() -> None:
    encoder = ConvEncoder(size=64, channels=8, width=128)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        embedding = encoder(torch.ones(1, 3, 64, 64))
    assert embedding.dtype == torch.float32
    assert (embedding.bfloat16() == embedding).float().mean() < 0.1


def test_the_average_that_timm_takes_is_not_rounded_either() -> None:
    own, averaged = (
        Encoder(EncoderRequest("timm:resnet18", "random:0", "bf16", "cpu", len(FRAMES), readout=readout))(
            FRAMES
        )
        for readout in (Readout(), Readout(pooling="average"))
    )
    np.testing.assert_array_equal(own, averaged)


@pytest.mark.parametrize("name", [*SHALLOW, "r2d2"])
def test_shapes_are_told_without_computing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of no data has no autocast, and what asked for it there was computed on pixels of zeros."""
    shrink(monkeypatch, name, overrides=SHALLOW.get(name, {}))
    encoder = encoder_of(name)
    side = encoder.pvr.recipe.crop
    assert side is not None
    assert encoder._seen(torch.empty(1, 3, side, side, device="meta")).is_meta


@pytest.mark.parametrize("name", ["clip-rn50", "siglip-b16"])
def test_attention_of_one_query_is_timms_and_nearer_to_it_in_bfloat16(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, name, overrides=SHALLOW[name])
    trunk = encoder_of(name).network.trunk
    of_map = name == "clip-rn50"
    pool = randomised(trunk.head if of_map else trunk.attn_pool)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((2, 2048, 7, 7) if of_map else (2, 196, 768), generator=draw)
    with torch.inference_mode():
        exact = pool(x)
        assert distance(attention_pooled(pool, x), exact) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            ours, timms = distance(attention_pooled(pool, x), exact), distance(pool(x), exact)
    assert ours < 0.8 * timms


def test_an_attention_pool_of_another_kind_pools_in_its_own_way() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=1)

    tokens = torch.ones(2, 3, 4)
    assert torch.equal(attention_pooled(Own(), tokens), tokens.mean(dim=1))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def test_vjepa2_adds_up_in_float32_and_turns_by_angles_in_float32() -> None:
    network = randomised(VJepa2(**SHALLOW["vjepa2-l"], crop_size=256))
    attention = network.blocks[0].attention  # type: ignore[index, union-attr]
    places = attention.get_position_ids(torch.empty(1, 256, 96))
    asked = torch.randn(1, 2, 256, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = attention.apply_rotary_embeddings(asked.float(), places)
    turned = attention.apply_rotary_embeddings(asked, places)
    assert turned.dtype == torch.bfloat16
    np.testing.assert_array_equal(turned.float().numpy(), exact.bfloat16().float().numpy())
    added: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda _, given, __: added.append(given[0]))  # type: ignore[index, union-attr]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ((tokens, _),) = network.tokens(torch.zeros(1, 3, 256, 256), [0], norm=False)  # type: ignore[operator]
    assert added[0].dtype == tokens.dtype == torch.float32

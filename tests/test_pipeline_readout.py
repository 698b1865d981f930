"""Layers, blocks, norms, poolings and input sizes: each is another encoder, and each is what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from pvrpipe.commands.options import pvr_label
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, frozen
from pvrpipe.pipeline.golden import check_golden
from pvrpipe.pipeline.networks import build_network
from pvrpipe.pipeline.readout import Readout, block_list, read_out
from pvrpipe.pipeline.tuning import TunedEncoder, tuned_as_asked, tuning_of
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.errors import EncodingError, InvalidValueError, UnknownNameError, WeightsError
from pvrpipe.store.reading import Store

from .conftest import WriteStore
from .upstream import FRAMES, encoder_with, pixels_for, randomised, relative_error, shrink

NAME = "mocov3-s"  # a plain ViT-S, with 12 heads


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A ViT, and its weights on disk in its authors' layout."""
    trunk = randomised(timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12))
    path = tmp_path_factory.mktemp("vit") / "w.safetensors"
    state = {f"module.base_encoder.{name}": tensor for name, tensor in trunk.state_dict().items()}
    safetensors.torch.save_file(state, path)
    return trunk, path


def by_hand(trunk: Any, blocks: list[int], keep: list[int], norm: bool) -> torch.Tensor:
    """Tokens after the blocks of ``keep``, where only ``blocks`` compute, joined along the features."""
    with torch.no_grad():
        x = trunk._pos_embed(trunk.patch_embed(pixels_for(NAME)))
        kept = []
        for n in blocks:
            x = trunk.blocks[n](x)
            if n in keep:
                kept.append(trunk.norm(x) if norm else x)
    return torch.cat(kept, dim=-1)


@pytest.mark.parametrize(
    ("readout", "blocks", "keep", "norm", "layer"),
    [
        (Readout(), range(12), [11], True, "last"),
        (Readout(layer="5"), range(6), [5], True, "5"),
        (Readout(layer="5", final_norm=False), range(6), [5], False, "5"),
        (Readout(layer="-1"), range(12), [11], True, "last"),
        (Readout(layer="3,7,11"), range(12), [3, 7, 11], True, "3,7,11"),
        (Readout(blocks="0-5"), range(6), [5], True, "5"),
        (Readout(blocks="6-11"), range(6, 12), [11], True, "last"),
        (Readout(blocks="0,2,4-6", layer="4"), [0, 2, 4], [4], True, "4"),
    ],
    ids=str,
)
def test_layers_and_blocks_are_what_they_say(
    vit: tuple[Any, Path], readout: Readout, blocks: Any, keep: list[int], norm: bool, layer: str
) -> None:
    trunk, path = vit
    encoder = Encoder(EncoderRequest(NAME, str(path), device="cpu", batch=2, readout=readout))
    theirs = by_hand(trunk, list(blocks), keep, norm)[:, 0]
    assert relative_error(encoder(FRAMES), theirs) < 1e-5
    identity = encoder.identity
    assert (identity.blocks, identity.layer, identity.final_norm) == (tuple(blocks), layer, norm)
    assert identity.shape == (384 * len(keep),)
    assert identity.weights.loaded == identity.weights.expected == 150
    again = Encoder(EncoderRequest(NAME, str(path), device="cpu", batch=2, readout=Readout.of(identity)))
    assert again.identity == identity


def test_tokens_keep_their_shape_and_mean_is_of_the_patches(vit: tuple[Any, Path]) -> None:
    trunk, path = vit
    tokens = by_hand(trunk, list(range(12)), [11], True)
    patches = encoder_with(NAME, path, pooling="patches")
    assert patches.identity.shape == (196, 384)
    assert relative_error(patches(FRAMES), tokens[:, 1:]) < 1e-5
    assert relative_error(encoder_with(NAME, path, pooling="mean")(FRAMES), tokens[:, 1:].mean(dim=1)) < 1e-5


def test_another_input_size_resizes_crops_and_resamples_positions(vit: tuple[Any, Path]) -> None:
    _, path = vit
    encoder = encoder_with(NAME, path, size=112, pooling="patches")
    assert encoder.identity.shape == (49, 384)
    recipe = encoder.identity.recipe
    assert (recipe.resize, recipe.crop, encoder.identity.positions) == (128, 112, "bicubic-antialias")
    again = Encoder(EncoderRequest(NAME, str(path), device="cpu", readout=Readout.of(encoder.identity)))
    assert again.identity == encoder.identity


def test_stages_of_a_resnet() -> None:
    pvr = read_out(PVRS["resnet18"], Readout(layer="layer3", pooling="conv-map"))
    with torch.device("meta"):
        network = build_network(pvr, 0)
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 256, 14, 14)
        assert network.layer == "layer3"
        whole = build_network(read_out(PVRS["resnet18"], Readout(layer="layer4")), 0)
        assert whole.layer == "last"  # one encoder, however it is asked for
    for change in ({"layer": "layer9"}, {"blocks": "0-3"}, {"pooling": "cls"}):
        with pytest.raises(InvalidValueError, match="resnet18 has"):
            build_network(read_out(PVRS["resnet18"], Readout(**change)), 0)


@pytest.mark.parametrize(
    ("readout", "told"),
    [
        (Readout(layer="12"), "--layer 12: vc1 has blocks 0 to 11; give some of them, or `last`"),
        (Readout(layer="layer2"), "--layer layer2: vc1 has blocks 0 to 11; give some of them, or `last`"),
        (Readout(blocks="10-12"), "--blocks 10,11,12: vc1 has blocks 0 to 11; give some of them"),
        (
            Readout(blocks="0-3", layer="5"),
            "--layer 5: vc1 has blocks 0 to 11, of which --blocks leaves 0,1,2,3; give some of them, or `last`",
        ),
        (Readout(pooling="map"), "--pool map: vc1 has cls, mean, patches, pooled; choose one of them"),
        (
            Readout(pooling="conv-map"),
            "--pool conv-map: vc1 has cls, mean, patches, pooled; choose one of them",
        ),
        (
            Readout(layer="3", pooling="pooled"),
            "--pool pooled is the network's own output; choose another --pool with a layer",
        ),
    ],
)
def test_a_layer_or_pooling_that_is_not_there_names_those_that_are(readout: Readout, told: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{re.escape(told)}$"), torch.device("meta"):
        build_network(read_out(PVRS["vc1"], readout), 0)


def test_readouts_that_nobody_can_mean() -> None:
    assert block_list("0,2,4-6") == (0, 2, 4, 5, 6)
    for text in ("", "x", "5-3", "2,1", "1,1", "0-99999999999999", "5000"):
        with pytest.raises(InvalidValueError, match="--blocks"):
            block_list(text)
    with pytest.raises(UnknownNameError, match="patches"):
        read_out(PVRS["vc1"], Readout(pooling="patch"))
    with pytest.raises(InvalidValueError, match="--input-size"):
        read_out(PVRS["vc1"], Readout(size=8))
    with pytest.raises(InvalidValueError, match="no layers"):
        build_network(read_out(PVRS["r2d2"], Readout(layer="3")), 0)


def test_every_readout_has_a_folder_of_its_own() -> None:
    labels = [
        pvr_label("vc1", "random:0", Readout()),
        pvr_label("vc1", "auto", Readout(layer="3,7", final_norm=False, pooling="patches", size=128)),
        pvr_label("timm:vit_tiny_patch16_224", "auto", Readout(blocks="0-5")),
    ]
    assert labels == [
        "vc1-random:0",
        "vc1-layer3+7-no-norm-patches-128px",
        "timm-vit_tiny_patch16_224-blocks0-5",
    ]


def test_patches_and_maps_go_through_the_store_and_are_verified(
    write_rollouts: WriteStore, vit: tuple[Any, Path], tmp_path: Path
) -> None:
    rollouts, inline = write_rollouts(size=24), EmbedConfig(engine="inline")
    tokens = EncoderRequest(NAME, str(vit[1]), batch=8, readout=Readout("2", None, None, "patches", 32))
    maps = EncoderRequest("pieg", "random:0", batch=8)
    embed(rollouts, [(tokens, tmp_path / "t"), (maps, tmp_path / "m")], inline)
    for folder, shape in ((tmp_path / "t", (4, 384)), (tmp_path / "m", (128, 3, 3))):
        store = Store.open(folder)
        made = store.manifest.embeddings
        assert made is not None
        assert made.encoder.shape == store.column("embedding").shape == shape
        assert store.read_episode(0)["embedding"].shape[1:] == shape
    assert check_golden(Store.open(tmp_path / "m")).ok
    assert check_golden(Store.open(tmp_path / "t"), weights=str(vit[1])).ok
    changed = bytearray(vit[1].read_bytes())
    changed[-1] ^= 0x40  # one byte of the weights, in the exponent of a number
    (tmp_path / "changed.safetensors").write_bytes(changed)
    other = check_golden(Store.open(tmp_path / "t"), weights=str(tmp_path / "changed.safetensors"))
    assert not other.ok
    assert "weights.tensors_sha256" in other.differs


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("resnet18", None),
        ("timm:vit_tiny_patch16_224", "pooled"),
        ("timm:vit_relpos_small_patch16_224", "mean"),
    ],
)
@pytest.mark.parametrize("final_norm", [True, False])
def test_a_final_norm_that_is_not_there_is_no_choice(
    name: str, pooling: str | None, final_norm: bool, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    """It would be the same encoder in a folder of another name."""
    request = EncoderRequest(name, "random:0", readout=Readout(final_norm=final_norm, pooling=pooling))
    with pytest.raises(InvalidValueError, match=r"--no-norm.*no final norm"):
        embed(write_rollouts((2,), size=24), [(request, tmp_path / "e")], EmbedConfig(engine="inline"))
    assert not (tmp_path / "e").exists()
    tuning = tuning_of(name, "random:0", "0")
    with pytest.raises(InvalidValueError, match=r"--no-norm.*no final norm"):
        tuned_as_asked(tuning, (24, 24), request.readout, "cpu")
    encoder = Encoder(replace(request, readout=Readout(pooling=pooling)))
    TunedEncoder(tuning, (24, 24), Readout.of(encoder.identity), "cpu")  # as a run records it


SMALL: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}


@pytest.mark.parametrize(
    ("architecture", "poolings", "normed"),
    [
        ("vit_so150m_patch16_reg4_map_256", ("mean", "map", "patches", "pooled"), True),
        ("test_vit3", ("mean", "map", "patches", "pooled"), True),
        ("vit_pe_core_tiny_patch16_384", ("cls", "mean", "map", "patches", "pooled"), True),
        ("vit_betwixt_patch16_reg4_gap_256", ("mean", "patches", "pooled"), False),
        ("vit_relpos_small_patch16_224", ("mean", "patches", "pooled"), False),
        ("deit_tiny_distilled_patch16_224", ("cls", "cls+registers", "mean", "patches", "pooled"), True),
        ("beit_base_patch16_224", ("cls", "mean", "patches", "pooled"), False),
    ],
)
def test_tokens_of_timms_own_are_those_that_it_has(
    architecture: str, poolings: tuple[str, ...], normed: bool
) -> None:
    """Registers are no class token, an attention pool sees what timm shows it, and no norm is none."""
    pvr = PVRS["vc1"].model_copy(update={"architecture": architecture, "overrides": SMALL, "name": "own"})
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = build_network(read_out(pvr, Readout(pooling="pooled")), 0)
    assert network.poolings == poolings
    trunk: Any = randomised(network.trunk)
    with torch.no_grad():
        tokens = trunk.forward_features(x)
    prefix, patches = tokens.tensor_split([trunk.num_prefix_tokens], dim=1)
    expected = {"cls": tokens[:, 0], "cls+registers": prefix.flatten(1), "mean": patches.mean(1)}
    expected |= {"patches": patches, "map": trunk(x), "pooled": trunk(x)}
    for pooling in poolings:
        made = build_network(read_out(pvr, Readout(pooling=pooling)), 0)
        made.trunk.load_state_dict(trunk.state_dict())
        made.eval()
        assert relative_error(made(x).detach().numpy(), expected[pooling]) < 1e-5, pooling
        assert made.final_norm is (normed or pooling == "pooled"), pooling


def test_a_block_that_is_kept_has_the_positions_that_are_its_own() -> None:
    """In timm a block finds them by its place among those that are there: block 1 alone had block 0's."""
    pvr = PVRS["vc1"].model_copy(update={"architecture": "vit_small_patch16_rope_mixed_224"})
    pvr = pvr.model_copy(update={"overrides": {**SMALL, "depth": 4}, "pooling": "patches"})
    network = build_network(read_out(pvr, Readout(blocks="1,3")), 0).eval()
    trunk: Any = randomised(network.trunk)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, rope = trunk._pos_embed(trunk.patch_embed(x))
        for n in (1, 3):
            tokens = trunk.blocks[n](tokens, rope=rope[n])
        network.narrow()
        ours = network(x)
    assert relative_error(ours.numpy(), trunk.norm(tokens)[:, trunk.num_prefix_tokens :]) < 1e-5


def test_frames_that_a_fixed_network_cannot_take_are_refused(tmp_path: Path) -> None:
    encoder = encoder_with("pieg", Path("random:0"))
    assert encoder(np.zeros((1, 60, 84, 3), np.uint8)).shape == (1, 128, 8, 11)
    for frames in (np.zeros((1, 84, 84, 1), np.uint8), np.zeros((1, 84, 84, 4), np.uint8)):
        with pytest.raises(EncodingError, match="must be uint8"):
            encoder(frames)


def test_a_network_that_stays_in_training_mode_is_refused() -> None:
    network = build_network(PVRS["resnet18"], 0)
    assert frozen(network) is network
    assert not any(m.training for m in network.modules())
    network.trunk.layer1[0].bn1.train = lambda mode=True: None
    network.trunk.layer1[0].bn1.training = True
    with pytest.raises(WeightsError, match=r"layer1\.0\.bn1 stays in training mode"):
        frozen(network)


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("dinov2-s", 225, 224),
        ("vc1", 100, 96),
        ("vjepa2-l", 250, 256),
        ("c-radio-v4-h", 250, 256),
        ("dinov3-s", 17, 16),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int, nearest: int
) -> None:
    """The patches of timm, RADIO and V-JEPA 2 leave out the last pixels without a word."""
    depth = {"vjepa2-l": "num_hidden_layers"}.get(name, "depth")
    shrink(monkeypatch, name, overrides={depth: 1})
    with pytest.raises(InvalidValueError, match=rf"--input-size {size}: .*; give {nearest}$"):
        encoder_with(name, Path("random:0"), size=size)


def test_a_size_that_a_network_cannot_take_is_one_line() -> None:
    with pytest.raises(
        InvalidValueError, match=r"clip-rn50 cannot make --pool map of 100 × 100 pixels.*--input-size"
    ):
        encoder_with("clip-rn50", Path("random:0"), size=100)


def test_a_pooling_that_timm_has_no_way_to_is_one_line() -> None:
    with pytest.raises(InvalidValueError, match=r"timm:cait_xxs24_224 cannot make --pool mean"):
        encoder_with("timm:cait_xxs24_224", Path("random:0"), pooling="mean")

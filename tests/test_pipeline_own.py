"""Representations of one's own: timm's, the Hub's by configuration, a specification file, a package."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.pipeline import networks, own
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.zoo import PVRS, all_pvrs, find_pvr
from pvrpipe.schemas.errors import InvalidValueError, UnknownNameError, WeightsError
from pvrpipe.store.reading import Store

from .conftest import WriteStore
from .upstream import FRAMES, encoder_with, noise, pixels_of, randomised, relative_error

EXAMPLE = Path(__file__).parent.parent / "examples" / "pvrpipe-gray"


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "mobilenetv3_small_050"]
)
def test_a_timm_name_is_the_models_own_output(tmp_path: Path, name: str) -> None:
    reference = randomised(timm.create_model(name))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    encoder = encoder_with(f"timm:{name}", tmp_path)
    pixels = pixels_of(encoder)
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
            maps = reference.forward_intermediates(pixels_of(encoder), intermediates_only=True)[stage]
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
        ({"name": "a\0b"}, "name"),  # a traceback
        ({"name": "a\nb"}, "name"),
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


def test_a_projection_of_a_network_without_tokens_is_refused() -> None:
    """It was left out in silence."""
    with pytest.raises(WeightsError, match="a projection is of tokens, and it has none"):
        networks.build_network(PVRS["resnet18"].model_copy(update={"projection": 24}), seed=0)


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


def test_a_store_names_the_version_of_the_package_that_computed_it(
    monkeypatch: pytest.MonkeyPatch, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    """Its code is in no hash: two versions of it are told apart by their numbers alone."""
    site = tmp_path / "site" / "pvrpipe_gray-1.25.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: pvrpipe-gray\nVersion: 1.25\n")
    (site / "entry_points.txt").write_text(f"[{own.ENTRY_POINTS}]\ngray = pvrpipe_gray\n")
    monkeypatch.syspath_prepend(str(site.parent))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    outputs = [(EncoderRequest(name, "random:0", device="cpu"), tmp_path / name) for name in ("gray", "r2d2")]
    embed(write_rollouts((2,), size=64), outputs, EmbedConfig(engine="inline"))
    sys.modules.pop("pvrpipe_gray")
    gray, zoo = (Store.open(folder).manifest.embeddings for _, folder in outputs)
    assert gray is not None
    assert zoo is not None
    assert gray.versions == {**zoo.versions, "pvrpipe-gray": "1.25"}
    assert zoo.versions["transformers"] == transformers.__version__


def test_a_folder_here_takes_no_name_from_a_package_nor_from_an_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package's folder may lie where its name is typed: it was taken for the path of a specification."""
    monkeypatch.setattr(
        own, "entry_points", lambda **_: [EntryPoint("gray", "pvrpipe_gray", own.ENTRY_POINTS)]
    )
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.chdir(tmp_path)
    for name in ("gray", "auto", "mine"):
        Path(name).mkdir()
    asked = EncoderRequest("gray").anywhere()
    assert (asked.pvr, asked.weights) == ("gray", "auto")
    assert find_pvr(asked.pvr).name == "gray"
    sys.modules.pop("pvrpipe_gray")
    Path("mine/pvr.json").write_text(PVRS["resnet18"].model_copy(update={"name": "own"}).model_dump_json())
    for pvr, weights in (("mine", "mine"), ("mine/pvr.json", "mine/pvr.json"), ("hf:mine", "random:0")):
        elsewhere = EncoderRequest(pvr, weights).anywhere()
        assert elsewhere.pvr == pvr.replace("mine", str(tmp_path / "mine"))
        assert elsewhere.weights == weights.replace("mine", str(tmp_path / "mine"))
    assert find_pvr(EncoderRequest("mine").anywhere().pvr).name == "own"


def test_tokens_of_a_package_have_no_summary_unless_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of none of its tokens it would be an embedding without numbers."""

    class Tokens(nn.Module):
        num_prefix_tokens = 2

        def __init__(self, summaries: tuple[int, ...] = ()) -> None:
            super().__init__()
            self.summaries, self.blocks, self.rise = summaries, nn.Sequential(nn.Identity()), nn.Linear(3, 4)

        def tokens(self, x: Tensor, places: Sequence[int], norm: bool) -> list[tuple[Tensor, Tensor]]:
            tokens = self.rise(x.flatten(2).transpose(1, 2))
            return [(tokens[:, 2:], tokens[:, :2])]

    own_tokens = PVRS["vc1"].model_copy(update={"architecture": "package:tokens", "overrides": {}})
    monkeypatch.setitem(PVRS, "tokens", own_tokens)
    monkeypatch.setattr(networks, "package_trunk", lambda _: Tokens())
    with pytest.raises(InvalidValueError, match=r"--pool summary: .* has cls, .*mean, patches;"):
        encoder_with("tokens", Path("random:0"), pooling="summary")
    monkeypatch.setattr(networks, "package_trunk", lambda _: Tokens(summaries=(1,)))
    assert encoder_with("tokens", Path("random:0"), pooling="summary").identity.shape == (4,)


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


@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        ("raise SystemExit('no GPU')", r"cannot be loaded \(no GPU\)"),
        ("def build(side): import one_that_is_not_there", r"cannot build it .*\(No module named"),
        ("def build(side): open('/nowhere/config.yaml')", r"cannot build it .*\(.* No such file"),
        ("def build(side): return side", "`build` gives a int, no network"),
        ("def build(side): return Broken()", "side cannot make --pool pooled .*index 99 is out of bounds"),
        ("pvr = pvr.model_copy(update={'name': 'vc1'})", "calls its `pvr` vc1; .* one name"),
    ],
)
def test_what_a_package_does_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, refusal: str
) -> None:
    """It was a traceback, and of a package that ends Python, nothing at all, not even the list of the others."""
    (tmp_path / "pvrpipe_wrong.py").write_text(
        "from pvrpipe_gray import *\n"
        "pvr = pvr.model_copy(update={'name': 'side', 'architecture': 'package:side'})\n"
        "class Broken(nn.Module):\n    def forward(self, x): return x[0, 0, 0, 99]\n" + code
    )
    points = EntryPoints([EntryPoint("side", "pvrpipe_wrong", own.ENTRY_POINTS)])
    monkeypatch.setattr(own, "entry_points", points.select)
    for folder in (EXAMPLE, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    for module in ("pvrpipe_wrong", "pvrpipe_gray"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert "vc1" in all_pvrs()[0]
    with pytest.raises((InvalidValueError, WeightsError), match=refusal):
        Encoder(EncoderRequest("side", "random:0", device="cpu"))


def test_what_has_one_output_has_one_pooling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An autoencoder's `--pool keypoints` was its own output, and a store that says keypoints."""
    monkeypatch.setattr(
        own, "entry_points", EntryPoints([EntryPoint("gray", "pvrpipe_gray", own.ENTRY_POINTS)]).select
    )
    monkeypatch.syspath_prepend(str(EXAMPLE))
    ae = {
        "name": "ae",
        "source": {"file": "w"},
        "architecture": "conv-autoencoder",
        "pooling": "flat",
        "width": 8,
    }
    spec = (
        PVRS["pieg"].model_dump(mode="json")
        | ae
        | {"layer": "last", "overrides": {"size": 16, "channels": 2}}
    )
    spec["recipe"] |= {"resize": 16, "crop": 16}
    (tmp_path / "pvr.json").write_text(json.dumps(spec))
    for name, has in ((str(tmp_path), "flat"), ("r2d2", "keypoints"), ("gray", "pooled")):
        for pooling in ("flat", "keypoints", "pooled"):
            request = EncoderRequest(name, "random:0", device="cpu", readout=Readout(pooling=pooling))
            if pooling == has:
                assert Encoder(request).identity.pooling == has
            else:
                with pytest.raises(InvalidValueError, match=f"--pool {pooling}: .* has {has}; "):
                    Encoder(request)
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


def test_weights_that_timm_does_not_know_are_one_line() -> None:
    with pytest.raises(UnknownNameError, match=r"nearest: resnet10t\.c3_in1k"):
        find_pvr("timm:resnet10t.c3_in1")

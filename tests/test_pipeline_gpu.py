"""The stage on a GPU: what is recorded and replayed, what cannot be, and memory that does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pvrpipe.pipeline import drafting, preprocessing
from pvrpipe.pipeline.drafting import EmbedConfig, draft, made_by
from pvrpipe.pipeline.embed import embed
from pvrpipe.pipeline.embedding import ShardEmbedder, Target
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, Precision, exact
from pvrpipe.pipeline.golden import check_golden
from pvrpipe.pipeline.replaying import Replayed
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.schemas.specifications import Recipe
from pvrpipe.store.building import PendingStore
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .brittle import brittle
from .conftest import WriteStore
from .test_zoo_cnn import confident_r2d2

pytestmark = pytest.mark.gpu
INLINE = EmbedConfig(engine="inline")


def embeddings(folder: Path) -> list[np.ndarray]:
    store = Store.open(folder)
    return [store.read_episode(int(n), ["embedding"])["embedding"] for n in store.episodes["episode"]]


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts((90, 70, 40), size=64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pvr", ["resnet18", "resnet50", "mae-b", "clip-rn50"])
def test_a_recorded_batch_has_the_bits_of_kernels_launched_one_by_one(
    rollouts: Path, pvr: str, precision: Precision
) -> None:
    encoder = Encoder(EncoderRequest(pvr, "random:0", precision, "cuda", batch=32))
    frames = torch.from_numpy(Store.open(rollouts).read_episode(0)["frame"]).cuda()
    batches = [frames[:32], frames[32:64], frames[64:]]
    one_by_one = [encoder.encode(batch).clone() for batch in batches]
    encoder.replay((64, 64, 3))
    for batch, expected in zip(batches, one_by_one, strict=True):
        torch.testing.assert_close(encoder.encode(batch), expected, rtol=0, atol=0)
    assert isinstance(encoder._compute, Replayed)
    assert encoder._compute.recorded


@pytest.mark.parametrize(
    ("height", "width", "settings"),
    [
        (256, 256, {"resize": 224, "crop": 224}),
        (256, 256, {"resize": 256, "crop": 224}),
        (120, 160, {"resize": 256, "crop": 224}),
        (120, 160, {"resize": 224, "crop": 224, "squash": True, "interpolation": "bilinear"}),
        (
            250,
            250,
            {"resize": 224, "crop": 224, "interpolation": "bilinear", "antialias": False},
        ),  # few halves
        (256, 256, {"resize": 224, "crop": 224, "rounded": False}),
        (64, 64, {"resize": 64, "crop": 64}),
        (85, 97, {}),
    ],
    ids=str,
)
def test_one_kernel_for_each_axis_does_what_torchs_do(
    height: int, width: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"resize": None, "crop": None, "interpolation": "bicubic", "antialias": True} | settings
    recipe = Recipe(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **made)
    noise = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, height, width, 3), dtype=torch.uint8, generator=noise).cuda()
    assert preprocessing.own_kernels(frames.device) is not None
    ours = preprocessing.preprocess(frames, recipe)
    monkeypatch.setattr(preprocessing, "own_kernels", lambda device: None)
    theirs = preprocessing.preprocess(frames, recipe)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    levels = (ours - theirs).abs() * 255 * torch.tensor(recipe.std, device="cuda").view(1, 3, 1, 1)
    assert ours.shape == theirs.shape
    # Halves go up or down by the last bit of a sum, along each axis; a bilinear filter makes many of them: from 256
    # to 224 pixels its weights are fourteenths, and a tenth of what it makes of noise is decided so.
    assert levels.max() < (2.01 if recipe.rounded else 0.01)
    assert (levels > 0.5).double().mean() < (2e-3 if recipe.interpolation == "bicubic" else 0.05)


def test_a_compiled_encoder_makes_the_same_store_again_and_nearly_the_eager_one(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = EncoderRequest("resnet18", "random:0", device="cuda")
    embed(rollouts, [(request, tmp_path / "eager")], INLINE)
    monkeypatch.setattr(drafting, "COMPILED_FROM", 0)
    first, second = (embed(rollouts, [(request, tmp_path / name)], INLINE)[0].id for name in "ef")
    assert first == second
    assert made_by(Store.open(tmp_path / "e").manifest).computation.compiled
    assert verify(tmp_path / "e") == []
    for ours, theirs in zip(embeddings(tmp_path / "e"), embeddings(tmp_path / "eager"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3)


def test_a_network_that_waits_for_the_device_is_launched_as_it_is(rollouts: Path, tmp_path: Path) -> None:
    request = EncoderRequest(brittle(tmp_path / "pvr", 64).pvr, "random:0", device="cuda", batch=32)
    encoder = Encoder(request)
    frames = torch.from_numpy(Store.open(rollouts).read_episode(0)["frame"][:32]).cuda()
    expected = encoder.encode(frames).clone()
    encoder.replay((64, 64, 3))
    for _ in range(3):
        torch.testing.assert_close(encoder.encode(frames), expected, rtol=0, atol=0)
    assert isinstance(encoder._compute, Replayed)
    assert not encoder._compute.recorded


def test_a_gpu_without_room_halves_the_batch_and_loses_nothing(rollouts: Path, tmp_path: Path) -> None:
    """As when someone else's job takes its memory once the store has been begun."""
    store = Store.open(rollouts)
    request = EncoderRequest("resnet18", "random:0", device="cuda", batch=64)
    made = draft(store, request, tmp_path / "e", INLINE)
    shards = range(len(store.manifest.shards))
    with PendingStore.begin(tmp_path / "e", made.manifest) as pending:
        target = Target(
            made.request, tmp_path / "e", made.manifest, made_by(made.manifest), frozenset(shards)
        )
        torch.cuda.empty_cache()
        room = torch.cuda.memory_reserved() + made.need.weights + made.need.batch // 2
        total = torch.cuda.get_device_properties(0).total_memory
        try:
            torch.cuda.set_per_process_memory_fraction(room / total)
            outcomes = list(ShardEmbedder(rollouts, [target]).each(shards))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert [outcome.failures for outcome in outcomes] == [[]] * len(shards)
        pending.seal()
    batches = {entry.batch for entry in Store.open(tmp_path / "e").manifest.shards}
    assert len(batches) == 1
    (batch,) = batches
    assert batch in (32, 16, 8)
    assert verify(tmp_path / "e") == []
    smaller = EncoderRequest("resnet18", "random:0", device="cuda", batch=batch)
    embed(rollouts, [(smaller, tmp_path / "f")], INLINE)
    for ours, theirs in zip(embeddings(tmp_path / "e"), embeddings(tmp_path / "f"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gpus_stores_are_the_same_however_often_they_are_made(rollouts: Path, tmp_path: Path) -> None:
    request = EncoderRequest("resnet18", "random:0", "bf16", "cuda")
    first, second = (embed(rollouts, [(request, tmp_path / name)], INLINE)[0].id for name in "ef")
    assert first == second
    assert verify(tmp_path / "f") == []


def frames_of_noise() -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 96, 96, 3), dtype=torch.uint8, generator=noise)


@pytest.mark.parametrize("pvr", [name for name in PVRS if name != "r2d2"])
def test_every_representation_computes_there_what_it_does_on_a_cpu(
    pvr: str, record_property: Callable[[str, object], None]
) -> None:
    frames, on_cpu = frames_of_noise(), Encoder(EncoderRequest(pvr, "random:0", device="cpu", batch=4))
    # The same pixels for both: where resizing makes halves they go up or down by the last bit of a sum.
    pixels = preprocessing.preprocess(frames, on_cpu.pvr.recipe)
    encoder = Encoder(EncoderRequest(pvr, "random:0", device="cuda", batch=4))
    with torch.inference_mode(), exact():
        theirs, ours = on_cpu.network(pixels), encoder.network(pixels.cuda()).cpu()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    record_property("relative error", error)
    assert error < 1e-5
    frames = frames.cuda()
    in_full = encoder.encode(frames).clone()
    encoder.precision = "bf16"
    rounded = encoder.encode(frames).clone()
    cosine = F.cosine_similarity(rounded.flatten(1).float(), in_full.flatten(1)).min().item()
    record_property("cosine of bf16", cosine)
    assert cosine > 0.99
    encoder.replay((96, 96, 3))
    torch.testing.assert_close(encoder.encode(frames), rounded, rtol=0, atol=0)


def test_r2d2_finds_there_the_keypoints_that_it_finds_on_a_cpu(tmp_path: Path) -> None:
    confident_r2d2(tmp_path / "w.pt")
    cpu, gpu, bf16 = (
        Encoder(EncoderRequest("r2d2", str(tmp_path / "w.pt"), precision, device, 4))(
            frames_of_noise().numpy()
        )
        for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"))
    )
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=1e-4)
    assert ((cpu @ bf16.transpose(0, 2, 1)).max(axis=2) > 0.99).sum() >= 30  # of 32


@pytest.mark.parametrize("pvr", ["resnet50", "siglip-b16", "taskonomy-autoencoding", "r2d2"])
def test_a_store_that_a_cpu_made_in_bfloat16_is_verified_there(
    write_rollouts: WriteStore, tmp_path: Path, pvr: str
) -> None:
    weights = "random:0"
    if pvr == "r2d2":
        confident_r2d2(tmp_path / "w.pt")
        weights = str(tmp_path / "w.pt")
    request = EncoderRequest(pvr, weights, "bf16", "cpu")
    embed(write_rollouts((4, 6), size=64), [(request, tmp_path / "e")], INLINE)
    found = check_golden(Store.open(tmp_path / "e"), weights=weights, device="cuda")
    assert found.ok, found.measured

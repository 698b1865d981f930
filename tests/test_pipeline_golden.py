"""Golden frames: by them the same encoder is told from another, on whatever machine and by whatever name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from typer.testing import CliRunner

from pvrpipe.cli import app
from pvrpipe.pipeline.agreement import agreement, agreement_of_keypoints, distance, rounding
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest, Precision
from pvrpipe.pipeline.golden import check_golden
from pvrpipe.pipeline.readout import Readout
from pvrpipe.schemas.errors import CorruptStoreError, EncodingError, NotAStoreError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.store.shards import Rows

from .conftest import WriteStore
from .test_pipeline_embed import INLINE
from .test_zoo_cnn import confident_r2d2


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts((9, 6), size=24)


def test_golden_frames_are_frames_of_the_store_with_their_embeddings(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    golden = safetensors.numpy.load_file(tmp_path / "e" / "golden.safetensors")
    assert len(golden["frame"]) == 8
    assert golden["row"].tolist() == [0, 1, 2, 3, 5, 6, 7, 9]  # of 10: from the first to the last, evenly
    frames = Store.open(rollouts).read_episode(0, ["frame"])["frame"]
    np.testing.assert_array_equal(golden["frame"], frames[golden["row"]])
    np.testing.assert_array_equal(
        Encoder(autoencoder)(golden["frame"]).astype(np.float16), golden["embedding"]
    )


def test_golden_frames_of_ones_own_encoder_want_its_folder(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    store = Store.open(tmp_path / "e")
    with pytest.raises(UnknownNameError, match=r"embedded by autoencoder, .* give its folder with --pvr"):
        check_golden(store)
    with pytest.raises(
        EncodingError, match=r"r2d2 cannot be read out as .*--pool flat.*own encoder with --pvr"
    ):
        check_golden(store, pvr="r2d2", weights="random:0")
    assert check_golden(store, pvr=str(tmp_path / "ae")).ok


def test_what_an_encoder_is_called_is_not_what_it_computes(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    store = Store.open(tmp_path / "e")
    spec = json.loads((tmp_path / "ae" / "pvr.json").read_text())
    (tmp_path / "ae" / "pvr.json").write_text(json.dumps({**spec, "name": "a", "title": "b", "licence": "c"}))
    assert check_golden(store, pvr=str(tmp_path / "ae")).ok  # the same by another name
    tensors = safetensors.torch.load_file(tmp_path / "ae" / "encoder.safetensors")
    tensors["latent.weight"].view(torch.int32)[0, 0] ^= 1  # the last bit of one number
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
    near = check_golden(store, pvr=str(tmp_path / "ae"), weights=str(tmp_path / "other.safetensors"))
    assert near.smallest_cosine > 0.99999
    assert not near.ok
    assert "weights.tensors_sha256" in near.differs


def test_golden_frames_are_computed_in_the_precision_of_the_store(rollouts: Path, tmp_path: Path) -> None:
    config = EmbedConfig(engine="inline", dtype="float32")
    request = EncoderRequest("resnet18", "random:0", batch=8)
    outputs = [(request, tmp_path / "e"), (replace(request, precision="bf16"), tmp_path / "r")]
    embed(rollouts, outputs, config)
    exact, store = Store.open(tmp_path / "e"), Store.open(tmp_path / "r")
    apart = np.abs(exact.read_episode(0)["embedding"] - store.read_episode(0)["embedding"]).max()
    assert apart > 1e-4
    found = check_golden(store)
    assert found.ok
    assert found.largest_difference < apart / 10


def test_golden_frames_tell_the_same_encoder_from_another(rollouts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    embed(rollouts, [(EncoderRequest("resnet18", "random:0", batch=8), folder)], EmbedConfig(engine="inline"))
    store = Store.open(folder)
    same = check_golden(store)
    assert same.ok
    assert same.failures == []
    assert same.frames == len(safetensors.numpy.load_file(folder / "golden.safetensors")["row"])
    assert same.smallest_cosine > 0.99999
    other = check_golden(store, weights="random:1")
    assert not other.ok
    assert "weights.tensors_sha256" in other.differs
    assert other.smallest_cosine < 0.999
    (failure,) = other.failures
    assert failure.where == "golden.safetensors"
    assert re.match(
        r"another encoder here \(.*tensors_sha256.*\): largest difference .*, smallest", failure.what
    )
    with pytest.raises(EncodingError, match="give the store's own encoder"):
        check_golden(store, pvr="resnet50", weights="random:0")
    with pytest.raises(NotAStoreError, match="only embedding stores"):
        check_golden(Store.open(rollouts))
    (folder / "golden.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        check_golden(store)


def test_golden_embeddings_of_zeros_agree_and_those_of_another_length_do_not() -> None:
    zeros, ones = np.zeros((1, 4)), np.ones((1, 4))
    assert agreement(zeros, zeros) == (1.0, True)  # R2D2 finds nothing
    assert agreement(zeros, ones) == (0.0, False)
    cosine, agree = agreement(2 * ones, ones)  # a projection that was not normalised
    assert cosine == pytest.approx(1.0)
    assert not agree
    among = np.vstack([np.ones((3, 4)), np.eye(4)[:1]])  # one of four is another
    assert agreement(among, np.ones((4, 4))) == (pytest.approx(0.5), False)


def test_what_bfloat16_may_do_is_measured_here_and_never_as_much_as_another_filter_does() -> None:
    exact = np.random.default_rng(0).standard_normal((8, 512))
    noise = np.random.default_rng(1).standard_normal((2, 8, 512))
    here, there = exact + 0.014 * noise
    assert not agreement(here, there)[1]
    assert rounding(here, exact) == pytest.approx(0.028, rel=0.2)
    assert agreement(here, there, rounding(here, exact))[1]
    assert not agreement(here, exact + 0.05 * noise[1], rounding(here, exact))[1]
    assert rounding(exact, exact) == distance(0.9999)
    assert rounding(exact + 0.5 * noise[0], exact) == distance(0.999)
    assert rounding(np.zeros((1, 2)), np.zeros((1, 2))) == distance(0.9999)


def test_of_keypoints_in_bfloat16_three_of_four_are_found_again_in_any_order() -> None:
    made = np.random.default_rng(0).standard_normal((2, 8, 128))
    made /= np.linalg.norm(made, axis=2, keepdims=True)
    assert agreement_of_keypoints(made[:, ::-1], made) == (pytest.approx(1), True)
    other = np.roll(made[:, ::-1], 1, axis=2)  # other descriptors, as long
    for replaced, agree in ((2, True), (3, False)):
        mixed = np.concatenate([other[:, :replaced], made[:, replaced:]], axis=1)
        cosine, found = agreement_of_keypoints(mixed, made)
        assert found == agree
        assert cosine < 0.9
    assert not agreement_of_keypoints(np.zeros_like(made), made)[1]


def test_zeros_where_a_frame_has_fewer_keypoints_are_none_that_are_found() -> None:
    made = np.random.default_rng(0).standard_normal((3, 4, 8, 128))
    made /= np.linalg.norm(made, axis=3, keepdims=True)
    more, stored, other = made
    none = np.zeros_like(stored)
    stored[:, 2:] = other[:, 2:] = 0  # two in each frame, and others as few
    assert agreement_of_keypoints(stored, stored) == (pytest.approx(1), True)
    assert agreement_of_keypoints(none, none) == (1.0, True)
    more[:, :2] = stored[:, :2]  # all that are stored, among others
    unlike = np.where(np.arange(4)[:, None, None] == 3, np.nan, stored)
    for computed in (other, none, more, unlike):
        assert not agreement_of_keypoints(computed, stored)[1]
    assert not agreement_of_keypoints(stored, none)[1]


def test_a_bit_of_the_weights_changed_is_a_failure_as_any_other(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    asked = ["verify", str(tmp_path / "e"), "--golden", "--pvr", str(tmp_path / "ae")]
    same = CliRunner().invoke(app, [*asked, "--json"])
    assert same.exit_code == 0
    assert json.loads(same.stdout)["failures"] == []
    assert json.loads(same.stdout)["golden"]["ok"]
    content = bytearray((tmp_path / "ae" / "encoder.safetensors").read_bytes())
    content[-4] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(content)
    asked += ["--weights", str(tmp_path / "changed.safetensors")]
    found = CliRunner().invoke(app, [*asked, "--json"])
    assert found.exit_code == 1
    (failure,) = json.loads(found.stdout)["failures"]
    assert failure["where"] == "golden.safetensors"
    assert "tensors_sha256" in failure["what"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 1
    assert "another encoder here" in told.stdout


@pytest.mark.parametrize(
    ("precision", "further", "ok"),
    [("fp32", 0.02, False), ("bf16", 0.02, True), ("bf16", 0.06, False)],
)
def test_numbers_decide_where_the_encoder_is_called_the_same(
    precision: Precision,
    further: float,
    ok: bool,
    rollouts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another machine's bfloat16 may be as far away as this one's is from float32; float32 may not, and nothing far."""
    embed(rollouts, [(EncoderRequest("resnet18", "random:0", precision, "cpu", 8), tmp_path / "e")], INLINE)
    computed = Encoder.__call__

    def elsewhere(encoder: Encoder, frames: Rows) -> Rows:
        return computed(encoder, frames) * (1 + further * (encoder.precision == precision))

    monkeypatch.setattr(Encoder, "__call__", elsewhere)
    found = check_golden(Store.open(tmp_path / "e"), device="cpu")
    assert (found.ok, found.differs) == (ok, "")


def test_keypoints_in_bfloat16_may_come_in_another_order(
    write_rollouts: WriteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, computed = str(tmp_path / "w.pt"), Encoder.__call__
    confident_r2d2(tmp_path / "w.pt")
    request = EncoderRequest("r2d2", weights, "bf16", "cpu", 4, readout=Readout(size=64))
    embed(write_rollouts((3, 2), size=64), [(request, tmp_path / "e")], INLINE)
    monkeypatch.setattr(Encoder, "__call__", lambda *given: computed(*given)[:, ::-1])
    assert check_golden(Store.open(tmp_path / "e"), weights=weights, device="cpu").ok

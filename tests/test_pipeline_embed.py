"""The embedding stage: right values, the same bytes whatever runs it, and nothing lost when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import safetensors.numpy
import safetensors.torch
import torch

from pvrpipe.pipeline import drafting, ray_engine
from pvrpipe.pipeline.embed import EmbedConfig, embed, estimate
from pvrpipe.pipeline.embedding import stored_as
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
from pvrpipe.pipeline.pretraining import PretrainConfig, pretrain
from pvrpipe.pipeline.readout import Readout
from pvrpipe.schemas.errors import (
    EncodingError,
    InvalidValueError,
    NotAStoreError,
    OutputExistsError,
)
from pvrpipe.schemas.specifications import EmbeddingSpecification
from pvrpipe.store.merging import merge, split
from pvrpipe.store.reading import Store
from pvrpipe.store.verifying import verify

from .conftest import WriteStore
from .killing import run_killed
from .small import SMALL
from .test_store_growing import grow

INLINE = EmbedConfig(engine="inline")


@pytest.fixture
def rollouts(write_rollouts: WriteStore) -> Path:
    return write_rollouts(size=24)


def test_every_embedding_is_that_of_its_own_frame(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    (result,) = embed(
        rollouts, [(autoencoder, tmp_path / "e")], EmbedConfig(engine="inline", dtype="float32")
    )
    encoder, frames, embeddings = Encoder(autoencoder), Store.open(rollouts), Store.open(tmp_path / "e")
    assert (result.rows, result.shape) == (frames.manifest.rows, (8,))
    for episode in range(frames.manifest.episodes):
        source, stored = frames.read_episode(episode), embeddings.read_episode(episode)
        for at in range(0, len(source["frame"]), 16):
            expected = encoder(source["frame"][at : at + 16])
            np.testing.assert_array_equal(stored["embedding"][at : at + 16], expected)
        for name in ("action", "reward", "state", "is_first", "is_last", "is_terminal", "episode", "step"):
            np.testing.assert_array_equal(stored[name], source[name], err_msg=name)
    assert verify(tmp_path / "e") == []
    assert embeddings.shard(0).mapped("embedding") is not None


def test_episodes_keep_their_splits_whatever_their_rollouts_were_made_of(
    autoencoder: EncoderRequest, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    """Of merged, split and grown rollouts splits do not follow from an episode's number in the store."""
    one, two = write_rollouts(name="one"), write_rollouts(name="two", seed=5)
    merge([one, two], tmp_path / "merged")
    grow(tmp_path / "merged", (9, 8), seed=70, policy="mpc")
    assert verify(tmp_path / "merged") == []
    split(one, tmp_path / "split", where="episode != 0")
    grow(two, (9, 11, 12))
    grow(two, (10, 10), seed=6)
    for name in ("merged", "split", "two"):
        out = tmp_path / f"{name}-embedded"
        embed(tmp_path / name, [(autoencoder, out)], INLINE)
        assert verify(out) == []
        splits = [Store.open(folder).episodes["split"].to_list() for folder in (tmp_path / name, out)]
        assert splits[0] == splits[1]
        assert seeds(out) == seeds(tmp_path / name)
    assert "policy `random`, `mpc`" in (tmp_path / "merged-embedded" / "README.md").read_text()


def seeds(folder: Path) -> list[tuple[int, int, int]]:
    """Of each part: its first episode, its episodes, and the seed that its rollouts were made with."""
    made = [
        (p, getattr(p.specification, "rollouts", p.specification))
        for p in Store.open(folder).manifest.all_parts
    ]
    return [(part.first_episode, part.episodes, rollouts.seed) for part, rollouts in made]


def test_embeddings_made_as_one_part_are_taken_as_they_are_and_grow(
    autoencoder: EncoderRequest, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    """Once, embeddings of rollouts in parts told of the first part only."""
    rollouts, out = tmp_path / "merged", tmp_path / "e"
    merge([write_rollouts(name="one"), write_rollouts((9, 8), name="two", seed=5)], rollouts)
    with pytest.MonkeyPatch.context() as then:
        then.setattr(drafting, "_begun_as_one", lambda *_: True)
        (made,) = embed(rollouts, [(autoencoder, out)], INLINE)
    assert (seeds(out), verify(out)) == ([(0, 8, 0)], [])
    (again,) = embed(rollouts, [(autoencoder, out)], INLINE)
    assert (again.id, again.resumed_shards) == (made.id, made.shards)
    grow(rollouts, (9, 11), seed=70)
    (grown,) = embed(rollouts, [(autoencoder, out)], EmbedConfig(engine="inline", append=True))
    assert grown.resumed_shards == made.shards
    assert (seeds(out), verify(out)) == ([(0, 8, 0), (8, 2, 70)], [])


def test_growth_by_several_parts_is_embedded_at_once(
    autoencoder: EncoderRequest, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts, out = write_rollouts(name="grown"), tmp_path / "e"
    embed(rollouts, [(autoencoder, out)], INLINE)
    grow(rollouts, (9, 11, 12))
    grow(rollouts, (10, 10), seed=6)
    embed(rollouts, [(autoencoder, out)], EmbedConfig(engine="inline", append=True))
    assert verify(out) == []
    assert Store.open(out).episodes["split"].equals(Store.open(rollouts).episodes["split"])
    assert seeds(out) == seeds(rollouts) == [(0, 6, 0), (6, 3, 5), (9, 2, 6)]


def test_an_encoder_that_maps_all_its_pixels_has_one_input_size(autoencoder: EncoderRequest) -> None:
    with pytest.raises(InvalidValueError, match=r"sees 16 pixels and no other.*pretrain --size 32"):
        Encoder(replace(autoencoder, readout=Readout(size=32)))


APPEND = EmbedConfig(engine="inline", append=True)


def test_what_joins_a_store_is_computed_as_it_says_and_must_be_of_its_kind(
    autoencoder: EncoderRequest, write_rollouts: WriteStore, tmp_path: Path
) -> None:
    """The first embeddings may have been made with other batches, or on another device."""
    rollouts, out = write_rollouts(name="grown"), tmp_path / "e"
    (made,) = embed(rollouts, [(autoencoder, out)], APPEND)  # there is nothing yet: it is begun
    for other, config in (
        (replace(autoencoder, precision="bf16"), APPEND),
        (autoencoder, replace(APPEND, dtype="float32")),
        (autoencoder, replace(APPEND, shard_format="webdataset")),
        (replace(autoencoder, pvr="timm:test_vit", weights="random:0"), APPEND),
    ):
        with pytest.raises(OutputExistsError, match=r"cannot join the store|--format parquet"):
            embed(rollouts, [(other, out)], config)
    grow(rollouts, (9, 11, 12))
    with pytest.raises(OutputExistsError, match=r"grew to 9 episodes.*--append"):
        embed(rollouts, [(autoencoder, out)], INLINE)
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        inner = Encoder.encode
        patched.setattr(Encoder, "encode", lambda self, x: (sizes.append(self.batch), inner(self, x))[1])
        embed(rollouts, [(replace(autoencoder, batch=4), out)], APPEND)
    part = Store.open(out).manifest.parts[-1].specification
    assert isinstance(part, EmbeddingSpecification)
    assert (made.batch, part.computation.batch, set(sizes)) == (16, 4, {1, 4})  # one frame is tried
    assert verify(out) == []
    (again,) = embed(rollouts, [(autoencoder, out)], INLINE)  # all of it is there, however it came
    assert (again.id, again.resumed_shards) == (Store.open(out).manifest.id, again.shards)
    with pytest.raises(OutputExistsError, match=r"dtype: float16, there float32"):
        embed(rollouts, [(autoencoder, out)], replace(INLINE, dtype="float32"))


@pytest.mark.parametrize("revision", [1, 2])
def test_a_store_not_finished_when_its_rollouts_grew_is_finished_and_grows(
    autoencoder: EncoderRequest, write_rollouts: WriteStore, tmp_path: Path, revision: int
) -> None:
    def embedded(name: str, config: EmbedConfig) -> str:
        return embed(rollouts, [(autoencoder, tmp_path / name)], config)[0].id

    def stopped(done: float, total: float, note: str = "") -> None:
        if done:
            raise KeyboardInterrupt

    rollouts = write_rollouts(name="grown")
    if revision == 2:
        assert embedded("e", APPEND) == embedded("undisturbed", APPEND)
        grow(rollouts, (9, 11), seed=1)
    with pytest.raises(KeyboardInterrupt):
        embed(rollouts, [(autoencoder, tmp_path / "e")], APPEND, stopped)
    embedded("undisturbed", APPEND)
    grow(rollouts, (9, 11), seed=2)
    with pytest.raises(OutputExistsError, match="finishes that first"):
        estimate(rollouts, [(autoencoder, tmp_path / "e")], APPEND)
    assert embedded("e", APPEND) == embedded("undisturbed", APPEND)
    assert verify(tmp_path / "e") == []


@pytest.mark.parametrize("other", [False, True])
def test_rollouts_are_never_overwritten_by_embeddings(
    rollouts: Path, autoencoder: EncoderRequest, write_rollouts: WriteStore, tmp_path: Path, other: bool
) -> None:
    """Neither those that are embedded nor any others: a path mistaken for another costs nothing."""
    out = write_rollouts(name="other", size=24) if other else rollouts
    with pytest.raises(
        OutputExistsError if other else InvalidValueError, match=r"never replace|the store to read"
    ):
        embed(rollouts, [(autoencoder, out)], EmbedConfig(engine="inline", overwrite=True))
    assert verify(out) == []


def test_two_encoders_in_one_pass_equal_one_at_a_time(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    pretrain(rollouts, tmp_path / "other", PretrainConfig(**{**vars(SMALL), "seed": 1}))
    other = EncoderRequest(str(tmp_path / "other"), device="cpu", batch=8)
    together = embed(rollouts, [(autoencoder, tmp_path / "a"), (other, tmp_path / "b")], INLINE)
    alone = [embed(rollouts, [(r, tmp_path / n)], INLINE)[0] for r, n in ((autoencoder, "c"), (other, "d"))]
    assert [r.id for r in together] == [r.id for r in alone]
    assert together[0].id != together[1].id


def test_ray_data_gives_the_same_store_as_this_process(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    inline = embed(rollouts, [(autoencoder, tmp_path / "inline")], INLINE)
    seen: list[float] = []
    on_ray = embed(
        rollouts,
        [(autoencoder, tmp_path / "ray")],
        EmbedConfig(engine="ray", workers=2),
        lambda done, total, note="": seen.append(done / total),
    )
    assert on_ray[0].id == inline[0].id
    assert seen[-1] == 1
    assert (tmp_path / "ray" / "store.json").read_bytes() == (tmp_path / "inline" / "store.json").read_bytes()


def test_ray_data_gives_each_worker_a_gpu_where_the_device_is_one(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that is told of a GPU, which Ray then counts; what is computed is computed on a CPU."""
    inline = embed(rollouts, [(autoencoder, tmp_path / "inline")], INLINE)
    monkeypatch.setattr(ray_engine, "device_named", lambda name: torch.device("cuda"))
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        on_ray = embed(rollouts, [(autoencoder, tmp_path / "ray")], EmbedConfig(engine="ray"))
    finally:
        ray.shutdown()
    assert on_ray[0].id == inline[0].id


KILLED = """
import sys, time
from pathlib import Path
from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import Encoder, EncoderRequest
encode = Encoder.encode
Encoder.encode = lambda self, frames: (time.sleep(0.2), encode(self, frames))[1]
request = EncoderRequest(sys.argv[2], device="cpu", batch=16)
embed(Path(sys.argv[1]), [(request, Path(sys.argv[3]))], EmbedConfig(engine="inline"))
"""


def test_killed_and_run_again_it_ends_with_the_same_store(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    (whole,) = embed(rollouts, [(autoencoder, tmp_path / "whole")], INLINE)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(rollouts), autoencoder.pvr, str(tmp_path / "e")]
    )
    while not (tmp_path / "e" / "shards" / "00001.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "e" / "episodes.parquet").exists()
    (resumed,) = embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    assert 2 <= resumed.resumed_shards < resumed.shards
    assert resumed.id == whole.id
    assert sorted(p.name for p in (tmp_path / "e").rglob("*")) == sorted(
        p.name for p in (tmp_path / "whole").rglob("*")
    )


def test_float16_never_overflows_in_silence() -> None:
    rows = {"episode": np.array([4, 4]), "step": np.array([8, 9])}
    embedding = np.array([[1.0, 2.0], [3.0, 70_000.0]], np.float32)
    with pytest.raises(
        EncodingError, match=r"gives 70000 at episode 4, step 9, beyond float16; embed with --dtype float32"
    ):
        stored_as(embedding, "float16", "x", rows)
    assert stored_as(embedding, "float32", "x", rows).tolist() == embedding.tolist()


def test_outputs_that_exist_and_inputs_that_do_not_fit(
    rollouts: Path, autoencoder: EncoderRequest, tmp_path: Path
) -> None:
    embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    with pytest.raises(OutputExistsError, match="dtype: float16, now float32"):
        embed(rollouts, [(autoencoder, tmp_path / "e")], EmbedConfig(engine="inline", dtype="float32"))
    with pytest.raises(NotAStoreError, match="give the rollout store"):
        embed(tmp_path / "e", [(autoencoder, tmp_path / "f")], INLINE)
    with pytest.raises(InvalidValueError, match="same folder"):
        embed(rollouts, [(autoencoder, tmp_path / "g"), (autoencoder, tmp_path / "g")], INLINE)
    (again,) = embed(rollouts, [(autoencoder, tmp_path / "e")], INLINE)
    assert again.resumed_shards == again.shards == 6
    whole = EmbedConfig(engine="inline", append=True, overwrite=True)
    assert estimate(rollouts, [(autoencoder, tmp_path / "e")], whole)[0].shards == 0  # it holds all of it


def test_pretraining_lowers_the_error_on_held_out_frames_and_repeats_exactly(
    write_rollouts: WriteStore, tmp_path: Path
) -> None:
    rollouts = write_rollouts(size=16)
    few, many = (PretrainConfig(**{**vars(SMALL), "updates": n}) for n in (1, 60))
    short, long = (pretrain(rollouts, tmp_path / str(c.updates), c) for c in (few, many))
    assert long.loss < short.loss
    assert long.val_loss < short.val_loss
    again = pretrain(rollouts, tmp_path / "again", many)
    assert safetensors.torch.load_file(again.pvr / "encoder.safetensors").keys()
    for name in ("encoder.safetensors", "pvr.json"):
        assert (again.pvr / name).read_bytes() == (long.pvr / name).read_bytes()
    assert pretrain(rollouts, tmp_path / "again", many).reused
    with pytest.raises(OutputExistsError, match="another configuration"):
        pretrain(rollouts, tmp_path / "again", few)
    with pytest.raises(InvalidValueError, match="multiple of 16"):
        PretrainConfig(size=30)


def test_pretraining_killed_at_a_rename_and_run_again(write_rollouts: WriteStore, tmp_path: Path) -> None:
    rollouts = write_rollouts(size=16)
    config = PretrainConfig(**{**vars(SMALL), "updates": 2})
    whole = pretrain(rollouts, tmp_path / "whole", config).pvr
    assert run_killed(pretrain, rollouts, tmp_path / "killed", config, stop=2)
    assert list((tmp_path / "killed").glob("*.tmp-*"))
    pretrain(rollouts, tmp_path / "killed", config)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does(rollouts: Path) -> None:
    frames = Store.open(rollouts).read_episode(0)["frame"][:8]
    on_cpu, on_gpu = (
        Encoder(EncoderRequest("resnet18", "random:0", device=d, batch=8)) for d in ("cpu", "cuda")
    )
    assert torch.cuda.is_available()
    np.testing.assert_allclose(on_gpu(frames), on_cpu(frames), rtol=1e-3, atol=1e-4)

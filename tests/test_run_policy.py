"""A trained run as a policy: it sees what the environment shows, and is part of what a store is made by."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pvrpipe.pipeline.embed import EmbedConfig, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.readout import Readout
from pvrpipe.pipeline.tuning import TunedEncoder, tuning_of
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.rollouts.policies import parse_policy
from pvrpipe.schemas.errors import InvalidValueError, OutputExistsError, RunError, UnknownNameError
from pvrpipe.store.reading import Store
from pvrpipe.worldmodel.runs import read_run, write_run
from pvrpipe.worldmodel.training import TrainConfig, load_model, train

INLINE = Engine("inline")


def configured(policy: str) -> CollectConfig:
    return CollectConfig("dmc:pendulum-swingup", size=64, episodes=3, max_steps=6, policy=policy)


def trained(store: Path, run: Path, model: str = "tdmpc2") -> Path:
    train(TrainConfig(model, updates=2, batch=2, length=4, log_every=1, save_every=1), store, run)
    return run


@pytest.mark.parametrize("pvr", [None, "resnet18"])
def test_a_run_acts_by_what_it_sees(tmp_path: Path, pvr: str | None) -> None:
    collect(configured("random"), tmp_path / "random", INLINE)
    store = tmp_path / "random"
    if pvr is not None:
        request = EncoderRequest(pvr, "random:0", batch=1, device="cpu")
        embed(store, [(request, tmp_path / "embedded")], EmbedConfig(engine="inline", dtype="float32"))
        store = tmp_path / "embedded"
    run = trained(store, tmp_path / "run")
    collect(configured(f"run={run}"), tmp_path / "played", INLINE)
    played = Store.open(tmp_path / "played")
    if pvr is not None:
        embed(
            tmp_path / "played", [(request, tmp_path / "seen")], EmbedConfig(engine="inline", dtype="float32")
        )
        played = Store.open(tmp_path / "seen")
    model, _ = load_model(run, torch.device("cpu"))
    for number in range(3):
        episode = played.read_episode(number)
        column = "frame" if pvr is None else "embedding"
        for t in range(6):
            shown = torch.from_numpy(np.ascontiguousarray(episode[column][: t + 1]))[None]
            expected = model.act(shown)[0].numpy()
            np.testing.assert_allclose(episode["action"][t], expected, rtol=1e-4, atol=1e-6)


def test_a_run_acts_through_the_encoder_inside_it(tmp_path: Path) -> None:
    collect(configured("random"), tmp_path / "random", INLINE)
    tuning = tuning_of("resnet18", "random:0", "1")
    looking = partial(TunedEncoder, tuning, (64, 64), Readout(), "cpu")
    config = TrainConfig("tdmpc2", updates=2, batch=2, length=4, log_every=1, save_every=1)
    train(config, tmp_path / "random", tmp_path / "run", backbone=looking())
    collect(configured(f"run={tmp_path / 'run'}"), tmp_path / "played", INLINE)
    model, _ = load_model(tmp_path / "run", torch.device("cpu"), looking())
    episode = Store.open(tmp_path / "played").read_episode(0)
    for t in range(6):
        shown = torch.from_numpy(np.ascontiguousarray(episode["frame"][: t + 1]))[None]
        np.testing.assert_allclose(episode["action"][t], model.act(shown)[0].numpy(), rtol=1e-4, atol=1e-6)


def test_a_run_acts_in_the_bounds_of_its_environment(tmp_path: Path) -> None:
    """From -3 to 3: a policy's own actions end at 1, a third of the way."""
    pendulum = replace(configured("random"), environment="gym:InvertedPendulum-v5", episodes=6)
    collect(pendulum, tmp_path / "random", INLINE)
    config = TrainConfig("tdmpc2", updates=2, batch=2, length=2, log_every=1, save_every=1)
    train(config, tmp_path / "random", tmp_path / "run")
    collect(replace(pendulum, policy=f"run={tmp_path / 'run'}", episodes=1), tmp_path / "played", INLINE)
    model, record = load_model(tmp_path / "run", torch.device("cpu"))
    assert record.setting.bounds == ((-3, 3),)
    episode = Store.open(tmp_path / "played").read_episode(0)
    shown = torch.from_numpy(np.ascontiguousarray(episode["frame"][:1]))[None]
    np.testing.assert_allclose(episode["action"][0], 3 * model.act(shown)[0].numpy(), rtol=1e-4, atol=1e-6)


def test_another_checkpoint_is_another_configuration(tmp_path: Path) -> None:
    collect(configured("random"), tmp_path / "random", INLINE)
    run = trained(tmp_path / "random", tmp_path / "run")
    policy = f"random:0.5,run={run}+0.1~0.2:0.5"
    first = collect(configured(policy), tmp_path / "played", INLINE)
    assert collect(configured(policy), tmp_path / "again", INLINE).id == first.id
    with (run / "checkpoint.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(OutputExistsError, match="policy"):
        collect(configured(policy), tmp_path / "played", INLINE)


def test_what_is_no_policy_is_one_line(tmp_path: Path) -> None:
    collect(configured("random"), tmp_path / "random", INLINE)
    run = trained(tmp_path / "random", tmp_path / "run", "dreamerv3")
    with pytest.raises(RunError, match="dreamerv3, which has no policy; train one with --model tdmpc2"):
        collect(configured(f"run={run}"), tmp_path / "played", INLINE)
    with pytest.raises(RunError, match="pvrpipe train-model"):
        collect(configured(f"run={tmp_path / 'nothing'}"), tmp_path / "played", INLINE)
    with pytest.raises(InvalidValueError, match="random takes no argument"):
        parse_policy("random=3")
    with pytest.raises(UnknownNameError, match="unknown policy 'runs'"):
        parse_policy(f"runs={run}")
    assert not (tmp_path / "played").exists()


def test_a_run_on_embeddings_that_no_name_finds_is_refused_before_a_store_is_begun(tmp_path: Path) -> None:
    collect(configured("random"), tmp_path / "random", INLINE)
    request = EncoderRequest("resnet18", "random:0", batch=1, device="cpu")
    embed(tmp_path / "random", [(request, tmp_path / "embedded")], EmbedConfig(engine="inline"))
    run = trained(tmp_path / "embedded", tmp_path / "run")
    record = read_run(run)
    assert record.encoder is not None
    own = record.encoder.model_copy(update={"name": "autoencoder"})
    write_run(run, record.model_copy(update={"encoder": own}))
    with pytest.raises(
        RunError, match=r"by autoencoder, which is no name known here.*train-model ROLLOUTS --pvr"
    ):
        collect(configured(f"run={run}"), tmp_path / "played", INLINE)
    assert not (tmp_path / "played").exists()

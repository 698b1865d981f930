"""``pvrpipe demo``: the whole way on a real environment, by the same functions as the commands call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pvrpipe.commands.options import HORIZONS
from pvrpipe.commands.shared_ray import shared_ray
from pvrpipe.commands.terminal import error_rows, note, watching
from pvrpipe.pipeline.embed import EmbedConfig, EmbedResult, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pretraining import PretrainConfig, pretrain
from pvrpipe.pipeline.weights import find_weights
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.schemas.errors import RunError, WeightsError, one_line
from pvrpipe.store.workspace import Workspace
from pvrpipe.worldmodel.sweep import Job, sweep
from pvrpipe.worldmodel.training import TrainConfig

ENVIRONMENT = "dmc:pendulum-swingup"
SIZE = 128  # pixels; above this, software rendering costs half as much again
#: Diverse trajectories, as the study's analysis has them: aimless, wandering, good, and nearly good.
POLICY = "random:0.2,ou:0.2,mpc:0.3,mpc+0.3:0.3"
MODELS: dict[str, dict[str, Any]] = {
    "dreamerv3": {"batch": 16, "length": 32, "learning_rate": 1e-3, "warmup": 50},
    "tdmpc2": {"batch": 128, "learning_rate": 1e-3},
    "dinowm": {"batch": 32, "learning_rate": 1e-3},
}
#: From scratch, on the frames themselves: smaller batches, for convolutions cost ten times a linear map.
SCRATCH: dict[str, dict[str, Any]] = {
    "dreamerv3": {**MODELS["dreamerv3"], "batch": 8, "length": 16},
    "tdmpc2": {**MODELS["tdmpc2"], "batch": 32},
}


@dataclass(frozen=True)
class DemoConfig:
    """How much of everything."""

    episodes: int
    max_steps: int
    updates: int
    seed: int
    engine: Literal["ray", "inline"]


def demonstrate(root: Path, config: DemoConfig) -> list[dict[str, str]]:
    """Collect, pretrain, embed, train and probe; the rows of the table that compares the models."""
    workspace = Workspace(root)
    rollouts, autoencoder = workspace.rollouts(ENVIRONMENT), workspace.pvr(ENVIRONMENT, "autoencoder")
    with shared_ray(config.engine):
        collecting = CollectConfig(
            environment=ENVIRONMENT,
            size=SIZE,
            episodes=config.episodes,
            max_steps=config.max_steps,
            policy=POLICY,
            seed=config.seed,
        )
        with watching("collect", "frames") as progress:
            collect(collecting, rollouts, Engine(config.engine), progress=progress)
        with watching("pretrain", "updates") as progress:
            pretraining = PretrainConfig(seed=config.seed, updates=config.updates)
            pretrain(rollouts, autoencoder, pretraining, progress=progress)
        control = EncoderRequest("resnet18", f"random:{config.seed}")
        outputs = [
            (EncoderRequest(str(autoencoder)), workspace.embeddings(ENVIRONMENT, "autoencoder")),
            (control, workspace.embeddings(ENVIRONMENT, f"resnet18-{control.weights}")),
            *((request, workspace.embeddings(ENVIRONMENT, request.pvr)) for request in _real_pvr()),
        ]
        with watching("embed", "frames") as progress:
            stores = embed(rollouts, outputs, EmbedConfig(engine=config.engine), progress)
        return _compare_all(_jobs(workspace, rollouts, stores, config), config)


def _jobs(
    workspace: Workspace, rollouts: Path, stores: Sequence[EmbedResult], config: DemoConfig
) -> list[Job]:
    """From scratch first, which takes longest; then every model on every store of embeddings."""

    def job(store: Path, name: str, model: str, settings: dict[str, Any]) -> Job:
        wanted = TrainConfig(model=model, updates=config.updates, seed=config.seed, **settings)
        return Job(
            str(store.absolute()), workspace.run(f"{name}-{model}").absolute(), wanted, tuple(HORIZONS)
        )

    scratch = [job(rollouts, "scratch", model, how) for model, how in SCRATCH.items()]
    return scratch + [
        job(each.store, each.store.name, model, how) for each in stores for model, how in MODELS.items()
    ]


def _compare_all(jobs: Sequence[Job], config: DemoConfig) -> list[dict[str, str]]:
    """Train and probe; the rows of the table."""
    with watching("models", "updates") as progress:
        outcomes = sweep(jobs, engine=config.engine, progress=progress)
    rows = []
    for outcome in outcomes:
        if outcome.probe is None:
            raise RunError(f"{outcome.run}: {outcome.failure}")
        pvr = outcome.probe["pvr"] + (" (random weights)" if outcome.probe["random_weights"] else "")
        rows += [{"pvr": pvr, "model": outcome.model, **row} for row in error_rows(outcome.probe)]
    return rows


def _real_pvr() -> list[EncoderRequest]:
    """A representation that someone trained, where its weights can be had; a line why not, where not."""
    name = "vc1" if torch.cuda.is_available() else "resnet18"
    try:
        find_weights(PVRS[name], "auto", name)
    except WeightsError as error:
        note(f"no published PVR in this demonstration: {one_line(error)}")
        return []
    return [EncoderRequest(name)]

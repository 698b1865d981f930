"""``pvrpipe demo``: the whole way on a real environment, by the same functions as the commands call."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pvrpipe.commands.terminal import error_rows, note, watching
from pvrpipe.pipeline.embed import EmbedConfig, EmbedResult, embed
from pvrpipe.pipeline.encoders import EncoderRequest
from pvrpipe.pipeline.pretraining import PretrainConfig, pretrain
from pvrpipe.pipeline.weights import find_weights
from pvrpipe.pipeline.zoo import PVRS
from pvrpipe.rollouts.collect import CollectConfig, Engine, collect
from pvrpipe.schemas.errors import WeightsError, one_line
from pvrpipe.schemas.quiet import quiet_start
from pvrpipe.store.workspace import Workspace
from pvrpipe.worldmodel.probe import probe
from pvrpipe.worldmodel.runs import updates_done
from pvrpipe.worldmodel.training import TrainConfig, train

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
class Job:
    """One model to train and to probe."""

    run: Path
    store: Path
    pvr: str
    config: TrainConfig


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
    with _ray(config.engine):
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

    def job(store: Path, folder: str, pvr: str, model: str, settings: dict[str, Any]) -> Job:
        wanted = TrainConfig(model=model, updates=config.updates, seed=config.seed, **settings)
        return Job(workspace.run(f"{folder}-{model}"), store, pvr, wanted)

    jobs = [job(rollouts, "scratch", "from scratch", model, how) for model, how in SCRATCH.items()]
    for store in stores:
        pvr = store.pvr + (" (random weights)" if store.random_weights else "")
        jobs += [job(store.store, store.store.name, pvr, model, how) for model, how in MODELS.items()]
    return jobs


def _compare_all(jobs: Sequence[Job], config: DemoConfig) -> list[dict[str, str]]:
    """Train and probe; on Ray, as many at once as there are processors."""
    with watching("models", "updates") as progress:

        def watch() -> None:
            done = sum(updates_done(job.run) for job in jobs)
            progress(done, len(jobs) * config.updates, "train and probe")

        if config.engine == "inline":
            tables = []
            for job in jobs:
                tables.append(_compare(job))
                watch()
            return [row for table in tables for row in table]
        import ray

        compare = ray.remote(num_cpus=1)(_compare)
        pending = references = [compare.remote(job) for job in jobs]
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=1)
            watch()
        return [row for table in ray.get(references) for row in table]


def _compare(job: Job) -> list[dict[str, str]]:
    """Train one model and probe it: its rows of the table."""
    train(job.config, job.store, job.run)
    rows = error_rows(probe(job.run, seed=job.config.seed))
    return [{"pvr": job.pvr, "model": job.config.model, **row} for row in rows]


def _real_pvr() -> list[EncoderRequest]:
    """A representation that someone trained, where its weights can be had; a line why not, where not."""
    name = "vc1" if torch.cuda.is_available() else "resnet18"
    try:
        find_weights(PVRS[name], "auto", name)
    except WeightsError as error:
        note(f"no published PVR in this demonstration: {one_line(error)}")
        return []
    return [EncoderRequest(name)]


@contextmanager
def _ray(engine: str) -> Iterator[None]:
    """One Ray for both stages that use it."""
    if engine != "ray":
        yield
        return
    import ray

    with quiet_start():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
